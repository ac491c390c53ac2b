"""The file contract of the three packages: names of run folders, files, columns and selections.

Whoever writes or reads one of these names takes it from here, so that a name is changed here alone.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, cast

from bridge.exchange.errors import RequestError

# Kinds of runs. The folder of a run is <output>/<kind>_<experiment id>.
DISCOVERY = "critical_analysis"
PERTURBATION = "perturb"
SHARD = "shard"
BASELINE = "baseline"
VALIDATION = "validation"
PARTIAL_VALIDATION = "partial_validation"
COMPARISON = "comparison"

# Files of every run folder
MANIFEST_FILE = "manifest.json"
BASELINE_FILE = "baseline.json"
FINGERPRINT_FILE = "fingerprint.json"
LOCK_FILE = ".lock"
RESERVE_FILE = ".reserve"  # room for the last manifest where the disk becomes full
TRACEBACK_FILE = "traceback.log"
PROGRESS_FILES = "progress-*.jsonl"  # a pattern: one file for each process that writes

# Files of a discovery
SAMPLED_WEIGHTS_FILE = "sampled_weights.csv"
STABILITY_FILE = "stability.csv"
ANALYSIS_LOG = "analysis.log"

# Files of a perturbation run
MEASUREMENTS_FILE = "measurements.csv"
COMPARISONS_FILE = "comparisons.csv"
SEQUENCE_LOSSES_FILE = "sequence_losses.parquet"

# Files of a validation
TARGETS_FILE = "targets.csv"
SINGLE_WEIGHTS_FILE = "single_weights.csv"
CORRELATIONS_FILE = "correlations.csv"
REPORT_HTML = "report.html"
REPORT_MD = "report.md"
PERTURB_LOG = "perturb.log"
MEASUREMENT_ID = "measure"  # of the instrument's run folder, which lies in the validation's

# Files of a comparison of models
COMPARED_MODELS_FILE = "comparison.csv"
COMPARED_PAIRS_FILE = "comparison_pairs.csv"

# Figures
PLOTS_FOLDER = "plots"
SCORE_BY_RANK_PLOT = "score_by_rank.png"
STABILITY_PLOT = "stability.png"
PREDICTED_AND_MEASURED_PLOT = "predicted_and_measured.png"
SINGLE_WEIGHTS_PLOT = "single_weights.png"
EFFECT_BY_LAYER_PLOT = "effect_by_layer.png"
ABLATION_PLOT = "ablation.png"
TOP_WEIGHTS_PLOT = "where_top_weights_sit.png"

ALL = "ALL"  # as a target layer: every weight matrix of the model; as a parameter: too many to be listed

WEIGHT_KEY = ["parameter", "row", "col"]  # the columns that name one weight

# Selections: how the weights of a measurement were chosen (column ``selection`` of MEASUREMENTS)
RANDOM = "random"
SINGLE_WEIGHT = "weight"  # one weight alone
ROW = "row"  # a whole row of a matrix
COL = "col"
RANDOM_ROW = "random_row"
RANDOM_COL = "random_col"
_TOP = "top_"
_BOTTOM = "bottom_"
_MATCHED = "matched_"

_SCORE = "score_"
_SHARE = "share_"

Ranking = Literal["top", "bottom", "random"]
Scope = Literal["weights", "per_layer"]


def run_folder_name(kind: str, experiment_id: str) -> str:
    """The name of a run's folder.

    >>> run_folder_name(VALIDATION, "1")
    'validation_1'
    """
    return f"{kind}_{experiment_id}"


def path_aside(path: Path) -> Path:
    """A free path for what is damaged in a file: ``*.damaged``, or ``*.damaged.2`` and so on where there are such."""
    aside = path.with_name(f"{path.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged.{number}")
    return aside


def progress_file(writer: int) -> str:
    """The log of finished records that process ``writer`` keeps; see ``PROGRESS_FILES``."""
    return PROGRESS_FILES.replace("*", str(writer))


def layer_summary_file(metric: str) -> str:
    """The file with the scores of every parameter by a metric: table LAYER_SUMMARY."""
    return f"layer_summary_{metric}.csv"


def top_by_layer_plot(k: int, metric: str) -> str:
    """The figure of how many of a metric's top-K each layer holds."""
    return f"top_{k}_by_layer_{metric}.png"


def comparison_plot(metric: str) -> str:
    """The figure in which models are compared by a metric."""
    return f"comparison_{metric}.png"


