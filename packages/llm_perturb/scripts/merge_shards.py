"""Put the shards of a request together, into the files that a run of all of it would have written.

python scripts/merge_shards.py --from outputs/ --output merged/
"""

from bridge.exchange import flags
from bridge.exchange.printable import say
from llm_perturb import shards


def merge(*, from_: list[str], output: str = "outputs/", experiment_id: str | None = None) -> None:
    """Merge the finished shards of one request, made with `run_topk_perturb.py --shard i/n`.

    Args:
        from_: folders of shards, or folders that hold them.
        output: where the run's folder is made.
        experiment_id: its name; default the time.
    """
    folder = shards.merge(from_, output, experiment_id)
    say(f"merged into {folder / 'measurements.csv'}")


if __name__ == "__main__":
    flags.run(merge)
