"""Measure the perplexity of a model as it is, and keep it for the runs that must agree with it.

accelerate launch --config_file configs/accelerate_config.yaml scripts/run_baseline.py --model gpt2
"""

from bridge.exchange.command_line.exit_codes import start

if __name__ == "__main__":
    start("llm_perturb.commands.run_baseline")
else:
    from llm_perturb.commands.run_baseline import baseline

    __all__ = ["baseline"]
