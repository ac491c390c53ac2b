r"""Perturb the top-K, random and bottom-K weights of a layer and measure what each costs in perplexity.

    TARGET_LAYER="gpt_neox.layers.5.mlp.dense_h_to_4h" \
    accelerate launch --config_file configs/accelerate_config.yaml scripts/run_topk_perturb.py

    accelerate launch scripts/run_topk_perturb.py --target-layer transformer.h.5.attn.c_attn --k 1 10 100 \
        --perturbation zero sign_flip --seeds 0 1 2 3 4

    python scripts/run_topk_perturb.py --model gpt2 --list-layers

    python scripts/run_topk_perturb.py --model gpt2 --target-layer transformer.h.* --shard ${SLURM_ARRAY_TASK_ID}/20
"""

from bridge.exchange.command_line.exit_codes import start

if __name__ == "__main__":
    start("llm_perturb.commands.run_topk_perturb")
else:
    from llm_perturb.commands.run_topk_perturb import perturb

    __all__ = ["perturb"]
