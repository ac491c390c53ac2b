"""Where the installed command starts: its libraries are imported within ``one_line_errors``, so that Ctrl-C ends it."""

from bridge.exchange.command_line.exit_codes import start


def phase1_runner() -> None:
    """Run ``phase1-runner``."""
    start("critical_weight_analysis.commands.phase1_runner")
