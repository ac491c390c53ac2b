import itertools
import operator

import pandas as pd
import pytest
import torch
from critical_weight_analysis import highest_scores
from critical_weight_analysis.highest_scores import kth_smallest, top_indices, where
from critical_weight_analysis.ranking import Ranking
from reference import naive_top

SHAPES = {"a.weight": (6, 5), "b.weight": (4,), "c.d.weight": (7, 3), "c.e.weight": (2, 3, 2), "f.weight": (1, 1)}
N = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def random_scores(n_levels, seed=0):
    """Scores of every parameter; few levels make many exact ties, within and across parameters."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randint(n_levels, shape, generator=generator).float() / n_levels  # noqa: E731
    return {name: draw(shape) for name, shape in SHAPES.items()}


def ranked(scores, k, names=None, per_layer=True):
    result = Ranking(SHAPES, k, per_layer)
    for name in names or SHAPES:
        result.update(name, -2 * scores[name], scores[name])
    return result


def lines(frame):
    assert frame["layer"].tolist() == [name.removesuffix(".weight") for name in frame["parameter"]]
    assert frame["value"].tolist() == [-2 * score for score in frame["score"]]
    cols = [None if pd.isna(col) else int(col) for col in frame["col"]]
    return list(zip(frame["parameter"], frame["row"], cols, frame["score"], strict=True))


def as_matrices(scores):
    return {name: s.flatten(1) if s.ndim > 2 else s for name, s in scores.items()}


@pytest.fixture(params=[3, 1 << 22])
def chunk(request, monkeypatch):
    monkeypatch.setattr(highest_scores, "_CHUNK", request.param)


@pytest.mark.parametrize("n_levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("k", [1, 2, 9, 30, N - 1, N])
@pytest.mark.parametrize("per_layer", [True, False])
def test_top_is_the_full_sort(chunk, n_levels, k, per_layer):
    scores = random_scores(n_levels)
    top = ranked(scores, k, per_layer=per_layer).top(k)
    assert top["rank"].tolist() == list(range(1, k + 1))
    assert lines(top) == naive_top(as_matrices(scores), k)


@pytest.mark.parametrize("k", [1, 4, 29, N])
def test_top_per_layer_is_the_full_sort_of_each_parameter(chunk, k):
    scores = random_scores(3)
    top = ranked(scores, k).top_per_layer(k)
    expected = [naive_top({name: tensor}, k) for name, tensor in as_matrices(scores).items()]
    assert lines(top) == list(itertools.chain(*expected))
    assert top["rank"].tolist() == [rank for part in expected for rank in range(1, len(part) + 1)]


def test_bound_is_the_lowest_score_of_a_full_top():
    result = Ranking(SHAPES, 3, per_layer=False)
    bounds = [result.bound]
    for name, scores in [("b.weight", [5.0, 1.0]), ("a.weight", [7.0]), ("f.weight", [4.0]), ("c.d.weight", [2.0])]:
        index = torch.arange(len(scores))
        result.add(name, index, torch.zeros(len(scores)), torch.tensor(scores, dtype=torch.float64))
        bounds.append(result.bound)
    assert bounds == [-torch.inf, -torch.inf, 1, 4, 4]


def test_smaller_k_is_the_beginning_of_a_larger_one():
    scores = random_scores(4)
    result = ranked(scores, 40)
    pd.testing.assert_frame_equal(result.top(7), result.top(40).head(7))
    small = result.top_per_layer(3)
    large = result.top_per_layer(40)
    pd.testing.assert_frame_equal(small, large[large["rank"] <= 3].reset_index(drop=True))


@pytest.mark.parametrize("per_layer", [True, False])
def test_order_of_updates_does_not_matter(per_layer):
    scores = random_scores(3, seed=4)
    expected = ranked(scores, 11, per_layer=per_layer).top(11)
    for names in itertools.permutations(SHAPES):
        pd.testing.assert_frame_equal(ranked(scores, 11, names, per_layer).top(11), expected)


def test_global_top_of_per_layer_rows_is_the_global_top():
    scores = random_scores(5, seed=2)
    result = ranked(scores, 10)
    rows = result.top_per_layer(10)
    best = rows.sort_values("score", ascending=False, kind="stable").head(10)
    columns = ["parameter", "row", "col"]
    assert best[columns].to_numpy().tolist() == result.top(10)[columns].to_numpy().tolist()


def test_column_is_empty_for_one_dimension_and_row_major_for_three():
    top = ranked(random_scores(10**6), N).top(N)
    assert top.loc[top["parameter"] == "b.weight", "col"].isna().all()
    assert sorted(top.loc[top["parameter"] == "b.weight", "row"]) == [0, 1, 2, 3]
    three = top[top["parameter"] == "c.e.weight"]
    assert set(zip(three["row"], three["col"], strict=True)) == set(itertools.product(range(2), range(6)))


def test_values_and_scores_keep_every_bit():
    weight = torch.tensor([[0.1, 1 / 3]], dtype=torch.bfloat16)
    score = torch.tensor([[0.1, 1e-40]], dtype=torch.float32)
    result = Ranking({"a.weight": (1, 2)}, 2)
    result.update("a.weight", weight, score)
    top = result.top(2)
    assert torch.equal(torch.tensor(top["value"].tolist()).bfloat16(), weight[0])
    assert torch.equal(torch.tensor(top["score"].tolist()).float(), score[0])


def test_weights_stored_out_of_order_are_found_at_their_index():
    scores = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    result = Ranking({"a.weight": (4, 3)}, 1)
    result.update("a.weight", scores * 10, scores)
    assert result.top_per_layer(1)[["row", "col", "value"]].to_numpy().tolist() == [[3, 2, 110.0]]


def test_top_indices_at_the_edge_of_a_chunk(monkeypatch):
    monkeypatch.setattr(highest_scores, "_CHUNK", 4)
    scores = torch.tensor([1.0, 2, 2, 1, 2, 3, 2, 2, 3, 2])
    assert top_indices(scores, 4).tolist() == [5, 8, 1, 2]
    assert top_indices(scores, 100).tolist() == [5, 8, 1, 2, 4, 6, 7, 9, 0, 3]


@pytest.mark.parametrize(("higher", "expected"), [([], [0, 1024, 2048]), ([70_000], [70_000, 0, 1024])])
def test_first_of_many_equal_scores_that_lie_in_different_chunks(monkeypatch, higher, expected):
    monkeypatch.setattr(highest_scores, "_CHUNK", 300)
    scores = torch.zeros(1 << 18)
    scores[::1024] = 1
    scores[higher] = 2
    assert top_indices(scores, 3).tolist() == expected


def test_first_of_equal_scores_where_few_are_lower():
    scores = torch.ones(1 << 18)
    scores[7] = 0
    assert top_indices(scores, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("entries", [[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 5.0, 0.0], [1.0, 1.0], [7.0]])
def test_kth_smallest(entries):
    values = torch.tensor(entries).reshape(1, -1)
    assert [kth_smallest(values, k + 1) for k in range(len(entries))] == sorted(entries)
    assert values.tolist() == [entries]  # not sorted in place


def test_a_parameter_twice_is_a_mistake():
    result = ranked(random_scores(3), 2)
    with pytest.raises(AssertionError, match=r"a\.weight came twice"):
        result.update("a.weight", torch.zeros(6, 5), torch.zeros(6, 5))


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 10, 40])
@pytest.mark.parametrize("n_high", [0, 2, 5, 3000])
def test_top_indices_where_one_score_is_nearly_everywhere(chunk, k, n_high):
    generator = torch.Generator().manual_seed(k + n_high)
    scores = torch.zeros(20_000)
    scores[torch.randperm(20_000, generator=generator)[:n_high]] = 1 + torch.rand(n_high, generator=generator)
    scores[::7] = scores[::7] - 1
    order = sorted(range(20_000), key=lambda i: (-scores[i].item(), i))
    assert top_indices(scores, k).tolist() == order[:k]


@pytest.mark.parametrize("n_levels", [1, 3, 10**6])
@pytest.mark.parametrize("size", [16_385, 100_000, 1_000_000])
def test_selection_in_long_arrays(size, n_levels):
    scores = torch.randint(n_levels, (size,), generator=torch.Generator().manual_seed(size)).float()
    full = torch.argsort(scores, descending=True, stable=True)
    for k in (1, 10, 500, 5000):
        assert torch.equal(top_indices(scores, k), full[:k])
    for k in (1, 2, size // 2, -(-99 * size // 100), size - 1, size):
        assert kth_smallest(scores, k) == scores[full[size - k]]


@pytest.mark.parametrize("step", [48, 7])
def test_sample_that_misleads_changes_nothing(step):
    scores = torch.zeros(200_000)
    scores[::step] = torch.arange(len(scores[::step])).float() + 1  # the sample is every 48th
    ordered = scores.sort().values
    assert all(
        kth_smallest(scores, k) == ordered[k - 1] for k in (1, 150_000, 171_429, 198_000, 199_967, 199_968, 200_000)
    )


class OnAnotherDevice(torch.Tensor):
    """A tensor that NumPy cannot read."""

    device = torch.device("cuda")

    def numpy(self):
        raise TypeError("not on the CPU")


def test_where_on_another_device():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert where(operator.ge, scores.as_subclass(OnAnotherDevice), 2.0).tolist() == [0, 2, 3]
    assert where(operator.ge, scores, 2.0).tolist() == [0, 2, 3]
