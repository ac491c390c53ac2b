"""Where the installed commands start: their libraries are imported within the border, so that Ctrl-C ends them too."""

from bridge.exchange.border import start


def merge_shards() -> None:
    """Run ``merge-shards``."""
    start("llm_perturb.commands.merge_shards")


def run_baseline() -> None:
    """Run ``run-baseline``."""
    start("llm_perturb.commands.run_baseline")


def run_topk_perturb() -> None:
    """Run ``run-topk-perturb``."""
    start("llm_perturb.commands.run_topk_perturb")
