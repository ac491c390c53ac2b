"""A made-up validation of 30 layers: tables as discovery and the instrument would write them."""

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from bridge.analysis.correlation import correlate
from bridge.analysis.primary_analysis import Primary
from bridge.exchange.tables import COMPARISONS
from bridge.report.evidence import Evidence

METRICS = ("grad_x_weight", "magnitude", "obd")
PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BASELINE_NLL = 3.612


DEFINITIONS = {
    "grad_x_weight": {"formula": "|θ · ∂L/∂θ|", "unit": "nats per token", "source": "Molchanov et al. 2019"},
    "obd": {"formula": "½ θ² h", "unit": "nats per token", "source": "LeCun et al. 1990"},
    "magnitude": {"formula": "|θ|", "unit": "", "source": "", "baseline": True},
}


def points(n, seed, ties=False):
    """Two related vectors of length n."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n), rng.normal(size=n)
    y = y + 0.7 * x
    return (np.round(x), np.round(y)) if ties else (x, y)


def evidence_of(table: pd.DataFrame, sampled=None, chosen=None, single_weights=None, **changes) -> Evidence:
    """All that a report of these measurements is made from; ``chosen``: the table TARGETS."""
    chosen = targets(12, 12) if chosen is None else chosen
    metrics = table["selection"][table["selection"].str.startswith("top_")].str.removeprefix("top_").unique()
    parts = {
        "validation_manifest": manifest("validation"),
        "discovery_manifest": manifest(),
        "discovery_folder": Path("outputs/critical_analysis_1"),
        "top_weights": {metric: top_weights() for metric in metrics},
        "summaries": {metric: summary() for metric in metrics},
    }
    if "correlations" not in changes:
        primary = primary_of(table)
        tables = {"targets": chosen, "sampled": sampled, "single_weights": single_weights}
        parts["correlations"] = correlate(table, primary=primary, **tables)
    parts["comparisons"] = comparisons(table)
    return Evidence(measurements=table, targets=chosen, sampled=sampled, **(parts | changes))


def primary_of(table: pd.DataFrame) -> Primary:
    """The first metric that is not magnitude, under the first perturbation at its largest k, over layers."""
    tops = table["selection"][table["selection"].str.startswith("top_")].str.removeprefix("top_")
    metrics = [metric for metric in dict.fromkeys(tops) if metric != "magnitude"] or ["magnitude"]
    first = table["perturbation"].iloc[0]
    return Primary("layers", metrics[0], first, int(table["k"][table["perturbation"] == first].max()))


def comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """Every top set against the random ones of its target, as the instrument would write it (table COMPARISONS)."""
    rows = []
    for top in table[table["selection"].str.startswith("top_")].itertuples():
        same = (table["target_layer"] == top.target_layer) & (table["perturbation"] == top.perturbation)
        draws = table[same & (table["k"] == top.k) & (table["selection"] == "random")]["delta_nll"].to_numpy(float)
        effect, draws = (np.where(np.isfinite(d), d, np.inf) for d in (top.delta_nll, draws))
        if len(draws):
            difference = effect - draws.mean() if np.isfinite(draws).all() else np.nan
            row = {"target_layer": top.target_layer, "selection": top.selection, "perturbation": top.perturbation}
            row |= {"k": top.k, "control": "random", "n_draws": len(draws), "delta_nll": float(effect)}
            row |= {"control_mean": draws.mean(), "control_low": draws.min(), "control_high": draws.max()}
            row |= {"difference": difference, "ci_low": difference - 0.1, "ci_high": difference + 0.1, "n_eff": 50.0}
            row |= {"n_beaten": int((effect > draws).sum()), "p_value": np.nan, "note": "no p"}
            shares = float(np.isinf(effect)), float(np.isinf(draws).mean())
            rows.append(row | {"unbounded_share": shares[0], "control_unbounded_share": shares[1]})
    return pd.DataFrame(rows, columns=list(COMPARISONS.columns))


@cache
def evidence_of_two_perturbations() -> tuple[Evidence, dict[str, Evidence]]:
    """Four layers at two k and eight weights, all zeroed and then with their signs flipped; and each of these alone."""
    metrics, both = ("grad_x_weight", "magnitude"), ("zero", "sign_flip")
    weights, chosen = sampled(8, metrics), targets(4, 4)

    def of(table: pd.DataFrame) -> Evidence:
        rows = correlate(table, targets=chosen, sampled=weights, primary=primary_of(table), n_resamples=200)
        return evidence_of(table, weights, chosen, correlations=rows)

    table = with_single_weights(measurements(4, metrics, (1, 100), perturbations=both), weights, perturbations=both)
    return of(table), {each: of(table[table["perturbation"] == each]) for each in both}


def evidence(
    n=12, n_control=None, metrics=("grad_x_weight", "magnitude"), sampled=None, single_weights=None, **choices
) -> Evidence:
    """All that a report of a made-up validation of ``n`` layers is made from; ``n_control`` of them, or all, drawn."""
    table = measurements(n=n, metrics=metrics, **choices)
    if sampled is not None:
        table = with_single_weights(table, sampled)
    return evidence_of(table, sampled, targets(n, n if n_control is None else n_control), single_weights)


def layer_names(n: int = 30) -> list[str]:
    return [f"model.layers.{i // 2}.{PARTS[(3 * i + i // 7) % 5]}" for i in range(n)]


def measurements(
    n: int = 30, metrics=METRICS, ks=(100,), seeds=(0, 1, 2), seed=7, with_all=True, perturbations=("zero",)
) -> pd.DataFrame:
    """Every layer under every perturbation, one perturbation after the other, each with effects of its own."""
    rng = np.random.default_rng(seed)
    strength = np.exp(rng.normal(-5.5, 1.8, size=n))
    noise = {"grad_x_weight": 0.5, "obd": 0.9, "magnitude": 3.0}
    rows = []
    targets = list(zip(layer_names(n), strength, strict=True)) + ([("ALL", 9.0)] if with_all else [])
    for perturbation, (target, effect), k in product(perturbations, targets, ks):
        share = (k / max(ks)) ** 0.4
        for metric in metrics:
            worked = effect * share * np.exp(rng.normal(0, 0.3)) * (0.02 if metric == "magnitude" else 1.0)
            score = effect * share * np.exp(rng.normal(0, noise[metric]))
            rows.append(_row(target, f"top_{metric}", k, None, score, worked, 0.12 * worked + 1e-4, perturbation))
        for draw in seeds:
            rows.append(_row(target, "random", k, draw, np.nan, rng.normal(0, 2e-4), 2e-4, perturbation))
        rows.append(_row(target, "bottom_grad_x_weight", k, None, 0.0, rng.normal(0, 1e-5), 1e-5, perturbation))
    return pd.DataFrame(rows).astype({"seed": "Int64"})


def _row(target, selection, k, seed, score, delta, half_width, perturbation="zero") -> dict:
    before, after = np.exp(BASELINE_NLL), np.exp(BASELINE_NLL + delta)
    return {
        "target_layer": target,
        "parameter": "ALL" if target == "ALL" else f"{target}.weight",
        "selection": selection,
        "perturbation": perturbation,
        "k": k,
        "seed": seed,
        "n_weights": k,
        "score_sum": score,
        "baseline_nll": BASELINE_NLL,
        "perturbed_nll": BASELINE_NLL + delta,
        "delta_nll": delta,
        "ci_low": delta - half_width,
        "ci_high": delta + half_width,
        "baseline_ppl": before,
        "perturbed_ppl": after,
        "delta_ppl": after - before,
        "n_tokens": 18211,
        "n_sequences": 100,
        "corpus_sha256": "ab" * 32,
        "model": "SmolLM2-135M-Instruct",
    }


def sampled(n: int = 40, metrics=METRICS, seed: int = 5) -> pd.DataFrame:
    """Weights of one matrix and one vector; the first metric predicts well, each further one worse."""
    rng = np.random.default_rng(seed)
    strength = np.sort(np.exp(rng.normal(-7, 2, n)))[::-1]
    vector = np.arange(n) % 5 == 4
    frame = pd.DataFrame(
        {
            "layer": np.where(vector, "model.norm", "model.layers.0.mlp.down_proj"),
            "row": range(n),
            "col": pd.array(np.arange(n) * 3, dtype="Int64"),
            "value": rng.normal(0, 1, n),
            "inclusion": 0.01,
        }
    )
    frame["col"] = frame["col"].mask(vector)
    frame.insert(1, "parameter", frame["layer"] + ".weight")
    for number, metric in enumerate(metrics):
        frame[f"score_{metric}"] = strength * np.exp(rng.normal(0, 0.3 + 3 * number, n))
    return frame


def with_single_weights(
    table: pd.DataFrame, weights: pd.DataFrame, seed: int = 6, perturbations=("zero",)
) -> pd.DataFrame:
    """Measurements and, after them, those of each weight alone; about half of these lower the loss."""
    rng = np.random.default_rng(seed)
    scores = weights[next(column for column in weights if column.startswith("score_"))]
    rows = []
    for perturbation, (weight, score) in product(perturbations, zip(weights.itertuples(), scores, strict=True)):
        delta = score * rng.choice([-1.0, 1.0]) * np.exp(rng.normal(0, 0.3))
        row = _row(weight.layer, "weight", 1, None, score, delta, abs(delta) / 5, perturbation)
        rows.append(row | {"parameter": weight.parameter, "row": weight.row, "col": weight.col})
    both = pd.concat([table.assign(row=None, col=None).astype(object), pd.DataFrame(rows).astype(object)])
    kinds = table.dtypes.to_dict() | {"row": "Int64", "col": "Int64"}
    return both.reset_index(drop=True).astype(kinds)


def targets(n: int = 30, n_control: int = 10) -> pd.DataFrame:
    names = layer_names(n)
    return pd.DataFrame(
        {
            "target_layer": [*names, "ALL"],
            "role": ["top"] * (n - n_control) + ["control"] * n_control + ["all"],
            "n_top": [*range(n, 0, -1), 100],
            "score_sum": [*np.linspace(2, 0.01, n), 30.0],
            "score_rank": [*range(1, n + 1), 0],
            "n_layers": 100,
            "inclusion": [1.0] * (n - n_control) + [n_control / (100 - n + n_control)] * n_control + [1.0],
        }
    )


def summary(n_layers: int = 15, width: int = 64, seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    rows = [_summary_row("model.embed_tokens", width * 100, rng)]
    for depth in range(n_layers):
        rows += [_summary_row(f"model.layers.{depth}.{part}", width * width, rng) for part in PARTS]
    return pd.DataFrame(rows)


def _summary_row(layer, n_weights, rng) -> dict:
    total = float(np.exp(rng.normal(0, 1.5)))
    return {
        "layer": layer,
        "parameter": f"{layer}.weight",
        "n_weights": n_weights,
        "score_sum": total,
        "score_mean": total / n_weights,
        "score_max": total / 20,
        "score_p99": total / 200,
        "in_top_100": 0,
    }


def top_weights(n_layers: int = 15, k: int = 100, seed: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = rng.choice(PARTS, size=k, p=[0.05, 0.1, 0.1, 0.15, 0.6])
    depths = np.minimum(rng.geometric(0.25, size=k) - 1, n_layers - 1)
    layers = [f"model.layers.{depth}.{part}" for depth, part in zip(depths, parts, strict=True)]
    return pd.DataFrame(
        {
            "rank": range(1, k + 1),
            "layer": layers,
            "parameter": [f"{layer}.weight" for layer in layers],
            "row": rng.integers(0, 64, k),
            "col": pd.array(rng.integers(0, 64, k), dtype="Int64"),
            "value": rng.normal(0, 2, k),
            "score": np.sort(rng.exponential(0.02, k))[::-1],
        }
    )


def manifest(kind: str = "critical_analysis", model: str = "SmolLM2-135M-Instruct", **identity) -> dict:
    return {
        "schema": 1,
        "kind": kind,
        "status": "complete",
        "argv": ["phase1_runner.py", "--model", model],
        "warnings": [],
        "identity": {
            "options": {"model": model, "packing": "documents", "max_length": 512, "topk": [100]},
            "model": {
                "id": model,
                "revision": "main",
                "dtype": "float32",
                "n_parameters": 134515008,
                "tied_groups": [["model.embed_tokens.weight", "lm_head.weight"]],
            },
            "corpus": {
                "source": "embedded texts",
                "packing": "documents",
                "max_length": 512,
                "n_texts": 100,
                "n_sequences": 100,
                "n_tokens": 18211,
                "n_short": 0,
                "text_sha256": "cd" * 32,
                "corpus_sha256": "ab" * 32,
            },
        }
        | identity,
        "metrics": DEFINITIONS,
        "started": "2026-01-05T10:00:00+0000",
        "ended": "2026-01-05T10:12:00+0000",
        "host": {"python": "3.11.9", "versions": {"torch": "2.13.0"}},
    }
