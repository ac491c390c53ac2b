import itertools

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.selection import Target, draw, draw_matched, generator, highest, lowest
from reference import naive_highest, naive_lowest
from torch.nn import Parameter

NONE = torch.empty(0, dtype=torch.int64)
TIES = [3.0, 1.0, 3.0, 0.0, 2.0, 3.0, 0.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("k", range(1, 11))
def test_ties_go_to_the_first_position_at_every_k(k):
    scores = torch.tensor(TIES)
    assert highest(scores, k).positions.tolist() == naive_highest(TIES, k)
    assert lowest(scores, k).positions.tolist() == naive_lowest(TIES, k)


def test_scores_come_along_in_the_same_order():
    found = highest(torch.tensor(TIES), 6)
    assert found.scores.tolist() == [3.0, 3.0, 3.0, 3.0, 2.0, 2.0]
    assert found.scores.dtype == torch.float64
    assert lowest(torch.tensor(TIES), 4).scores.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 100, 499, 500])
def test_random_scores_with_many_ties_match_a_full_sort(k, dtype):
    scores = torch.randint(20, (500,), generator=torch.Generator().manual_seed(k)).to(dtype)
    assert highest(scores, k).positions.tolist() == naive_highest(scores.tolist(), k)
    assert lowest(scores, k).positions.tolist() == naive_lowest(scores.tolist(), k)


def test_all_equal_scores_are_taken_from_the_front():
    assert highest(torch.zeros(6), 3).positions.tolist() == [0, 1, 2]
    assert lowest(torch.zeros(6), 3).positions.tolist() == [0, 1, 2]


def test_more_than_there_are_is_all_of_them():
    assert highest(torch.tensor([1.0, 2.0]), 5).positions.tolist() == [1, 0]


def test_first_cuts_the_ranking_and_keeps_pairs_together():
    ranked = highest(torch.tensor([1.0, 5.0, 4.0]), 3)
    assert ranked.first(2).positions.tolist() == [1, 2]
    assert ranked.first(2).scores.tolist() == [5.0, 4.0]
    assert ranked.first(9).positions.tolist() == [1, 2, 0]


def test_a_target_of_several_tensors_is_split_where_they_meet():
    parameters = {name: Parameter(torch.zeros(shape)) for name, shape in {"a": (2, 3), "b": (4,), "c": (1, 2)}.items()}
    target = Target("t", parameters)
    assert target.n_weights == 12
    assert target.offsets() == {"a": 0, "b": 6, "c": 10}
    parts = target.split(torch.tensor([11, 5, 6, 0, 9]))
    assert {name: index.tolist() for name, index in parts.items()} == {"a": [5, 0], "b": [0, 3], "c": [1]}
    assert "a" not in target.split(torch.tensor([6]))


@pytest.mark.parametrize("n_excluded", [0, 1, 3, 9])
def test_a_draw_is_sorted_different_in_range_and_never_excluded(n_excluded):
    for seed in range(200):
        excluded = torch.randperm(13, generator=torch.Generator().manual_seed(seed))[:n_excluded]
        drawn = draw(13, 4, excluded, [seed, "test"]).tolist()
        assert len(drawn) == len(set(drawn)) == 4
        assert drawn == sorted(drawn)
        assert set(drawn) <= set(range(13)) - set(excluded.tolist())


def test_a_draw_is_that_of_its_generator_among_the_free_positions():
    excluded = [19, 0, 7, 1, 12]
    free = [position for position in range(20) if position not in excluded]
    for seed in range(20):
        expected = sorted(generator([seed, "x"]).choice(free, size=6, replace=False).tolist())
        assert draw(20, 6, torch.tensor(excluded), [seed, "x"]).tolist() == expected


def test_the_order_of_the_excluded_does_not_matter():
    key = [0, "control", "layer", 3]
    excluded = [7, 0, 1, 19, 12]
    draws = {tuple(draw(20, 5, torch.tensor(order), key).tolist()) for order in itertools.permutations(excluded)}
    assert len(draws) == 1


def test_the_same_key_gives_the_same_draw_whatever_was_drawn_before():
    first = draw(1000, 10, NONE, [0, "a"])
    draw(1000, 10, NONE, [1, "a"])
    torch.randn(3)
    assert torch.equal(draw(1000, 10, NONE, [0, "a"]), first)


@pytest.mark.parametrize(
    "other", [[1, "control", "a", 10], [0, "noise", "a", 10], [0, "control", "b", 10], [0, "control", "a", 11]]
)
def test_each_part_of_the_key_changes_the_draw(other):
    key = [0, "control", "a", 10]
    assert not torch.equal(draw(10_000, 10, NONE, other), draw(10_000, 10, NONE, key))


