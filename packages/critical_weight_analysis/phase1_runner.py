#!/usr/bin/env python
"""Phase 1, global discovery: score every weight of a causal language model and write the exact top-K.

python phase1_runner.py --model pythia-2.8b --metric grad_x_weight grad_squared --topk 100 500 --stability 3
python phase1_runner.py --eval-limit 20        # the embedded model, without a network
"""

from bridge.exchange.command_line.exit_codes import start

if __name__ == "__main__":
    start("critical_weight_analysis.commands.phase1_runner")
else:
    from critical_weight_analysis.commands.phase1_runner import phase1

    __all__ = ["phase1"]
