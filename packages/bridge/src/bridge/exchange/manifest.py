"""The types of ``manifest.json`` and ``baseline.json``: what these files must say, checked where they are read.

A manifest stays the dictionary that the file holds: a run that is resumed writes it back, and what a later version
added must survive that. The types say which entries the packages rely on. All others are tolerated; of those that are
named here, ``NotRequired`` ones (and all of a class with ``total=False``) may be missing, as in manifests of earlier
versions.
"""

from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict, TypeVar

import msgspec

Item = TypeVar("Item")
AtLeastOne = Annotated[list[Item], msgspec.Meta(min_length=1)]


class ModelInfo(TypedDict):
    """The measured model, in the identity of a run."""

    id: str  # name on the Hugging Face hub, or path
    revision: NotRequired[str | None]  # commit, or local-<hash>
    dtype: NotRequired[str]
    n_parameters: NotRequired[int]
    tied_groups: NotRequired[list[list[str]]]


class CorpusInfo(TypedDict, total=False):
    """The texts that the loss is measured on, in the identity of a run."""

    source: str
    packing: str
    max_length: int | None
    n_texts: int
    n_sequences: int
    n_tokens: int
    text_sha256: str
    corpus_sha256: str


class FingerprintTotals(TypedDict):
    """The two hashes of a fingerprint, in the identity of a run."""

    parameters_xxh3: str
    tokenizer_xxh3: str


class MetricInfo(TypedDict, total=False):
    """The definition of a metric, in the manifest of a discovery."""

    formula: str | None
    unit: str | None
    source: str | None
    baseline: bool


class RunIdentity(TypedDict, total=False):
    """All that the numbers of any run depend on; each kind of run has further entries."""

    options: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    fingerprint: FingerprintTotals


class RunState(TypedDict, total=False):
    """What the manifest of any run says, beside its identity.

    Attributes:
        schema: version of the manifest's form.
        kind: of the run, such as ``perturb``; see ``layout``.
        status: running, complete or failed.
        argv: the command.
        started: when, with the offset from UTC.
        ended: likewise; None while the run goes on.
        error: what failed.
        warnings: those that were printed.
        failed_targets: target to error, in the manifest of the measuring instrument and of a validation.
        host: Python, platform, versions of the packages, git commit.
    """

    schema: int
    kind: str
    status: str
    argv: list[str]
    started: str
    ended: str | None
    error: str | None
    warnings: list[str]
    failed_targets: dict[str, str]
    host: dict[str, Any]


class Manifest(RunState, total=False):
    """The manifest of any run; the identity is all that its numbers depend on."""

    identity: RunIdentity


class ShardIdentity(RunIdentity):
    """The identity of a shard of a measuring run."""

    shard: Required[str]  # such as 2/4


class ShardManifest(RunState):
    """The manifest of a shard of a measuring run."""

    identity: ShardIdentity
    rows: list[int]  # of the request, those that the shard holds
    n_rows: int  # of the whole request


class DiscoveryOptions(TypedDict):
    """The options of a discovery that the bridge relies on."""

    metric: AtLeastOne[str]
    revision: NotRequired[str | None]
    trust_remote_code: NotRequired[bool]
    attn_implementation: NotRequired[str | None]
    allow_unused_weights: NotRequired[list[str]]
    packing: NotRequired[str]
    max_length: NotRequired[int | None]
    eval_limit: NotRequired[int | None]
    window_bos: NotRequired[str]
    parse_special_tokens: NotRequired[bool]
    data_file: NotRequired[str | None]
    dataset: NotRequired[str | None]
    dataset_config: NotRequired[str | None]
    split: NotRequired[str | None]
    text_column: NotRequired[str]


class DiscoveryIdentity(TypedDict):
    """The identity of a discovery."""

    options: DiscoveryOptions
    model: ModelInfo
    corpus: CorpusInfo
    fingerprint: NotRequired[FingerprintTotals]


class DiscoveryManifest(RunState):
    """The manifest of a discovery."""

    identity: DiscoveryIdentity
    metrics: NotRequired[dict[str, MetricInfo]]


class PrimaryAnalysis(TypedDict):
    """The analysis that a validation names before anything is measured."""

    unit: Literal["layers", "weights"]
    metric: str
    perturbation: str
    k: int


class ValidationOptions(TypedDict):
    """The options of a validation that its tables and its report rely on."""

    metrics: AtLeastOne[str]
    target_layers: list[str]
    perturbations: AtLeastOne[str]
    k: AtLeastOne[int]
    primary: NotRequired[PrimaryAnalysis]


class ValidationIdentity(TypedDict):
    """The identity of a validation."""

    options: ValidationOptions
    model: ModelInfo
    corpus: CorpusInfo


class ValidationManifest(RunState):
    """The manifest of a validation."""

    identity: ValidationIdentity
    discovery_folder: NotRequired[str]
    discovery_relative: NotRequired[str]  # as seen from the folder that the validation lies in


class Baseline(TypedDict):
    """The loss and perplexity of a model before any perturbation, and what they were measured on."""

    model: str
    revision: str | None
    dtype: str | None
    corpus_sha256: str
    nll: float
    ppl: float
    n_tokens: int
    n_sequences: NotRequired[int]
    parameters_xxh3: NotRequired[str]
    tokenizer_xxh3: NotRequired[str]
