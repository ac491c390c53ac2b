"""Compare what the tools give for one model type with what is right."""

import contextlib
import io
import re
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from bridge.exchange.errors import RequestError, RunError
from critical_weight_analysis.discovery import LAYERWISE
from torch import Tensor

from architectures import reference, subject, tiny

BATCHES = (1, 4)
ALLOWED = {"float64": 1e-4, "float32": 1e-2}
N_PARAMETERS = 8  # that weights are zeroed of
N_SET, N_SINGLE = 10, 2  # weights of a set, and weights zeroed alone, of each of these parameters
OF_LAYER = 1e-2  # share of a layer's largest gradient below which one may be nothing but rounding
OF_LOSS = 1e-3  # share of a loss below which a change of it is compared with this share: float32 logits round more


@dataclass
class Result:
    """What came of one model type.

    Attributes:
        model_type: the type.
        discovery: ``layer by layer``, ``whole model``, ``refused``, or ``not built``.
        batches: whether sequences may be run together.
        reason: why not layer by layer, or not in batches.
        streamed: ``layer by layer``, or why not.
        instrument: batch sizes that were measured, and why not others.
        difference: the worst relative difference of sums and losses in float64.
        where: of which parameter in which pass.
        difference32: likewise of the tools in float32 to the reference in float64.
        problems: wrong numbers and tracebacks.
        seconds: for all of it.
    """

    model_type: str
    discovery: str = "not built"
    batches: bool = True
    reason: str = ""
    streamed: str = ""
    instrument: str = ""
    difference: float = 0.0
    where: str = ""
    difference32: float | None = None
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, difference: float, where: str, dtype: str = "float64") -> None:
        """Keep the worst difference, and one that is too large as a problem."""
        if dtype == "float64" and not difference <= self.difference:
            self.difference, self.where = difference, where
        if dtype == "float32" and not difference <= (self.difference32 or 0):
            self.difference32 = difference
        if not difference <= ALLOWED[dtype]:
            self.problems.append(f"{dtype}, {where}: relative difference {difference:.1e}")


def examine(model_type: str, float32: bool = True) -> Result:
    """Build a type, and compare discovery and instrument with the reference.

    Args:
        model_type: as transformers names it.
        float32: whether the discovery is also run in float32.
    """
    result, begun = Result(model_type), time.monotonic()
    try:
        model = tiny.build(model_type)
    except tiny.NotBuilt as obstacle:
        result.reason = str(obstacle)
        return result
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        tiny.save(model, folder)
        try:
            right = reference.in_float64(model, folder)
        except Exception as error:  # whatever transformers makes of its own checkpoint
            result.reason = f"transformers does not load what it saved: {_line(error)}"
            return result
        _examine(result, right, folder, float32)
    for text in ("reason", "streamed", "instrument"):
        setattr(result, text, getattr(result, text).replace(name, "FOLDER"))
    result.seconds = time.monotonic() - begun
    return result


def _examine(result: Result, model: torch.nn.Module, folder: Path, float32: bool) -> None:
    sequences = tiny.sequences()
    try:
        right, losses = reference.sums(model, sequences), reference.losses(model, sequences)
    except Exception as error:  # whatever a model makes of a few tokens
        right, losses = {}, torch.empty(0)
        result.reason = f"no reference: {_line(error)}"
    _guarded(result, "discovery", lambda: _discovery(result, folder, right, losses, sequences, float32))
    _guarded(result, "streamed", lambda: _streamed(result, folder, right, losses, sequences))
    for batch in BATCHES if right else ():
        _guarded(result, f"instrument, batch {batch}", lambda b=batch: _instrument(result, model, folder, right, b))


def _guarded(result: Result, what: str, step: Callable[[], None]) -> None:
    """Do a step; a refusal or failure in one line is an outcome, and any other exception a problem."""
    try:
        step()
    except (RequestError, RunError) as refusal:
        _refused(result, what, _line(refusal))
    except Exception as error:  # the very thing that is looked for
        frame = traceback.extract_tb(error.__traceback__)[-1]
        result.problems.append(f"{what}: {type(error).__name__} at {Path(frame.filename).name}: {_line(error)}")


def _refused(result: Result, what: str, reason: str) -> None:
    if what == "discovery":
        result.discovery, result.reason = "refused", reason
    elif what == "streamed":
        result.streamed = reason
    else:
        result.instrument += f"{what.removeprefix('instrument, ')} refused: {reason}; "


