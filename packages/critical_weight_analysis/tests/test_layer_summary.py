import pytest
import torch
from bridge.exchange.tables import LAYER_SUMMARY
from critical_weight_analysis.layer_summary import Summary, p99
from critical_weight_analysis.ranking import Ranking
from reference import naive_p99


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 199, 200, 201, 1000])
@pytest.mark.parametrize("n_levels", [3, 10**6])
def test_p99_is_the_definition(n, n_levels):
    scores = torch.randint(n_levels, (n,), generator=torch.Generator().manual_seed(n)).float()
    assert p99(scores) == naive_p99(scores)


@pytest.mark.slow
def test_p99_of_more_elements_than_torch_quantile_takes():
    n = (1 << 24) + 3
    scores = torch.zeros(n)
    scores[-(n // 100) :] = 1  # as many as may lie above the percentile
    assert p99(scores) == 0
    scores[0] = 1
    assert p99(scores) == 1


def test_rows_in_the_given_order_with_counts_of_every_top():
    shapes = {"a.weight": (2, 2), "b.norm.weight": (3,), "c.weight": (1, 2)}
    scores = {
        "a.weight": torch.tensor([[1.0, 8.0], [2.0, 9.0]]),
        "b.norm.weight": torch.tensor([0.5, 0.25, 7.0]),
        "c.weight": torch.zeros(1, 2),
    }
    summary, ranking = Summary(list(shapes)), Ranking(shapes, 4)
    for name in reversed(scores):
        summary.update(name, scores[name])
        ranking.update(name, scores[name], scores[name])
    table = summary.table({k: ranking.top(k) for k in (1, 4)})
    assert list(table) == [*LAYER_SUMMARY.columns, "in_top_1", "in_top_4"]
    assert table.to_numpy().tolist() == [
        ["a", "a.weight", 4, 20.0, 5.0, 9.0, 9.0, 1, 3],
        ["b.norm", "b.norm.weight", 3, 7.75, 7.75 / 3, 7.0, 7.0, 0, 1],
        ["c", "c.weight", 2, 0.0, 0.0, 0.0, 0.0, 0, 0],
    ]


@pytest.mark.parametrize("shape", [(2, 2), (1, 2, 2)])
def test_rows_are_summed_in_their_own_dtype_and_their_sums_in_float64(shape):
    summary = Summary(["a.weight"])
    summary.update("a.weight", torch.tensor([2.0**24, 1.0, 0.0, 3.0]).view(shape))
    assert summary.table({})["score_sum"].item() == 2**24 + 3  # in float32 2^24 + 1 is 2^24


def test_sum_is_taken_in_float64():
    scores = torch.full((1 << 20,), 0.1, dtype=torch.float32)
    summary = Summary(["a.weight"])
    summary.update("a.weight", scores)
    assert summary.table({})["score_sum"].item() == pytest.approx(scores[0].item() * (1 << 20), rel=1e-12)
