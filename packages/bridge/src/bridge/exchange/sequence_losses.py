"""The losses of every measurement on each sequence, as the instrument wrote them."""

from pathlib import Path

import pandas as pd

from bridge.exchange.errors import RequestError

COLUMNS = {
    **dict.fromkeys(["target_layer", "selection", "perturbation"], "string"),
    **dict.fromkeys(["k", "seed", "sequence", "cluster", "n_tokens"], "int64"),
    **dict.fromkeys(["baseline_nats", "perturbed_nats"], "float64"),  # summed over the sequence
}


def read_sequence_losses(path: Path) -> pd.DataFrame:
    """Columns ``COLUMNS`` of a ``sequence_losses.parquet``; one row a measurement and sequence.

    ``cluster`` is the text that a sequence begins in; runs of earlier versions lack it.

    Raises:
        RequestError: not such a file.
    """
    import pyarrow  # slow to import
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in COLUMNS if name != "cluster" or name in file.schema_arrow.names]
            table = file.read(columns=names).select(names)
        losses: pd.DataFrame = table.cast(pyarrow.schema([(name, COLUMNS[name]) for name in names])).to_pandas()
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise RequestError(f"{path} is damaged: {error}; remove it, or measure again") from None
    return losses
