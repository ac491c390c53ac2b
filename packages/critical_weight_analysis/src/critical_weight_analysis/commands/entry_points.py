"""Where the installed command starts: its libraries are imported within the border, so that Ctrl-C ends it too."""

from bridge.exchange.border import start


def phase1_runner() -> None:
    """Run ``phase1-runner``."""
    start("critical_weight_analysis.commands.phase1_runner")
