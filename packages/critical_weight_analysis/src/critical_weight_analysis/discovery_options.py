"""The options of a discovery: one field for each flag of ``phase1-runner``."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from bridge.exchange.errors import RequestError
from bridge.exchange.run_folder import RunOptions
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.models import ModelOptions
from llm_perturb.evaluation.resident_or_streamed import Weights

Metric = Literal[
    "grad_x_weight",
    "grad_squared",
    "grad_squared_batch",
    "grad_squared_token",
    "obd",
    "taylor2",
    "magnitude",
    "wanda",
    "hutchinson_diag",
]
Scope = Literal["matrices", "all"]
Mode = Literal["global", "per_layer"]
Item = TypeVar("Item")

_NOT_IDENTITY = {"batch_size", "weights", "device", "output", "baseline", "experiment_id", "save_plots"}


@dataclass(frozen=True, kw_only=True)
class DiscoveryOptions:
    """What is scored, and how.

    Attributes:
        metric: what the weights are scored by.
        topk: how many weights a ranking keeps; several in one pass.
        batch_size: sequences at a time; found automatically if left out. Changes no number beyond rounding.
        scope: matrices, every parameter of two or more dimensions; all, biases and norms too.
        include: name patterns such as '*.mlp.*'; only parameters that match one.
        exclude: name patterns; no parameter that matches one.
        mode: global, the top-K of all weights; per_layer, of each parameter.
        baseline: a baseline.json of run_baseline.py; stop if this run's setup, weights or loss are others.
        seed: of the random control list, the halves of --stability and the signs of hutchinson_diag.
        stability: how many times to discover two random halves of the corpus and compare; one more pass each.
        hutchinson_probes: of hutchinson_diag; each costs two to three backward passes over the corpus.
        save_plots: whether to draw the plots.
        weights: resident, in memory; streamed, read from the checkpoint one layer at a time; auto, by their size.
    """

    metric: list[Metric] = field(default_factory=lambda: ["grad_x_weight"])
    topk: list[int] = field(default_factory=lambda: [100])
    batch_size: int | None = None
    scope: Scope = "matrices"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    mode: list[Mode] = field(default_factory=lambda: ["global", "per_layer"])
    baseline: str | None = None
    seed: int = 0
    stability: int = 0
    hutchinson_probes: int = 10
    save_plots: bool = True
    weights: Weights = "auto"


@dataclass(frozen=True, kw_only=True)
class Options(DiscoveryOptions, ModelOptions, CorpusOptions, RunOptions):
    """All flags of a discovery."""

    def checked(self) -> "Options":
        """The same, lists without repetitions, the K ascending, the paths of texts independent of the current folder.

        Raises:
            RequestError: a number is out of range.
        """
        at_least_1 = {
            "--topk": min(self.topk),
            "--batch-size": self.batch_size,
            "--hutchinson-probes": self.hutchinson_probes,
        }
        for flag, number in at_least_1.items():
            if number is not None and number < 1:
                raise RequestError(f"{flag} must be at least 1, not {number}")
        for flag, number in {"--stability": self.stability, "--seed": self.seed}.items():
            if number < 0:
                raise RequestError(f"{flag} must be at least 0, not {number}")
        if self.stability and "hutchinson_diag" in self.metric:
            raise RequestError(
                "--stability repeats the pass over the corpus, of which --metric hutchinson_diag is no part; "
                "leave one of the two out"
            )
        data_file, dataset = self.data_file, self.dataset
        return replace(
            self,
            topk=sorted(set(self.topk)),
            metric=_unique(self.metric),
            mode=_unique(self.mode),
            include=_unique(self.include),
            exclude=_unique(self.exclude),
            allow_unused_weights=_unique(self.allow_unused_weights),
            data_file=data_file and _absolute(data_file),
            dataset=_absolute(dataset) if dataset and Path(dataset).exists() else dataset,
        )

    def corpus(self) -> CorpusOptions:
        """Those that choose the corpus."""
        return CorpusOptions(**{each.name: getattr(self, each.name) for each in fields(CorpusOptions)})

    def identity(self) -> dict[str, Any]:
        """Those that the numbers depend on."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_IDENTITY}


def _unique(items: Iterable[Item]) -> list[Item]:
    """Without repetitions, in the order of the first occurrences."""
    return list(dict.fromkeys(items))


def _absolute(path: str) -> str:
    return str(Path(path).absolute())