def _discovery(
    result: Result,
    folder: Path,
    right: dict[str, reference.Sums],
    losses: Tensor,
    sequences: list[Tensor],
    float32: bool,
) -> None:
    loaded = subject.load(folder, "float64", "resident")
    engine = subject.engine_of(loaded)
    result.batches = engine.together
    layerwise = engine.name == LAYERWISE
    result.discovery = "layer by layer" if layerwise else "whole model"
    if not layerwise:
        result.reason = engine.account.partition("not possible: ")[2]
    elif not engine.together:
        result.reason = engine.account.partition("in batches ")[2].partition(": proved")[0]
    for each in subject.passes(loaded, engine, sequences, BATCHES):
        _compare(result, each, right, losses)
    if float32:
        loaded = subject.load(folder, "float32", "resident")
        for each in subject.passes(loaded, subject.engine_of(loaded), sequences, BATCHES[-1:]):
            _compare(result, each, right, losses, "float32")


def _streamed(
    result: Result, folder: Path, right: dict[str, reference.Sums], losses: Tensor, sequences: list[Tensor]
) -> None:
    loaded = subject.load(folder, "float64", "streamed")
    engine = subject.engine_of(loaded)
    result.streamed = "layer by layer"
    for each in subject.passes(loaded, engine, sequences, BATCHES):
        _compare(result, each, right, losses)


def _compare(
    result: Result, each: subject.Pass, right: dict[str, reference.Sums], losses: Tensor, dtype: str = "float64"
) -> None:
    """Losses, and every entry of every sum relative to the largest of its parameter."""
    result.note(((each.losses - losses).abs() / losses).max().item(), f"{each.what}: losses", dtype)
    largest = _largest_of_layer(right)
    seen = set()
    for sensitivity in each.stream:
        name = sensitivity.name
        seen.add(name)
        for quantity in ("grad", "fisher", "curvature"):
            expected = getattr(right[name], quantity)
            scale = max(expected.abs().max().item(), largest[_layer(name), quantity])
            difference = (getattr(sensitivity, quantity).double() - expected).abs().max().item()
            relative = difference / scale if scale else difference
            result.note(relative, f"{each.what}: {quantity} of {name}", dtype)
    if seen != right.keys():
        result.problems.append(f"{each.what}: other parameters: {sorted(seen ^ right.keys())[:3]}")


def _layer(name: str) -> str:
    """The decoder layer of a parameter: its name up to the first number."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def _largest_of_layer(right: dict[str, reference.Sums]) -> dict[tuple[str, str], float]:
    """By layer and quantity, the size below which an entry may be nothing but rounding."""
    largest: defaultdict[tuple[str, str], float] = defaultdict(float)
    for name, sums in right.items():
        for quantity, share in (("grad", OF_LAYER), ("fisher", OF_LAYER**2), ("curvature", OF_LAYER**2)):
            size = share * getattr(sums, quantity).abs().max().item()
            largest[_layer(name), quantity] = max(largest[_layer(name), quantity], size)
    return largest


def _instrument(
    result: Result, model: torch.nn.Module, folder: Path, right: dict[str, reference.Sums], batch: int
) -> None:
    """Sets and single weights of a few parameters, those with the largest abs(θ dL/dθ)."""
    sequences = tiny.sequences()
    sets, singles = dict(_chosen(model, right, N_SET)), dict(_chosen(model, right, N_SINGLE))
    right_before = reference.losses(model, sequences)
    before = right_before
    n_measured = 0
    for name, index, found in subject.perturbed_losses(folder, "float64", batch, sets, singles):
        where = f"instrument, batch {batch}: {len(index)} of {name}"
        if not name:
            before = found
            difference = ((before - right_before).abs() / right_before).max().item()
            result.note(difference, f"instrument, batch {batch}: baseline")
            continue
        n_measured += 1
        expected = reference.losses_without(model, name, index, sequences) - right_before
        scale = max(expected.abs().max().item(), OF_LOSS * before.max().item())
        result.note((found - before - expected).abs().max().item() / scale, where)
    if n_measured != (N_SINGLE + 1) * len(sets):
        result.problems.append(f"instrument, batch {batch}: {n_measured} measurements of {(N_SINGLE + 1) * len(sets)}")
    result.instrument += f"batch {batch}; "


def _chosen(model: torch.nn.Module, right: dict[str, reference.Sums], n: int) -> Iterator[tuple[str, list[int]]]:
    """The n weights with the largest abs(θ dL/dθ) of parameters from the whole depth of the model."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.numel() >= 2 * N_SET}
    names = list(parameters)
    for name in names[:: max(1, len(names) // N_PARAMETERS)]:
        scores = (parameters[name].detach() * right[name].grad).abs().view(-1)
        yield name, scores.topk(n).indices.tolist()


def _line(error: Exception) -> str:
    """The last line of a message, short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()[:240]
