import numpy as np
import pandas as pd
import pytest
from bridge.analysis.measured_sets import (
    first_row,
    infinite_where_undefined,
    random_effects,
    rows_where,
    single_layers,
    text_effects,
    top_sets,
)

COLUMNS = ["target_layer", "selection", "perturbation", "k", "delta_nll"]
MEASUREMENTS = pd.DataFrame(
    [
        ("b", "top_obd", "zero", 2, np.nan),
        ("b", "random", "zero", 2, 0.5),
        ("ALL", "top_grad_x_weight", "zero", 1, -1.0),
        ("b", "random", "zero", 2, np.nan),
        ("b", "bottom_obd", "zero", 2, 7.0),
        ("b", "random", "zero", 1, 0.25),
        ("a", "random", "zero", 2, 0.75),
        ("b", "weight", "zero", 1, 8.0),
        ("b", "random", "sign_flip", 2, 9.0),
    ],
    columns=COLUMNS,
)


def test_rows_hold_every_value_and_the_first_of_them_comes_first():
    assert rows_where(MEASUREMENTS, target_layer="b", k=2).index.tolist() == [0, 1, 3, 4, 8]
    assert rows_where(MEASUREMENTS).index.tolist() == list(range(9))
    assert first_row(MEASUREMENTS, target_layer="b", selection="random").name == 1
    assert first_row(MEASUREMENTS, target_layer="b", selection="weight").name == 7
    assert first_row(MEASUREMENTS, target_layer="c") is None
    assert single_layers(MEASUREMENTS).index.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]


def test_top_sets_name_their_metric_and_an_undefined_effect_is_infinite():
    tops = top_sets(MEASUREMENTS)
    assert tops[["target_layer", "metric", "delta_nll"]].to_numpy().tolist() == [
        ["b", "obd", np.inf],
        ["ALL", "grad_x_weight", -1.0],
    ]
    assert infinite_where_undefined(pd.Series([np.nan, -np.inf, 2, "3"])).tolist() == [np.inf, np.inf, 2.0, 3.0]


def test_random_effects_are_kept_draw_by_draw():
    effects = {key: values.tolist() for key, values in random_effects(MEASUREMENTS).items()}
    assert effects == {
        ("b", "zero", 2): [0.5, np.inf],
        ("b", "zero", 1): [0.25],
        ("a", "zero", 2): [0.75],
        ("b", "sign_flip", 2): [9.0],
    }


def losses() -> pd.DataFrame:
    """Two sequences of text 8 and one of text 5: layer b with one loss each, layer a with one for each of two seeds."""
    keys = {"selection": "top_obd", "perturbation": "zero", "k": 2}
    rows = [
        {"target_layer": layer, "seed": seed, "sequence": sequence, "perturbed_nats": after} | keys
        for layer, seed, nats in (("b", None, [15.0, 27, 38]), ("a", 1, [12.0, 24, 36]), ("a", 0, [10.0, 22, 30]))
        for sequence, after in enumerate(nats)
    ]
    table = pd.DataFrame(rows).astype({"seed": "Int64"})
    before, tokens, texts = np.array([10.0, 20, 30]), np.array([3, 4, 6]), np.array([8, 5, 8])
    at = table["sequence"].to_numpy()
    return table.assign(baseline_nats=before[at], n_tokens=tokens[at], cluster=texts[at])


def test_effects_on_texts_are_sums_over_their_sequences_and_means_over_seeds():
    own = losses()
    others = [own.assign(perturbed_nats=99.0, **{key: value}) for key, value in OTHERS.items()]
    table = pd.concat([*others, own]).sample(frac=1, random_state=0)
    effects, n_tokens = text_effects(table, "top_obd", "zero", 2)
    assert (effects.index.tolist(), effects.columns.tolist()) == (["a", "b"], [5, 8])
    assert effects.to_numpy().tolist() == [[(4 + 2) / 2, (2 + 6 + 0 + 0) / 2], [7.0, 5.0 + 8.0]]
    assert n_tokens.tolist() == [4.0, 9.0]


OTHERS = {"selection": "random", "perturbation": "sign_flip", "k": 1}


def test_without_clusters_every_sequence_is_a_text_and_a_loss_that_is_missing_is_no_zero():
    table = losses().drop(columns="cluster")
    effects, n_tokens = text_effects(table, "top_obd", "zero", 2)
    assert effects.to_numpy().tolist() == [[1.0, 3.0, 3.0], [5.0, 7.0, 8.0]]
    assert n_tokens.tolist() == [3.0, 4.0, 6.0]
    table.loc[1, "perturbed_nats"] = np.nan
    effects, _ = text_effects(table, "top_obd", "zero", 2)
    assert effects.loc["b"].tolist() == pytest.approx([5.0, np.nan, 8.0], nan_ok=True)
