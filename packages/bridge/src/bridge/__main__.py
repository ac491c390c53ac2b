"""Where ``bridge`` starts: what the command needs is imported within ``one_line_errors``, so that Ctrl-C ends it."""

from bridge.exchange.command_line.exit_codes import start


def main() -> None:
    """Run ``bridge.cli``."""
    start("bridge.cli")


if __name__ == "__main__":
    main()
