"""What the tools give for a checkpoint: sums of gradients by both engines, and losses under perturbations."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from bridge.exchange.run_folder import RunOptions
from bridge.exchange.tables import MEASUREMENTS, TOP_WEIGHTS, read_table
from critical_weight_analysis.discovery import Engine, engine_for
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import Sensitivity
from critical_weight_analysis.whole_model import WholeModelEngine
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import LoadedModel, ModelOptions
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.perturbation_run import measure_perturbations
from torch import Tensor

NEEDS = frozenset({"grad", "fisher", "curvature"})
DType = Literal["float32", "float64"]


@dataclass(frozen=True)
class Pass:
    """One pass over the sequences.

    Attributes:
        what: which engine, weights and batch size.
        losses: S_i, float64 (n,).
        stream: the sums of every parameter.
    """

    what: str
    losses: Tensor
    stream: Iterator[Sensitivity]


def load(folder: Path, dtype: DType, weights: Literal["resident", "streamed"]) -> LoadedModel:
    """Load a checkpoint as the commands do."""
    return ModelOptions(model=str(folder), dtype=dtype, device="cpu").load(weights=weights)


def engine_of(loaded: LoadedModel) -> Engine:
    """The engine that a discovery of the loaded model chooses."""
    return engine_for(loaded.model, Settings(checkpoint=loaded.checkpoint), needs=NEEDS)


def passes(loaded: LoadedModel, engine: Engine, sequences: list[Tensor], batches: tuple[int, ...]) -> Iterator[Pass]:
    """A pass for each batch size by the chosen engine; and one by the whole-model engine, if it was not chosen."""
    names = [name for name, _ in loaded.model.named_parameters()]
    where = "streamed" if loaded.checkpoint else "resident"
    for batch in batches:
        settings = Settings(batch_size=batch, checkpoint=loaded.checkpoint)
        losses, stream = engine.sensitivities(loaded.model, sequences, names, NEEDS, settings)
        yield Pass(f"{engine.name}, {where}, batch {batch}", losses, stream)
    if not loaded.checkpoint and not isinstance(engine, WholeModelEngine):
        losses, stream = WholeModelEngine().sensitivities(loaded.model, sequences, names, NEEDS)
        yield Pass("whole_model, resident", losses, stream)


def perturbed_losses(
    folder: Path, dtype: DType, batch: int, sets: dict[str, list[int]], singles: dict[str, list[int]]
) -> Iterator[tuple[str, list[int], Tensor]]:
    """Zero sets of weights and single weights by the command, and read what it wrote.

    Args:
        folder: the checkpoint; the command writes below it.
        dtype: of the arithmetic.
        batch: sequences at a time.
        sets: flat indices by parameter, all of one length; each parameter's weights are zeroed together.
        singles: likewise; each weight is zeroed alone.

    Yields:
        Parameter, flat indices and S_i of every sequence; first the unperturbed model, with no name.
    """
    shapes = {name: parameter.shape for name, parameter in load(folder, dtype, "resident").model.named_parameters()}
    set_list, single_list = folder / "sets.csv", folder / "singles.csv"
    _write_list(folder, dtype, sets, set_list)
    _write_list(folder, dtype, singles, single_list)
    experiment = f"{dtype}_{batch}"
    measure_perturbations(
        options=PerturbationOptions(
            target_layer=list(sets),
            k=[len(index) for index in sets.values()][:1],
            selection=["top"],
            weights_csv=[str(set_list)],
            per_weight=str(single_list),
        ),
        model_options=ModelOptions(model=str(folder), dtype=dtype, device="cpu"),
        corpus_options=CorpusOptions(data_file=str(folder / "texts.txt"), max_length=16),
        batch_size=batch,
        run_options=RunOptions(output=str(folder / "out"), experiment_id=experiment),
    )
    run = folder / "out" / f"perturb_{experiment}"
    table = read_table(run / "measurements.csv", MEASUREMENTS)
    nats = pd.read_parquet(run / "sequence_losses.parquet")
    n = len(nats) // len(table)
    yield "", [], torch.tensor(nats["baseline_nats"].to_numpy()[:n])
    for at, row in enumerate(table.itertuples()):
        after = torch.tensor(nats["perturbed_nats"].to_numpy()[at * n : (at + 1) * n])
        yield str(row.parameter), _indices(row, sets, shapes), after


def _indices(row: Any, sets: dict[str, list[int]], shapes: dict[str, torch.Size]) -> list[int]:  # noqa: ANN401
    """The flat indices that a row of the table perturbed."""
    if row.selection != "weight":
        return sets[row.parameter]
    if pd.isna(row.col):
        return [int(row.row)]
    return [int(row.row) * shapes[row.parameter][1:].numel() + int(row.col)]


def _write_list(folder: Path, dtype: DType, chosen: dict[str, list[int]], path: Path) -> None:
    """A list of weights in the columns of a discovery's top-K."""
    model = load(folder, dtype, "resident").model
    rows: list[dict[str, Any]] = []
    for name, indices in chosen.items():
        parameter = model.get_parameter(name).detach()
        for index in indices:
            row, col = divmod(index, parameter[0].numel()) if parameter.ndim > 1 else (index, None)
            value = parameter.view(-1)[index].item()
            rows.append({"layer": name.rpartition(".")[0], "parameter": name, "row": row, "col": col, "value": value})
    frame = pd.DataFrame(rows).astype({"col": "Int64"})
    frame["rank"], frame["score"] = range(1, len(frame) + 1), [1 / (1 + rank) for rank in range(len(frame))]
    frame[list(TOP_WEIGHTS.columns)].to_csv(path, index=False)
