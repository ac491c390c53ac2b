import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.correlation import correlate
from bridge.analysis.layer_sample import draw_layers
from bridge.analysis.population_estimates import PopulationColumns, estimate_population
from bridge.exchange import layout
from bridge.exchange.tables import CORRELATIONS, read_table, write_table
from bridge.exchange.weight_sample import draw_probability, draw_weights
from scipy import stats


def frame(score, effect, inclusion) -> pd.DataFrame:
    return pd.DataFrame({"score_sum": score, "delta_nll": effect, "inclusion": inclusion}, dtype=float)


def test_of_a_census_the_estimate_is_the_figure_itself_and_nothing_is_uncertain():
    x, y = synthetic.points(200, seed=3)
    estimate = estimate_population(frame(x, y, 1.0))
    assert estimate.population_rho == pytest.approx(stats.spearmanr(x, y).statistic)
    assert np.isnan([estimate.population_low, estimate.population_high, estimate.population_p]).all()
    common = set(np.argsort(-x)[:20]) & set(np.argsort(-y)[:20])
    assert estimate.population_precision == pytest.approx(len(common) / 20)
    assert estimate.population_ratio == pytest.approx(y.sum() / x.sum())
    assert (estimate.n_effective, estimate.population_share) == (200, 0.1)


def test_a_unit_of_probability_one_third_counts_three_times():
    x, y = synthetic.points(40, seed=4)
    times = np.random.default_rng(0).integers(1, 4, 40)
    estimate = estimate_population(frame(x, y, 1 / times))
    repeated = stats.spearmanr(np.repeat(x, times), np.repeat(y, times)).statistic
    assert estimate.population_rho == pytest.approx(repeated)
    assert estimate.population_ratio == pytest.approx((times * y).sum() / (times * x).sum())
    assert estimate.n_effective == pytest.approx(times.sum() ** 2 / (times**2).sum())


@pytest.mark.parametrize("points", [frame([], [], []), frame([1], [2], [1]), frame([1, np.nan], [1, 2], [1, 1])])
def test_without_two_units_there_is_no_estimate(points):
    assert np.isnan(estimate_population(points)).all()


def test_two_units_give_an_estimate_without_an_interval():
    estimate = estimate_population(frame([1, 2], [5, 3], [0.5, 0.25]))
    assert estimate.population_rho == pytest.approx(-1)
    assert np.isnan([estimate.population_low, estimate.population_high]).all()


def test_columns_of_the_table_follow_each_row(tmp_path):
    weights = synthetic.sampled(40)
    table = synthetic.with_single_weights(synthetic.measurements(n=12), weights)
    chosen = weights.assign(inclusion=np.linspace(0.2, 1, 40), rank=range(1, 41), score=0.0)
    targets = synthetic.targets(12, 4).assign(inclusion=[1.0] * 8 + [0.25] * 4 + [1.0])
    correlations = correlate(table, targets=targets, sampled=weights, single_weights=chosen)
    for row in correlations.itertuples():
        expected = PopulationColumns()
        if row.unit == "weights":
            rows = table[table["selection"] == "weight"].reset_index(drop=True)
            merged = rows.astype({"row": "Int64", "col": "Int64"}).merge(chosen, on=layout.WEIGHT_KEY)
            expected = estimate_population(
                frame(merged[f"score_{row.metric}"], merged["delta_nll"].abs(), merged["inclusion"])
            )
        if row.unit == "layers":
            rows = table[(table["selection"] == f"top_{row.metric}") & (table["target_layer"] != "ALL")]
            rows = rows[(rows["k"] == row.k) & (rows["perturbation"] == row.perturbation)]
            merged = rows.merge(targets[["target_layer", "inclusion"]], on="target_layer")
            expected = estimate_population(frame(merged["score_sum"], merged["delta_nll"], merged["inclusion"]))
        found = [getattr(row, name) for name in PopulationColumns._fields]
        assert found == pytest.approx(list(expected), nan_ok=True)
        assert row.unit == "ablation_curve" or not np.isnan(row.population_rho)
    write_table(tmp_path / "correlations.csv", correlations, CORRELATIONS)
    assert list(read_table(tmp_path / "correlations.csv", CORRELATIONS)["population_rho"].dropna()) == list(
        correlations["population_rho"].dropna()
    )


@pytest.mark.slow
def test_order_of_the_rows_changes_no_digit():
    weights = synthetic.sampled(30)
    table = synthetic.with_single_weights(synthetic.measurements(n=12), weights)
    chosen = weights.assign(inclusion=np.linspace(0.2, 1, 30))
    names = list(PopulationColumns._fields)
    keys = ["unit", "metric", "perturbation", "k"]
    mixed = table.sample(frac=1, random_state=1)
    one, other = (
        correlate(rows, targets=synthetic.targets(12, 4), sampled=weights, single_weights=chosen)
        .sort_values(keys)[[*keys, *names]]
        .reset_index(drop=True)
        for rows in (table, mixed)
    )
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=0)


@pytest.fixture(scope="module")
def population():
    """20,000 weights: two scores, which agree with the effect equally well, and the ranks by both."""
    rng = np.random.default_rng(7)
    latent = rng.normal(size=20_000)
    effect = np.exp(latent + rng.normal(size=20_000))
    scores = np.stack([np.exp(2 * latent + 2 * rng.normal(size=20_000)) for _ in range(2)], axis=1)
    ranks = np.argsort(np.argsort(-scores, axis=0), axis=0) + 1.0
    return scores, effect, ranks


@pytest.mark.slow
@pytest.mark.parametrize("compared", [[0], [1], [0, 1]])
def test_intervals_cover_the_population_whichever_metrics_are_compared(population, compared):
    scores, effect, ranks = population
    n = len(effect)
    rng = np.random.default_rng([8, *compared])
    probability = draw_probability(ranks[:, compared], n)
    true = [stats.spearmanr(scores[:, metric], effect).statistic for metric in (0, 1)]
    assert true[0] == pytest.approx(true[1], abs=0.02)
    rhos, covered = [], []
    for _ in range(150):
        sample = draw_weights(probability, np.ones(n), 200, rng)
        chosen = sample.chosen
        estimates = [estimate_population(frame(scores[chosen, m], effect[chosen], sample.inclusion)) for m in (0, 1)]
        rhos.append([e.population_rho for e in estimates])
        covered.append([e.population_low <= rho <= e.population_high for e, rho in zip(estimates, true, strict=True)])
    assert np.mean(covered, axis=0).min() >= 0.90
    errors = np.mean(rhos, axis=0) - true
    assert np.abs(errors).max() < 3 * np.std(rhos, axis=0).max() / np.sqrt(150) + 0.01


def test_drawn_layers_speak_of_all_and_their_interval_covers():
    kinds = np.repeat(np.arange(7), 30)
    errors, covered = [], []
    for seed in range(200):
        rng = np.random.default_rng([seed, 9])
        score = rng.normal(size=210) + rng.normal(size=7)[kinds]
        effect = 0.5 * score + rng.normal(size=210) + rng.normal(size=7)[kinds]
        sample = draw_layers(score, [str(kind) for kind in kinds], 40, rng)
        estimate = estimate_population(frame(score[sample.chosen], effect[sample.chosen], sample.inclusion))
        true = stats.spearmanr(score, effect).statistic
        errors.append(estimate.population_rho - true)
        covered.append(estimate.population_low <= true <= estimate.population_high)
    assert np.mean(covered) >= 0.95
    assert abs(np.mean(errors)) < 0.02
