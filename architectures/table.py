"""The page of all model types: how each is measured, and how far from the reference."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from architectures.examine import ALLOWED, BATCHES, Result

_INTRODUCTION = """\
# Architectures

Every model type that transformers maps to a causal language model, as a tiny model with random parameters: written by
`nox -s architectures`, which takes about ten minutes. transformers {transformers}, torch {torch}, CPU.

Each model is saved, and loaded as the commands load it: in memory and streamed. In float64 every gradient, and its
squares over sequences, by the engine that the discovery chooses ({batches} sequences at a time) and by the whole-model
engine, is compared with plain autograd of transformers' model. The instrument's losses are compared with those of a
model whose weights were set to zero by hand: sets and single weights of eight parameters, {batches} sequences at a
time. Sequences have different lengths.

*Difference* is the largest one in float64: of a gradient relative to the largest one of its parameter, of a perturbed
loss relative to the largest change. At most {allowed:g} is right. *float32* is that of the discovery's gradients in
float32 to the reference in float64. Where the streamed engine or the instrument is not "yes", the cell says why.

{counts}

| model type | discovery | streamed | instrument | difference | float32 | remarks |
|---|---|---|---|---|---|---|
"""


def write_page(path: Path, results: Sequence[Result], versions: Mapping[str, str]) -> None:
    """Write the page, one row a type."""
    text = _INTRODUCTION.format(
        **versions,
        batches=" and ".join(map(str, BATCHES)),
        allowed=ALLOWED["float64"],
        counts=_counts(results),
    )
    path.write_text(text + "".join(map(_row, results)))


def _counts(results: Sequence[Result]) -> str:
    kinds = Counter(result.discovery for result in results)
    streamed = sum(result.streamed == "layer by layer" for result in results)
    wrong = sum(bool(result.problems) for result in results)
    parts = [f"{kinds[kind]} {kind}" for kind in ("layer by layer", "whole model", "refused", "not built")]
    return f"{len(results)} model types: {', '.join(parts)}; {streamed} streamed; {wrong} wrong."


def _row(result: Result) -> str:
    measured = result.discovery in ("layer by layer", "whole model")
    discovery = result.discovery
    if measured and not result.batches:
        discovery += ", one sequence at a time"
    cells = [
        f"`{result.model_type}`",
        discovery,
        "yes" if result.streamed == "layer by layer" else result.streamed,
        _instrument(result.instrument),
        f"{result.difference:.0e}" if measured else "",
        "" if result.difference32 is None else f"{result.difference32:.0e}",
        "; ".join(
            [*([result.reason] if result.reason else []), *(f"**{problem}**" for problem in result.problems[:2])]
        ),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"


def _instrument(text: str) -> str:
    return "yes" if text == "".join(f"batch {batch}; " for batch in BATCHES) else text.strip("; ")
