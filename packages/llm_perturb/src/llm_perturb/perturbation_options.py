"""The flags that say what a perturbation run measures."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from bridge.exchange.command_line.flag_table import FilePath
from bridge.exchange.command_line.perturbation_numbers import PERTURBATION_OF, check_seeds, numbers_set
from bridge.exchange.errors import RequestError
from bridge.exchange.printable import check_printable

from llm_perturb.perturbation import Kind, Perturbation
from llm_perturb.target_scores import Metric

Selection = Literal["top", "random", "bottom", "matched"]


@dataclass(frozen=True, kw_only=True)
class PerturbationOptions:
    """What is perturbed, and how.

    Attributes:
        target_layer: layers or parameters, with or without .weight; ALL for every matrix. Default: the
            environment's TARGET_LAYER (separated by commas).
        k: how many weights; several give a curve.
        selection: top: highest scores; random: controls from the same target; bottom: lowest scores; matched:
            random weights of the same magnitudes as the top.
        metric: the score that top and bottom go by, computed for the target alone.
        weights_csv: take the top weights from these files of a discovery instead; refused if the fingerprint beside
            a file is of another model (in another dtype, if the values in its rows are).
        per_weight: also perturb each weight of this CSV alone.
        rows: perturb these whole rows of the matrix as stored, and a random one per seed, instead of sets.
        cols: likewise columns.
        perturbation: what is done to the weights.
        factor: of scale; default 0.5.
        sigma: of gaussian_noise, in standard deviations of the tensor; default 1.0.
        bit: of bit_flip, 0 is the lowest; default the highest bit of the exponent.
        n_bits: of quantize; default 4.
        seeds: one random control (and one draw of noise) for each.
        kl: also measure the divergence of the predictions, KL(before || after), about twice the time of a loss.
        shard: i/n, from 1/n to n/n: do only this part, on a machine of its own; merge_shards.py puts them together.
        list_layers: print the parameters of the model and stop.
    """

    target_layer: list[str] = field(default_factory=list)
    k: list[int] = field(default_factory=lambda: [100])
    selection: list[Selection] = field(default_factory=lambda: ["top", "random", "bottom"])
    metric: list[Metric] = field(default_factory=lambda: ["grad_x_weight"])
    weights_csv: list[FilePath] = field(default_factory=list)
    per_weight: str | None = None
    rows: list[int] = field(default_factory=list)
    cols: list[int] = field(default_factory=list)
    perturbation: list[Kind] = field(default_factory=lambda: ["zero"])
    factor: float | None = None
    sigma: float | None = None
    bit: int | None = None
    n_bits: int | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    kl: bool = False
    shard: str | None = None
    list_layers: bool = False

    @property
    def target_layers(self) -> list[str]:
        """``--target-layer``, or the environment's TARGET_LAYER.

        Raises:
            RequestError: a name has a character that is not printable.
        """
        names = self.target_layer or os.environ.get("TARGET_LAYER", "").split(",")
        return [check_printable(name.strip(), "TARGET_LAYER") for name in names if name.strip()]

    @property
    def ks(self) -> list[int]:
        """The sizes of the sets, ascending, each once."""
        return sorted(set(self.k))

    @property
    def perturbations(self) -> list[Perturbation]:
        """Each kind of perturbation with its numbers, those of ``Perturbation`` where none were set."""
        numbers = self._numbers()
        return [Perturbation(kind=kind, **numbers) for kind in self.perturbation]

    def _numbers(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in PERTURBATION_OF}
        return numbers_set(values, self.perturbation, "--perturbation")

    @property
    def weight_files(self) -> list[str]:
        """All CSVs of weights."""
        return [*self.weights_csv, *([self.per_weight] if self.per_weight else [])]

    def check(self, batch_size: int) -> None:
        """Refuse numbers that mean nothing for any model.

        Raises:
            RequestError: a size below 1, a negative seed, a number of a perturbation that is not asked for.
        """
        smallest = min(*self.k, batch_size)
        if smallest < 1:
            raise RequestError(f"--k and --batch-size must be at least 1, not {smallest}")
        check_seeds(self.seeds)
        self._numbers()

    def identity(self) -> dict[str, object]:
        """What the numbers of a run depend on, as the manifest names it."""
        return {
            "target_layers": self.target_layers,
            "k": self.ks,
            "selections": self.selection,
            "metrics": self.metric,
            "perturbations": [perturbation.label for perturbation in self.perturbations],
            "seeds": self.seeds,
            "weights_csv": self.weights_csv,
            "per_weight": self.per_weight,
            "rows": self.rows,
            "cols": self.cols,
            "kl": self.kl,
        }
