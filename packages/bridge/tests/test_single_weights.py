from itertools import pairwise

import pandas as pd
import pytest
import synthetic
from bridge.records import TOP_WEIGHTS
from bridge.single_weights import choose_weights, sampled_metrics


def test_metrics_are_those_of_the_columns():
    assert sampled_metrics(synthetic.sampled()) == list(synthetic.METRICS)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 39, 40, 41, 1000])
def test_weights_span_the_whole_range_of_ranks_from_the_highest(n):
    sampled = synthetic.sampled()
    chosen = choose_weights(sampled, "obd", n)
    assert list(chosen) == list(TOP_WEIGHTS.columns)
    ranks = sampled["score_obd"].rank(ascending=False).astype(int)
    place = {(w.parameter, w.row): rank for w, rank in zip(sampled.itertuples(), ranks, strict=True)}
    found = [place[w.parameter, w.row] for w in chosen.itertuples()]
    assert found == sorted(set(found)) and len(found) == min(n, 40)
    assert found[0] == 1 and (n == 1 or found[-1] == 40)
    steps = {b - a for a, b in pairwise(found)}
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert chosen["rank"].tolist() == list(range(1, len(found) + 1))
    assert chosen["score"].is_monotonic_decreasing


def test_rows_are_the_sampled_ones():
    sampled = synthetic.sampled()
    chosen = choose_weights(sampled, "magnitude", 7)
    both = chosen.merge(sampled, on=["layer", "parameter", "row", "col", "value"])
    assert len(both) == 7
    assert both["score"].tolist() == both["score_magnitude"].tolist()


def test_equal_scores_stay_in_model_order():
    sampled = synthetic.sampled(9).assign(score_obd=1.0)
    assert choose_weights(sampled, "obd", 3)["row"].tolist() == [0, 4, 8]
    pd.testing.assert_frame_equal(choose_weights(sampled, "obd", 3), choose_weights(sampled, "obd", 3))
