"""Where the installed commands start: libraries are imported within ``one_line_errors``, so that Ctrl-C ends them."""

from bridge.exchange.command_line.exit_codes import start


def merge_shards() -> None:
    """Run ``merge-shards``."""
    start("llm_perturb.commands.merge_shards")


def run_baseline() -> None:
    """Run ``run-baseline``."""
    start("llm_perturb.commands.run_baseline")


def run_topk_perturb() -> None:
    """Run ``run-topk-perturb``."""
    start("llm_perturb.commands.run_topk_perturb")
