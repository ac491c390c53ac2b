"""Measure the perplexity of a model as it is, and keep it for the runs that must agree with it.

accelerate launch --config_file configs/accelerate_config.yaml scripts/run_baseline.py --model gpt2
"""

from llm_perturb.commands.run_baseline import baseline, main

__all__ = ["baseline"]

if __name__ == "__main__":
    main()
