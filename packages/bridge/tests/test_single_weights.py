import numpy as np
import pandas as pd
import pytest
import synthetic
from bridge.analysis.single_weights import choose_weights, sampled_metrics
from bridge.exchange.tables import TOP_WEIGHTS


def test_metrics_are_those_of_the_columns():
    assert sampled_metrics(synthetic.sampled()) == list(synthetic.METRICS)


def shares(n=400, metrics=synthetic.METRICS):
    """Sampled weights whose ranks by each metric are a permutation of 1 to n, of a million weights each."""
    sampled = synthetic.sampled(n, metrics)
    for metric in metrics:
        order = sampled[f"score_{metric}"].rank(ascending=False)
        sampled[f"share_{metric}"] = 10 ** (-6 * (1 - (order - 1) / (n - 1)))
    return sampled


@pytest.mark.parametrize("n", [1, 2, 3, 10, 39, 200, 399, 400, 1000])
def test_so_many_different_weights_the_highest_first(n):
    sampled = shares()
    chosen = choose_weights(sampled, ["obd"], n)
    assert list(chosen) == list(TOP_WEIGHTS.columns)
    assert len(chosen) == min(n, 400) and not chosen.duplicated(["parameter", "row", "col"]).any()
    assert chosen["score"].iloc[0] == sampled["score_obd"].max()
    assert n == 1 or chosen["score"].iloc[-1] == sampled["score_obd"].min()
    assert chosen["rank"].tolist() == list(range(1, len(chosen) + 1))
    assert chosen["score"].is_monotonic_decreasing


@pytest.mark.parametrize("metrics", [["obd"], list(synthetic.METRICS), list(synthetic.METRICS)[::-1]])
def test_every_decade_of_rank_is_there_by_every_metric(metrics):
    sampled = shares()
    # as a discovery samples: the head is crowded, the rest is thin
    crowded = pd.concat([sampled.nsmallest(150, f"share_{metrics[0]}"), sampled.iloc[::7]]).drop_duplicates()
    chosen = choose_weights(crowded, metrics, 60).merge(sampled, on=["parameter", "row", "col"])
    for metric in metrics:
        decades = np.floor(np.log10(chosen[f"share_{metric}"]) - 1e-9).value_counts()
        assert set(range(-6, 0)) <= set(decades.index)
        assert decades[[-6, -5, -4, -3, -2, -1]].min() >= 60 // len(metrics) // 10
        assert chosen[f"score_{metric}"].max() == crowded[f"score_{metric}"].max()


def test_rows_are_the_sampled_ones():
    sampled = shares()
    chosen = choose_weights(sampled, ["magnitude"], 7)
    both = chosen.merge(sampled, on=["layer", "parameter", "row", "col", "value"])
    assert len(both) == 7
    assert both["score"].tolist() == both["score_magnitude"].tolist()


def test_equal_scores_stay_in_model_order():
    sampled = shares(9).assign(score_obd=1.0, share_obd=0.5)
    assert choose_weights(sampled, ["obd"], 3)["row"].tolist() == [0, 1, 2]
