"""Claims of whole reports: from made-up measurements, through the correlations table, to the sentences."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
from bridge.analysis.correlation import correlate
from bridge.analysis.layer_sample import draw_layers
from bridge.analysis.primary_analysis import Primary
from bridge.report.evidence import Evidence
from bridge.report.verdict_sentences import exploratory, verdict_on_layers

from simulations.layers import KINDS, N_DEPTHS, N_LAYERS, NAMES, World
from simulations.rates import ANY, FALSE, Rate, claim, generator

N_RESAMPLES = 299  # the smallest p-value, 2/300, is enough for the first of seven by Benjamini and Hochberg
NULL_WORLDS = (
    World(),
    World(alike="same kinds", depth="smooth"),
    World(alike="own kinds", depth="rough", unbounded=0.5),
)
NULL_CASES = (
    *product(NULL_WORLDS, (4, 10), (2,)),
    *product(NULL_WORLDS, (20, 40), (1, 2, 8)),
    *product(NULL_WORLDS, (211,), (2, 8)),
    *product((World(one_kind=True),), (4, 6, 10, 20), (1, 8)),
)
# how many times as many reports on a cell, where one of its rates was 5 % or more with the usual number
LOOKED_AT_LONGER = {
    (NULL_WORLDS[0], 20, 1): 10,
    (NULL_WORLDS[0], 20, 2): 10,
    (NULL_WORLDS[0], 40, 2): 5,
    (NULL_WORLDS[2], 20, 2): 5,
    (NULL_WORLDS[2], 40, 2): 5,
    (World(one_kind=True), 20, 1): 5,
}
# what is claimed, and the words of the sentences that claim it
WORDS = {
    "better than chance": "better than chance",
    "the wrong way round": "the wrong way round",
    "above magnitude": "it is above magnitude",
    "below magnitude": "it is below magnitude",
    "best": "it is the best of",
    "no agreement": "there is no agreement beyond",
}


def sentences(
    scores: np.ndarray, effects: np.ndarray, layers: np.ndarray, inclusion: np.ndarray | float = np.nan
) -> str:
    """What a report says of the agreement of these metrics over these layers.

    The last metric is magnitude, the first one the primary analysis.

    Args:
        scores: log scores, (M, all layers).
        effects: delta_nll, (M, all layers).
        layers: positions of those that are measured, (n,).
        inclusion: the probability of each of these, (n,).
    """
    metrics = [f"metric_{number}" for number in range(len(scores) - 1)] + ["magnitude"]
    columns = {"perturbation": "zero", "k": 100, "seed": pd.NA, "ci_low": np.nan, "ci_high": np.nan}
    parts = [
        pd.DataFrame({"target_layer": NAMES[layers], "score_sum": np.exp(x[layers]), "delta_nll": y[layers]}).assign(
            selection=f"top_{metric}", **columns
        )
        for metric, x, y in zip(metrics, scores, effects, strict=True)
    ]
    table = pd.concat(parts, ignore_index=True).astype({"seed": "Int64"})
    targets = pd.DataFrame(
        {"target_layer": NAMES[layers], "inclusion": inclusion, "role": "control", "n_layers": N_LAYERS}
    )
    primary = Primary("layers", metrics[0], "zero", 100)
    evidence = Evidence(
        validation_manifest={},
        discovery_manifest={"metrics": {"magnitude": {"baseline": True}}},
        discovery_folder=Path(),
        measurements=table,
        targets=targets,
        correlations=correlate(table, targets=targets, primary=primary, n_resamples=N_RESAMPLES),
        top_weights={},
        summaries={},
    )
    return " ".join([verdict_on_layers(evidence), *exploratory(evidence)])


def said(world: World, n: int, n_metrics: int, replications: int, purpose: str) -> list[str]:
    """The sentences of so many reports over ``n`` layers drawn by the first metric's score."""
    rng = generator(purpose, world, world.rho, n, n_metrics)
    texts = []
    for _ in range(replications):
        scores, effects = world.draw(rng, n_metrics)
        layers = np.arange(N_DEPTHS if world.one_kind else N_LAYERS)
        drawn = layers[draw_layers(scores[0][layers], list(KINDS[layers]), n, rng).chosen]
        texts.append(sentences(scores, effects, drawn))
    return texts


def rates_of(
    texts: Sequence[str], world: str, setting: str, claims: Sequence[str], band: tuple[float, float]
) -> Iterator[Rate]:
    """How often each claim stands in the sentences."""
    for name in claims:
        yield Rate(f"{world}: {name}", setting, np.array([WORDS[name] in text for text in texts]), band)


