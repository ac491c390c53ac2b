"""Merge the shards of a request into the files that a run of the whole request would have written.

python scripts/merge_shards.py --from outputs/ --output merged/
"""

from bridge.exchange.command_line.exit_codes import start

if __name__ == "__main__":
    start("llm_perturb.commands.merge_shards")
else:
    from llm_perturb.commands.merge_shards import merge

    __all__ = ["merge"]