class WeightsFile(NamedTuple):
    """What the name of a file of weights (table TOP_WEIGHTS) says.

    Attributes:
        kind: ``top`` (highest scores), ``bottom`` (lowest scores) or ``random``.
        k: how many weights.
        scope: ``weights`` (K of the whole model) or ``per_layer`` (K of every parameter).
        metric: whose scores; None for random weights.
    """

    kind: Ranking
    k: int
    scope: Scope
    metric: str | None


_WEIGHTS_FILE = re.compile(r"(top|bottom|random)_(\d+)_(weights|per_layer)(?:_(\w+))?\.csv")


def weights_file(kind: Ranking, k: int, scope: Scope, metric: str | None = None) -> str:
    """The name of a file of weights; see ``WeightsFile``.

    >>> weights_file("top", 100, "weights", "obd"), weights_file("random", 5, "weights")
    ('top_100_weights_obd.csv', 'random_5_weights.csv')
    """
    ending = "" if metric is None else f"_{metric}"
    return f"{kind}_{k}_{scope}{ending}.csv"


def parse_weights_file(name: str) -> WeightsFile | None:
    """What a file's name says of the weights in it; None for any other name.

    >>> parse_weights_file("top_100_per_layer_grad_x_weight.csv")
    WeightsFile(kind='top', k=100, scope='per_layer', metric='grad_x_weight')
    """
    match = _WEIGHTS_FILE.fullmatch(name)
    if match is None or (match[1] == "random") != (match[4] is None):
        return None
    kind, scope = cast(Ranking, match[1]), cast(Scope, match[3])
    return WeightsFile(kind=kind, k=int(match[2]), scope=scope, metric=match[4])


def score_column(metric: str) -> str:
    """The column of SAMPLED_WEIGHTS with the scores by a metric."""
    return _SCORE + metric


def share_column(metric: str) -> str:
    """The column of SAMPLED_WEIGHTS with the share of all weights that score at least as high by a metric."""
    return _SHARE + metric


def metrics_of_columns(columns: Iterable[str]) -> list[str]:
    """The metrics whose scores a table of SAMPLED_WEIGHTS holds, in the order of its columns.

    >>> metrics_of_columns(["parameter", "score_obd", "score_magnitude", "share_obd"])
    ['obd', 'magnitude']
    """
    return [column.removeprefix(_SCORE) for column in columns if column.startswith(_SCORE)]


def in_top_column(k: int) -> str:
    """The column of LAYER_SUMMARY that counts how many of the global top-K a parameter holds."""
    return f"in_top_{k}"


def top_label(metric: str) -> str:
    """The selection of the weights with the highest scores by a metric (or of the CSV of that name)."""
    return _TOP + metric


def bottom_label(metric: str) -> str:
    """The selection of the weights with the lowest scores by a metric."""
    return _BOTTOM + metric


def matched_label(metric: str) -> str:
    """The selection of random weights whose magnitudes match those of a metric's top weights."""
    return _MATCHED + metric


def is_top(selection: str) -> bool:
    """Whether a selection is that of the weights with the highest scores by some metric."""
    return selection.startswith(_TOP)


def is_bottom(selection: str) -> bool:
    """Whether a selection is that of the weights with the lowest scores by some metric."""
    return selection.startswith(_BOTTOM)


def is_matched(selection: str) -> bool:
    """Whether a selection is one of random weights with matched magnitudes."""
    return selection.startswith(_MATCHED)


def metric_of_label(selection: str) -> str | None:
    """The metric in a selection of top, bottom or matched weights; None for any other selection.

    >>> metric_of_label("top_grad_x_weight"), metric_of_label("random")
    ('grad_x_weight', None)
    """
    for prefix in (_TOP, _BOTTOM, _MATCHED):
        if selection.startswith(prefix):
            return selection.removeprefix(prefix)
    return None


class Shard(NamedTuple):
    """Part ``number`` (from 1) of a request that is split into ``of`` parts."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def experiment_id(self, request: str) -> str:
        """The experiment id of this part of a request with the experiment id ``request``."""
        return f"{request}_{self.number}_of_{self.of}"


def parse_shard(text: str) -> Shard:
    """The shard that ``--shard 2/4`` names.

    Raises:
        RequestError: not two whole numbers, or the first is not one of 1 to the second.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise RequestError(f"--shard '{text}' must be i/n, such as 2/4, with i from 1 to n")
    return Shard(number=int(match[1]), of=int(match[2]))