@claim(
    "layers, metrics",
    fast={"cases": ((NULL_WORLDS[1], 20, 2), (NULL_WORLDS[2], 20, 2)), "longer": {}},
    cost=50,
)
def noise(
    replications: int, cases: tuple = NULL_CASES, longer: Mapping[tuple, int] = MappingProxyType(LOOKED_AT_LONGER)
) -> Iterator[Rate]:
    """A report on scores of noise claims nothing.

    Of 211 layers (7 kinds of matrix at 30 depths, and an embedding) some are measured by 1 to 8 metrics. Own kinds,
    same kinds: 45 % of the variance of score and effect lies between kinds, in ways that have nothing to do with each
    other or in the same way; depth: 15 % lie between depths, independently (rough) or as a random walk (smooth).
    Infinite: so many of the losses overflow, and tie.
    200 reports a cell; 2,000 of independent layers with 20, 1 and 20, 2; 1,000 of those with 40, 2, of half infinite
    losses with 20, 2 and 40, 2, and of one kind with 20, 1.
    """
    for case in cases:
        world, n, n_metrics = case
        texts = said(world, n, n_metrics, longer.get(case, 1) * replications, "noise")
        claims = ["better than chance", "the wrong way round"]
        claims += ["above magnitude", "below magnitude", "best"] if n_metrics > 1 else []
        yield from rates_of(texts, str(world), f"{n}, {n_metrics}", claims, FALSE)


@claim("certain + drawn", fast={"cases": (("a score that follows both", 0.0, 5, 35),)}, cost=50)
def certain_layers(
    replications: int,
    cases: tuple = tuple(
        (chosen_by, rho, *numbers)
        for chosen_by, rho, numbers in product(
            ("its own score", "a score that follows both"), (0.0, 0.5), ((0, 40), (5, 15), (5, 35), (20, 20), (40, 40))
        )
    ),
) -> Iterator[Rate]:
    """A report on scores of noise claims nothing of the model where the highest layers were certain.

    Some layers are the highest by a score, the others are drawn; each is weighted by the inverse of its probability.
    The score that chooses is that of the metric itself, or another one that follows both it and the effect: among the
    highest by that one, the two are related where they are not in the model. 211 layers of kinds that differ in ways
    of their own, with a smooth course over depth; rho 0.5 within kinds beside it, for the power. 200 reports a cell.
    """
    for chosen_by, rho, n_certain, n_drawn in cases:
        rng = generator("certain layers", chosen_by, rho, n_certain, n_drawn)
        texts = []
        for _ in range(replications):
            scores, effects = World(rho=rho, alike="own kinds", depth="smooth").draw(rng)
            chooser = scores[0]
            if chosen_by != "its own score":
                chooser = scores[0] + effects[0] + 0.7 * rng.normal(size=N_LAYERS)
            order = np.argsort(-chooser)
            others = np.sort(order[n_certain:])
            drawn = draw_layers(chooser[others], list(KINDS[others]), n_drawn, rng)
            inclusion = np.append(np.ones(n_certain), drawn.inclusion)
            layers = np.append(order[:n_certain], others[drawn.chosen])
            texts.append(sentences(scores, effects, layers, inclusion))
        claims = ["better than chance", "the wrong way round"] if rho == 0 else ["better than chance"]
        world, setting = f"rho {rho:g}, certain by {chosen_by}", f"{n_certain} + {n_drawn}"
        yield from rates_of(texts, world, setting, claims, FALSE if rho == 0 else ANY)


@claim("layers, metrics", fast={"cases": ((0.5, 40, 2),)}, cost=50)
def equal_metrics(
    replications: int, cases: tuple = tuple(product((0.5, 0.9), (20, 40, 211), (2, 5)))
) -> Iterator[Rate]:
    """A report on metrics that agree equally well with the effect calls none of them best.

    Score and effect of every metric agree by the same rho within kinds; the kinds differ in ways of their own. 200
    reports a cell.
    """
    for rho, n, n_metrics in cases:
        world = World(rho=rho, alike="own kinds")
        texts = said(world, n, n_metrics, replications, "equal metrics")
        claims = ["above magnitude", "below magnitude", "best"]
        yield from rates_of(texts, f"rho {rho:g}", f"{n}, {n_metrics}", claims, FALSE)


@claim("layers, metrics", fast={"cases": ((0.77, 20, 1),)}, cost=50)
def power(
    replications: int, cases: tuple = tuple(product((0.3, 0.5, 0.77), (10, 20, 30, 40, 60, 100), (1,)))
) -> Iterator[Rate]:
    """A report claims an agreement that is there.

    Independent layers of 7 kinds, one metric, named beforehand. 200 reports a cell.
    """
    for rho, n, n_metrics in cases:
        texts = said(World(rho=rho), n, n_metrics, replications, "power")
        band = (0.85, 1.0) if rho == 0.77 and n >= 20 else ANY
        yield from rates_of(texts, f"rho {rho:g}", f"{n}, {n_metrics}", ["better than chance"], band)
