"""What the numbers of a validation do not show, in sentences."""

import numpy as np

from bridge.analysis.correlation import BASELINE, RANGE_NOTE, is_restricted, top_against_random
from bridge.analysis.rank_agreement import ROUGH_POINTS
from bridge.report.number_format import number, plural
from bridge.report.sentences import Evidence, identity

FEW_SEQUENCES = 10
FEW_DRAWS = 19  # the fewest with which a single layer's p-value can reach 0.05


def limits(found: Evidence) -> list[str]:
    """What the numbers do not show."""
    return [*_limits_of_layers(found), *_limits_of_measuring(found), *_stability(found), *_warnings(found)]


def _limits_of_layers(found: Evidence) -> list[str]:
    texts = []
    n_weights = found.weight_correlations()["n"].max()
    if n_weights > 0:
        texts.append(
            f"The {plural(int(n_weights), 'single weight')} are of those that the discovery sampled, spread over every "
            "order of magnitude of rank: the highest scores are far more frequent than in a random sample."
        )
    n_layers = found.layer_effects()["target_layer"].nunique()
    if 0 < n_layers < ROUGH_POINTS:
        texts.append(f"Only {plural(n_layers, 'layer')} tested: the interval of rho is rough.")
    if is_restricted(found.targets):
        texts.append(f"{RANGE_NOTE[0].upper()}{RANGE_NOTE[1:]}; layers from the whole range would be needed.")
    if len([m for m in found.metrics() if m != BASELINE]) > 1:
        texts.append(
            f"{found.metric} is the best of {len(found.metrics())} metrics on these very data; the adjusted p-value "
            "accounts for the number of metrics, the interval of its rho does not."
        )
    return texts


def _limits_of_measuring(found: Evidence) -> list[str]:
    texts, table = [], found.measurements
    n_sequences = int(table["n_sequences"].min())
    if n_sequences < FEW_SEQUENCES:
        texts.append(f"Only {plural(n_sequences, 'sequence')}: the bootstrap intervals of the effects are too narrow.")
    infinite = int((~np.isfinite(table["delta_nll"])).sum())
    if infinite:
        texts.append(
            f"Measurements whose loss became infinite or undefined: {infinite}; they rank as the largest effect."
        )
    smaller = table[table["n_weights"] < table["k"]]["target_layer"].nunique()
    if smaller:
        texts.append(f"In {plural(smaller, 'target')} fewer than k weights were perturbed, as no more are there.")
    draws = top_against_random(table)["n_random"]
    if len(draws) and draws.min() < FEW_DRAWS:
        least = int(draws.min())
        floor = (
            f"; with {least} no p-value of a single layer can be below {number(1 / (least + 1), 2)}" if least else ""
        )
        texts.append(f"At least one target has only {plural(least, 'random draw')}{floor}.")
    texts.append(_same_texts(found))
    tied = identity(found.discovery_manifest, "model").get("tied_groups")
    if tied:
        groups = "; ".join(" = ".join(map(str, group)) for group in tied)
        texts.append(f"Tied tensors count as one parameter, under their first name: {groups}.")
    return texts


def _same_texts(found: Evidence) -> str:
    measured = set(found.measurements["corpus_sha256"])
    scored = identity(found.discovery_manifest, "corpus").get("corpus_sha256")
    if measured == {scored}:
        return "Scores and effects come from the same texts; on other texts the agreement may be lower."
    return "The effects were measured on other token sequences than the scores were computed on."


def _stability(found: Evidence) -> list[str]:
    """How far the top-K itself depends on the texts, where the discovery measured it."""
    if found.stability is None:
        return []
    rows = found.stability[(found.stability["kind"] == "halves") & (found.stability["metric"] == found.metric)]
    if rows.empty:
        return []
    rows = rows[rows["k"] == rows["k"].min()]
    low, high = rows["jaccard"].min(), rows["jaccard"].max()
    overlap = f"{low:.2f}" if len(rows) == 1 else f"{low:.2f} to {high:.2f}"
    return [
        f"Which weights are critical depends on the texts: the top {rows['k'].iloc[0]} by {found.metric} of two random "
        f"halves of them have a Jaccard overlap of {overlap} ({plural(len(rows), 'split')}; 1 would be the same, "
        f"chance gives {number(rows['jaccard_chance'].iloc[0], 2)})."
    ]


def _warnings(found: Evidence) -> list[str]:
    named = [("discovery", found.discovery_manifest), ("validation", found.validation_manifest)]
    return [f"Warning of the {name}: {text}" for name, manifest in named for text in manifest.get("warnings") or []]
