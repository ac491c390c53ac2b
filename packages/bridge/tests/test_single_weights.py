from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.single_weights import choose_weights, weight_effects
from bridge.exchange.tables import MEASUREMENTS, SINGLE_WEIGHTS, read_table, write_table
from bridge.exchange.weight_sample import draw_probability, draw_weights, half_decade, half_decade_sizes


def shares(n=400, metrics=synthetic.METRICS):
    """Sampled weights whose ranks by each metric are a permutation of 1 to n, of a million weights each."""
    sampled = synthetic.sampled(n, metrics)
    for metric in metrics:
        order = sampled[f"score_{metric}"].rank(ascending=False)
        sampled[f"share_{metric}"] = 10 ** (-6 * (1 - (order - 1) / (n - 1)))
    return sampled


N = 1_000_000


@pytest.mark.parametrize("n", [1, 2, 10, 200, 399, 400, 1000])
def test_so_many_different_weights_the_highest_first(n):
    sampled = shares()
    chosen = choose_weights(sampled, ["obd"], n, N)
    assert list(chosen) == list(SINGLE_WEIGHTS.columns)
    assert len(chosen) == min(n, 400) and not chosen.duplicated(["parameter", "row", "col"]).any()
    assert chosen["rank"].tolist() == list(range(1, len(chosen) + 1))
    assert chosen["score"].is_monotonic_decreasing
    assert (chosen["inclusion"] <= 0.01).all() and (chosen["inclusion"] > 0).all()
    assert n < 400 or set(chosen["inclusion"]) == {0.01}  # as in the discovery: all are taken


@pytest.mark.parametrize("metrics", [["obd"], ["magnitude", "obd"]])
def test_every_half_decade_of_rank_is_there_by_every_metric_that_is_compared(metrics):
    n = 20_000
    sampled = synthetic.sampled(n).assign(inclusion=1.0)
    for metric in synthetic.METRICS:
        sampled[f"share_{metric}"] = sampled[f"score_{metric}"].rank(ascending=False) / n
    chosen = choose_weights(sampled, metrics, 240 * len(metrics), n).merge(sampled, on=["parameter", "row", "col"])
    for metric in metrics:
        counts = np.bincount(half_decade(chosen[f"share_{metric}"].to_numpy() * n), minlength=9)
        assert half_decade_sizes(n).tolist() == [3, 6, 22, 68, 217, 683, 2163, 6837, 10001]
        assert counts[:2].tolist() == [3, 6]  # certain
        assert counts[2:].min() >= 7  # at least 13 are expected


def test_rows_are_the_sampled_ones_and_the_draw_depends_on_the_seed():
    sampled = shares()
    chosen = choose_weights(sampled, ["magnitude"], 7, N)
    both = chosen.merge(sampled, on=["layer", "parameter", "row", "col", "value"])
    assert len(both) == 7
    assert both["score"].tolist() == both["score_magnitude"].tolist()
    assert choose_weights(sampled, ["magnitude"], 7, N).equals(chosen)
    probability = draw_probability(sampled[["share_magnitude"]].to_numpy() * N, N)
    rng = np.random.default_rng([0, *b"single weights"])
    drawn = draw_weights(probability, sampled["inclusion"].to_numpy(), 7, rng)
    expected = dict(zip(sampled["score_magnitude"].iloc[drawn.chosen], drawn.inclusion, strict=True))
    assert dict(zip(chosen["score"], chosen["inclusion"], strict=True)) == expected
    assert not choose_weights(sampled, ["magnitude"], 7, N, seed=1).equals(chosen)


def test_the_first_metric_gives_the_rank():
    sampled = shares(20)
    for metrics in (["obd", "magnitude", "grad_x_weight"], ["magnitude", "obd", "grad_x_weight"]):
        chosen = choose_weights(sampled, metrics, 9, N)
        scores = sampled.set_index("row").loc[chosen["row"], f"score_{metrics[0]}"]
        assert chosen["score"].tolist() == scores.tolist() == sorted(scores, reverse=True)


def test_equal_scores_stay_in_model_order():
    sampled = shares(9).assign(score_obd=1.0, share_obd=0.5)
    assert choose_weights(sampled, ["obd"], 9, N)["row"].tolist() == list(range(9))


def test_measurements_of_single_weights_come_back_from_their_file(tmp_path):
    with_weights = synthetic.with_single_weights(synthetic.measurements(n=2), synthetic.sampled())
    write_table(tmp_path / "measurements.csv", with_weights, MEASUREMENTS)
    back = read_table(tmp_path / "measurements.csv", MEASUREMENTS)
    sampled = synthetic.sampled()
    pd.testing.assert_frame_equal(weight_effects(back, sampled), weight_effects(with_weights, sampled))


def test_no_effects_without_single_weights_or_without_their_scores():
    sampled, layers = synthetic.sampled(), synthetic.measurements(n=2)
    assert weight_effects(layers, sampled).empty
    assert weight_effects(synthetic.with_single_weights(layers, sampled), None).empty


def test_seeds_of_one_weight_are_one_effect_of_mean_size():
    sampled = synthetic.sampled(6, metrics=("obd",))
    once = synthetic.with_single_weights(synthetic.measurements(n=1, metrics=("obd",)), sampled)
    weights = once[once["selection"] == "weight"]
    twice = pd.concat([weights.assign(seed=0), weights.assign(seed=1, delta_nll=-3 * weights["delta_nll"])])
    effects = weight_effects(twice, sampled)
    columns = "perturbation parameter row col delta_nll ci_low ci_high size value score_obd"
    assert list(effects) == columns.split()
    assert effects["size"].tolist() == pytest.approx((2 * weights["delta_nll"].abs()).tolist())
    assert effects["delta_nll"].tolist() == pytest.approx((-weights["delta_nll"]).tolist())


def test_the_mean_over_seeds_has_the_same_digits_in_any_order_of_the_rows():
    sampled = synthetic.sampled(6, metrics=("obd",))
    table = synthetic.with_single_weights(synthetic.measurements(n=1, metrics=("obd",)), sampled)
    weights = table[table["selection"] == "weight"]
    seeds = [weights.assign(seed=seed, delta_nll=delta) for seed, delta in enumerate([1e16, 1.0, -1e16])]
    means = {weight_effects(pd.concat(rows), sampled)["delta_nll"].iloc[0] for rows in permutations(seeds)}
    assert len(means) == 1