def test_every_free_position_is_drawn_and_all_about_equally_often():
    excluded = torch.tensor([0, 4, 5, 11])
    counts = [0] * 12
    n_draws = 4000
    for seed in range(n_draws):
        for position in draw(12, 2, excluded, [seed]).tolist():
            counts[position] += 1
    free = [counts[p] for p in range(12) if p not in {0, 4, 5, 11}]
    assert [counts[p] for p in (0, 4, 5, 11)] == [0, 0, 0, 0]
    assert all(abs(count - n_draws * 2 / 8) < 150 for count in free)  # five standard deviations


def test_all_that_is_left_can_be_drawn_and_no_more():
    assert draw(6, 4, torch.tensor([1, 3]), ["x"]).tolist() == [0, 2, 4, 5]
    with pytest.raises(RequestError, match="random control of 5 weights is impossible: 4 of 6"):
        draw(6, 5, torch.tensor([1, 3]), ["x"])


def test_a_generator_depends_on_its_key_alone():
    assert generator([0, "noise", "a"]).random() == generator([0, "noise", "a"]).random()
    assert generator([0, "noise", "a"]).random() != generator([0, "noise", "b"]).random()


def test_the_match_of_a_large_weight_is_the_smallest_where_no_other_is_free():
    """Of 101 weights only the one of rank 0 may be drawn, further from rank 100 than the nearest fifty."""
    magnitudes = torch.arange(101.0).flip(0)
    chosen, excluded = torch.tensor([0]), torch.arange(100)
    assert draw_matched(magnitudes, chosen, excluded, ["x"]).tolist() == [100]


def test_the_smallest_weights_can_be_matched_and_be_matches():
    """Among four weights every free one is near, above or below the chosen one."""
    magnitudes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for chosen in range(4):
        draws = {draw_matched(magnitudes, torch.tensor([chosen]), NONE, [seed]).item() for seed in range(40)}
        assert draws == set(range(4)) - {chosen}


@pytest.mark.parametrize(
    ("chosen", "nearest"), [(0, range(1, 26)), (50, [*range(25, 50), *range(51, 76)]), (100, range(75, 100))]
)
def test_a_match_is_any_of_the_25_nearest_on_either_side(chosen, nearest):
    magnitudes, position = torch.arange(101.0), torch.tensor([chosen])
    draws = {draw_matched(magnitudes, position, NONE, [seed]).item() for seed in range(500)}
    assert draws == set(nearest)


@pytest.mark.parametrize("seed", range(5))
def test_a_match_lies_among_the_nearest_in_rank(seed):
    magnitudes = torch.rand(1000, generator=torch.Generator().manual_seed(seed))
    top = torch.tensor([3, 500, 999])
    drawn = draw_matched(magnitudes, top, top, [seed]).tolist()
    rank = magnitudes.argsort().argsort()
    assert all(abs(int(rank[a] - rank[b])) <= 30 for a, b in zip(drawn, top.tolist(), strict=True))
    assert drawn == draw_matched(magnitudes, top, top, [seed]).tolist()


def test_when_few_are_left_every_one_of_them_is_matched_once():
    magnitudes, top = torch.arange(10.0), torch.tensor([9, 8, 7, 6, 5])
    assert sorted(draw_matched(magnitudes, top, top, ["x"]).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(RequestError, match="matched control of 6 weights is impossible: 4 are outside"):
        draw_matched(magnitudes, torch.arange(4, 10), torch.arange(4, 10), ["x"])


def naive_matched(magnitudes, chosen, excluded, key):
    """Free weights by magnitude, then position; one of 25 on either side, or of twice as many where none is left."""
    free = [j for j in range(len(magnitudes)) if j not in chosen and j not in excluded]
    free.sort(key=lambda j: (magnitudes[j], j))
    rng, left, drawn = generator(key), set(free), []
    for position in chosen:
        rank, reach, near = sum(magnitudes[j] < magnitudes[position] for j in free), 25, []
        while not near:
            near = [j for j in free[max(0, rank - reach) : rank + reach] if j in left]
            reach *= 2
        drawn.append(int(rng.choice(near)))
        left.remove(drawn[-1])
    return drawn


@pytest.mark.parametrize("n_levels", [2, 40, 10**6])
def test_matches_are_those_of_a_search_in_loops(n_levels):
    """Ties of magnitude go by position; where 25 on either side are used up, the reach is doubled."""
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        magnitudes = torch.randint(n_levels, (400,), generator=rng).float()
        chosen = magnitudes.argsort()[120:220] if seed else magnitudes.argsort()[300:]
        excluded = torch.cat([chosen, torch.arange(0, 400, 7)]).unique()
        expected = naive_matched(magnitudes.tolist(), chosen.tolist(), excluded.tolist(), [seed])
        assert draw_matched(magnitudes, chosen, excluded, [seed]).tolist() == expected
