"""The proof of the layer-by-layer engine on a few tokens of the model, before it is trusted with a corpus.

Its losses and gradients are compared with those of plain autograd, see ``autograd_reference``. The engine is run on
three sequences, two of different lengths as a padded batch and then one alone, so that padding, telling sequences apart
and going from one batch to the next all take part. Where that fails it is tried one by one.

Weights that stay in the checkpoint are proved in the same way. Every layer could be compared on its own instead,
without reading the checkpoint four times more, but nothing would then be known of what passes between the layers.
"""

from dataclasses import dataclass, replace

import torch
from bridge.exchange.errors import one_line
from llm_perturb.evaluation.checkpoint import Checkpoint
from torch import Tensor
from transformers import PreTrainedModel

from critical_weight_analysis.layerwise.autograd_reference import Expected, Rows, numbers_of_rows
from critical_weight_analysis.layerwise.decoder_structure import Structure
from critical_weight_analysis.layerwise.engine import LayerwiseEngine
from critical_weight_analysis.layerwise.pass_settings import Settings

FIELDS = frozenset({"grad", "fisher"})  # of which every other sum over sequences is formed in the same way
OF_LAYER = 1e-2  # share of a layer's largest gradient below which one may be nothing but rounding


class ProofError(Exception):
    """The engine does not give what autograd gives; the message says where."""


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Attributes:
        together: whether sequences may be run as a batch.
        expected: what was compared with.
        difference: the largest one between the engine and autograd, relative to the norm of a parameter's gradient.
        obstacle: why not in batches.
    """

    together: bool
    expected: Expected
    difference: float
    obstacle: str | None = None

    def account(self, seconds: float) -> str:
        """In one line."""
        one_by_one = f", one sequence at a time because in batches {self.obstacle}" if self.obstacle else ""
        idle = len(self.expected.idle)
        not_proved = f"; {idle} parameters took no part and are not proved" if idle else ""
        return (
            f"layer by layer{one_by_one}: proved on {self.expected.n_tokens} tokens against autograd "
            f"in {seconds:.1f} s, largest difference {self.difference:.0e}{not_proved}"
        )


def prove(
    model: PreTrainedModel, structure: Structure, expected: Expected, checkpoint: Checkpoint | None = None
) -> Proof:
    """Compare the layer-by-layer engine with autograd: in batches, and one by one where that fails.

    Args:
        model: as above.
        structure: what the engine goes by.
        expected: what autograd gives.
        checkpoint: as above.

    Raises:
        ProofError: the engine fails, or gives something else one by one, too.
    """
    together = Settings(batch_size=2, checkpoint=checkpoint)
    try:
        return Proof(True, expected, _difference(model, structure, expected, together))
    except ProofError as error:
        alone = replace(together, batch_size=1)
        return Proof(False, expected, _difference(model, structure, expected, alone), str(error))


def _difference(model: PreTrainedModel, structure: Structure, expected: Expected, settings: Settings) -> float:
    """The largest difference between the engine and autograd.

    Raises:
        ProofError: it is larger than rounding makes it, or the engine fails.
    """
    names = list(expected.rows.get("grad", ()))
    by_engine: Rows = {field: {} for field in expected.rows}
    try:
        engine = LayerwiseEngine(structure)
        losses, stream = engine.sensitivities(model, expected.sequences, names, frozenset(by_engine), settings)
        for sensitivity in stream:
            for field, rows in by_engine.items():
                rows[sensitivity.name] = numbers_of_rows(getattr(sensitivity, field))
    except Exception as error:  # whatever a layer makes of being run again
        raise ProofError(f"it fails: {one_line(error)}") from error
    eps = torch.finfo(model.dtype).eps
    largest = ((losses - expected.losses).abs() / expected.losses.abs()).max().item()
    if not largest <= max(1e-4, 8 * eps):
        raise ProofError(f"its losses differ from those of a plain forward pass by {largest:.2g} of their size")
    for field, rows in by_engine.items():
        for owned in structure.decoder.parameters_by_layer().values():
            members = [name for name in owned if name in rows]
            for name, difference in _differences(rows, expected.rows[field], members).items():
                if not difference <= max(1e-3, 64 * eps):  # rounding grows from layer to layer
                    raise ProofError(_described(name, field, rows[name], difference))
                largest = max(largest, difference)
    return largest


def _differences(rows: dict[str, Tensor], expected: dict[str, Tensor], members: list[str]) -> dict[str, float]:
    """|rows - expected| / |expected| of the parameters of a layer, with a floor for what is small there."""
    norms = {name: expected[name].norm().item() for name in members}
    floor = OF_LAYER * max(norms.values(), default=0)
    return {name: (rows[name] - expected[name]).norm().item() / (max(norms[name], floor) or 1) for name in members}


def _described(name: str, field: str, rows: Tensor, difference: float) -> str:
    if not rows.any():
        return f"{name} is not seen to act, though it does"
    what = {"grad": "gradient", "fisher": "squared gradients by sequence"}[field]
    return f"the {what} of {name} differs from that of autograd by {difference:.2g} of its size"
