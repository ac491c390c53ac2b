"""What the numbers of a validation do not show, in sentences."""

import numpy as np
import pandas as pd

from bridge.analysis.claims import LEVEL, MIN_UNITS
from bridge.analysis.measured_sets import rows_where
from bridge.analysis.rank_agreement import ROUGH_UNITS
from bridge.analysis.targets import RANGE_NOTE, is_restricted
from bridge.report.evidence import Evidence
from bridge.report.number_format import number, plural
from bridge.report.phrases import DRAWS_NEEDED

SAME = 0.95  # Jaccard overlap above which two halves of the texts name all but the same weights
FEW_TEXTS = 6  # below which the instrument gives no interval
MANY_WEIGHTS = 20  # from which on single weights are said to cover the ranks


def caveats(evidence: Evidence) -> list[str]:
    """What the numbers do not show."""
    return [
        *_choice_of_units(evidence),
        *_few_texts(evidence),
        *_measurements(evidence),
        *_random_draws(evidence),
        _texts(evidence),
        *_tied_tensors(evidence),
        *_stability(evidence),
        *_warnings(evidence),
    ]


def _choice_of_units(evidence: Evidence) -> list[str]:
    """Which layers and weights were chosen, and what that does to the agreement."""
    sentences = []
    n_weights = evidence.weight_correlations["n"].max()
    if n_weights > 0:
        covered = "over every order of magnitude of rank" if n_weights >= MANY_WEIGHTS else "over the ranks"
        sentences.append(
            f"The {plural(int(n_weights), 'single weight')} were drawn {covered}: the highest scores are far more "
            "frequent than in the model, and rho over them is a figure of this design."
        )
    n_layers = evidence.layer_effects["target_layer"].nunique()
    if 0 < n_layers < MIN_UNITS:
        layers = plural(n_layers, "layer")
        sentences.append(f"Only {layers} tested: rho has no interval, and nothing is claimed (at least {MIN_UNITS}).")
    elif 0 < n_layers < ROUGH_UNITS:
        sentences.append(f"Only {plural(n_layers, 'layer')} tested: the interval of rho is rough.")
    if is_restricted(evidence.targets):
        sentences.append(f"{RANGE_NOTE[0].upper()}{RANGE_NOTE[1:]}; layers from the whole range would be needed.")
    return sentences


def _few_texts(evidence: Evidence) -> list[str]:
    """How much damage the texts may have missed, and whether few of them make an effect."""
    table = evidence.measurements
    n_texts = int(table["n_clusters" if "n_clusters" in table else "n_sequences"].min())
    unseen = 1 - (1 - LEVEL) ** (1 / n_texts)
    sentences = [
        f"Damage that strikes fewer than {number(100 * unseen, 2)} % of texts may be unseen: "
        f"{plural(n_texts, 'text')} may all have missed it, and no interval covers it then."
    ]
    if n_texts < FEW_TEXTS:
        sentences.append(f"With {plural(n_texts, 'text')} no interval of an effect is given (at least {FEW_TEXTS}).")
    if "few_texts_decide" in table:
        few = pd.to_numeric(table["few_texts_decide"]).fillna(0) > 0
        if few.any():
            sentences.append(
                f"In {few.sum()} of {plural(len(table), 'measurement')} fewer than a quarter of the texts make the "
                "effect; other texts may show a much larger or smaller one."
            )
    return sentences


def _measurements(evidence: Evidence) -> list[str]:
    """Losses that overflowed, targets that are too small."""
    sentences = []
    table = evidence.measurements
    n_infinite = int((~np.isfinite(table["delta_nll"])).sum())
    if n_infinite:
        sentences.append(
            f"Measurements whose loss became infinite or undefined: {n_infinite} of {len(table)} "
            f"({number(100 * n_infinite / len(table), 2)} %); they rank as the largest effect."
        )
    n_small = table[table["n_weights"] < table["k"]]["target_layer"].nunique()
    if n_small:
        sentences.append(f"In {plural(n_small, 'target')} fewer than k weights were perturbed, as no more are there.")
    if "n_changed" in table:
        n_same = table[table["n_changed"] < table["n_weights"]]["target_layer"].nunique()
        if n_same:
            targets = plural(n_same, "target")
            sentences.append(
                f"In {targets} some of the chosen weights have the same value under the perturbation, such as zeros "
                "that are zeroed: columns n_weights and n_changed of measurements.csv."
            )
    return sentences


def _random_draws(evidence: Evidence) -> list[str]:
    """Too few random draws for a p-value of a single layer."""
    n_draws = evidence.top_against_random["n_random"]
    if n_draws.empty or n_draws.min() >= DRAWS_NEEDED:
        return []
    fewest = int(n_draws.min())
    sentence = f"At least one target has only {plural(fewest, 'random draw')}"
    if fewest:
        smallest_p = number(1 / (fewest + 1), 2)
        sentence += (
            f"; with {fewest} no p-value of a single layer can be below {smallest_p} ({DRAWS_NEEDED} are needed)"
        )
    return [f"{sentence}."]


def _texts(evidence: Evidence) -> str:
    """Whether scores and effects come from the same texts."""
    if not evidence.judged_by_other_texts:
        return "Scores and effects come from the same texts; on other texts the agreement may be lower."
    return "The effects were measured on other token sequences than the scores were computed on."


def _tied_tensors(evidence: Evidence) -> list[str]:
    tied_groups = evidence.model.get("tied_groups")
    if not tied_groups:
        return []
    groups = "; ".join(" = ".join(map(str, group)) for group in tied_groups)
    return [f"Tied tensors count as one parameter, under their first name: {groups}."]


def _stability(evidence: Evidence) -> list[str]:
    """How far the top-K itself depends on the texts, where the discovery measured it."""
    if evidence.stability is None:
        return []
    rows = rows_where(evidence.stability, kind="halves", metric=evidence.metric)
    if rows.empty:
        return []
    smallest_k = rows["k"].min()
    rows = rows_where(rows, k=smallest_k)
    low, high = rows["jaccard"].min(), rows["jaccard"].max()
    overlap = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    by_null = number(rows["jaccard_null"].mean(), 2)
    by_chance = number(rows["jaccard_chance"].iloc[0], 2)
    depends = "hardly depends" if low > SAME else "depends"
    return [
        f"Which weights are critical {depends} on the texts: the top {smallest_k} by {evidence.metric} of two random "
        f"halves of them have a Jaccard overlap of {overlap} ({plural(len(rows), 'split')}; 1 would be the same, "
        f"the same weights with gradients of other weights give {by_null}, random sets {by_chance})."
    ]


def _warnings(evidence: Evidence) -> list[str]:
    """The warnings that the two runs recorded."""
    manifests = {"discovery": evidence.discovery_manifest, "validation": evidence.validation_manifest}
    return [
        f"Warning of the {name}: {warning}"
        for name, manifest in manifests.items()
        for warning in manifest.get("warnings") or []
    ]
