"""Where ``bridge`` starts: what the command needs is imported within its border, so that Ctrl-C ends it at any time."""

from bridge.exchange.border import start


def main() -> None:
    """Run ``bridge.cli``."""
    start("bridge.cli")


if __name__ == "__main__":
    main()
