"""Merge the shards of a request into the files that a run of the whole request would have written.

python scripts/merge_shards.py --from outputs/ --output merged/
"""

from llm_perturb.commands.merge_shards import main, merge

__all__ = ["merge"]

if __name__ == "__main__":
    main()
