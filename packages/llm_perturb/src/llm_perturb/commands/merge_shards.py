"""The command that merges shards; ``scripts/merge_shards.py`` shows how it is called."""

from bridge.exchange import layout
from bridge.exchange.command_line import flags
from bridge.exchange.printable import say
from bridge.exchange.run_folder import RunOptions

from llm_perturb import shards


def merge(*, from_: list[str], run: RunOptions) -> None:
    """Merge the finished shards of one request, made with `run_topk_perturb.py --shard i/n`.

    Args:
        from_: folders of shards, or folders that hold them.
        run: the run folder.
    """
    folder = shards.merge(from_, run)
    say(f"merged into {folder / layout.MEASUREMENTS_FILE}")


def main() -> None:
    """Run the command on the words of the command line."""
    flags.run(merge)


if __name__ == "__main__":
    main()
