import itertools
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from critical_weight_analysis import stability
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.metrics import Sensitivity
from critical_weight_analysis.plots import plot_stability
from llm_perturb.evaluation.parameters import in_scope
from reference import naive_score, naive_sensitivities, naive_top

METRICS = ["grad_x_weight", "obd", "magnitude"]
KS = [5, 40]


def naive_tops(model, sequences, parameters, k):
    """By metric, the places of the K highest, by brute force over these sequences alone."""
    naive = naive_sensitivities(model, sequences)
    scores = {metric: {name: naive_score(metric, naive, name) for name in parameters} for metric in METRICS}
    return {metric: [line[:3] for line in naive_top(by_name, k)] for metric, by_name in scores.items()}


def naive_overlap(one, two):
    """Jaccard, number in common, and Spearman's rho by 1 - 6 Σ d² / (n (n² - 1)) over the ranks within the common."""
    common = set(one) & set(two)
    n = len(common)
    first, second = ([place for place in top if place in common] for top in (one, two))
    squares = sum((first.index(place) - second.index(place)) ** 2 for place in common)
    rho = 1 - 6 * squares / (n * (n * n - 1)) if n >= 3 else math.nan
    return len(common) / len(set(one) | set(two)), n, rho


@pytest.fixture
def found(model, sequences):
    parameters = in_scope(model)
    engine = engine_for(model)
    full = discover(engine, model, sequences, parameters, METRICS, KS[-1]).rankings
    splits = list(stability.discover_halves(engine, model, sequences, parameters, METRICS, KS[-1], 3, seed=7))
    n_weights = sum(parameter.numel() for parameter in parameters.values())
    return stability.table(full, splits, KS, n_weights), parameters


@pytest.mark.slow
def test_table_is_brute_force_over_the_same_halves(found, model, sequences):
    table, parameters = found
    parts = [stability.halves(len(sequences), 7, split) for split in range(3)]
    half = lambda split, side: [sequences[i] for i in parts[split][side]]  # noqa: E731
    for k in KS:
        tops = {(s, side): naive_tops(model, half(s, side), parameters, k) for s in range(3) for side in (0, 1)}
        full = naive_tops(model, sequences, parameters, k)
        expected = {}
        for metric in METRICS:
            for s in range(3):
                expected["halves", metric, metric, s, s] = tops[s, 0][metric], tops[s, 1][metric]
            for s, t in itertools.combinations(range(3), 2):
                expected["seeds", metric, metric, s, t] = tops[s, 0][metric], tops[t, 0][metric]
        for metric, other in itertools.combinations(METRICS, 2):
            expected["metrics", metric, other, None, None] = full[metric], full[other]
        rows = table[table["k"] == k]
        assert len(rows) == len(expected)
        for row in rows.itertuples():
            seeds = [None if pd.isna(seed) else seed for seed in (row.seed, row.other_seed)]
            one, two = expected[row.kind, row.metric, row.other, *seeds]
            jaccard, n_common, rho = naive_overlap(one, two)
            assert (row.jaccard, row.n_common) == (pytest.approx(jaccard), n_common)
            assert row.rank_correlation == pytest.approx(rho, abs=1e-9, nan_ok=True)


@pytest.mark.slow
def test_magnitude_needs_no_texts_and_gradients_do(found):
    table, _ = found
    halves = table[(table["kind"] == "halves") & (table["k"] == KS[-1])].set_index("metric")
    assert (halves.loc["magnitude", "jaccard"] == 1).all()
    assert halves.loc["magnitude", "rank_correlation"].tolist() == pytest.approx([1] * 3)
    assert (halves.loc["grad_x_weight", "jaccard"] < 1).any()


def test_null_keeps_the_weights_and_deals_all_else_anew_by_rows_and_columns():
    grid = torch.arange(12.0).reshape(3, 4)
    given = Sensitivity("a.weight", grid, grad=10 * grid, fisher=100 * grid)
    null = stability.dealt_anew(given, [0, 2, 1])
    assert null.name == "a.weight" and null.weight is grid and null.curvature is None
    assert torch.equal(null.fisher, 10 * null.grad)  # one order for all fields
    assert torch.equal(null.grad.flatten().sort().values, 10 * grid.flatten())
    rows, columns = null.grad[:, 0].div(40).floor(), null.grad[0].remainder(40)
    assert torch.equal(null.grad, 40 * rows[:, None] + columns)
    assert torch.equal(stability.dealt_anew(given, [0, 2, 1]).grad, null.grad)
    corners = {stability.dealt_anew(given, [0, split, 0]).grad[0, 0].item() for split in range(300)}
    assert corners == {10.0 * i for i in range(12)}  # any weight may get what any other has


@pytest.mark.slow
def test_null_column_is_the_overlap_of_halves_with_gradients_dealt_anew(found, model, sequences):
    table, parameters = found
    naive = []
    for side, members in enumerate(stability.halves(len(sequences), 7, 1)):
        sums = naive_sensitivities(model, [sequences[i] for i in members])
        scores = {}
        for name, parameter in parameters.items():
            dealt = stability.dealt_anew(Sensitivity(name, parameter.detach(), grad=sums.grad[name]), [7, 1, side])
            scores[name] = (dealt.grad * parameter.detach()).abs()
        naive.append([line[:3] for line in naive_top(scores, KS[-1])])
    rows = table[(table["k"] == KS[-1]) & (table["metric"] == "grad_x_weight")].set_index(
        ["kind", "seed", "other_seed"]
    )
    assert rows.loc[("halves", 1, 1), "jaccard_null"] == pytest.approx(naive_overlap(*naive)[0])
    magnitude = table[table["metric"] == "magnitude"]
    assert (magnitude.loc[magnitude["kind"] != "metrics", "jaccard_null"] == 1).all()
    assert table.loc[table["kind"] == "metrics", "jaccard_null"].isna().all()
    assert table.loc[table["kind"] != "metrics", "jaccard_null"].notna().all()


def test_null_of_pure_noise_is_what_the_halves_themselves_share():
    """Gradients of pure noise: the halves agree as the null does, and far more than chance, because of the weights."""
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 5
    k, overlaps = 200, {"halves": [], "null": []}
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed + 1)
        noise = [torch.randn(400, 500, generator=rng, dtype=torch.float64) for _ in range(2)]
        halves = [Sensitivity("a.weight", weight, grad=grad) for grad in noise]
        nulls = [stability.dealt_anew(half, [seed, side]) for side, half in enumerate(halves)]
        for kind, pair in {"halves": halves, "null": nulls}.items():
            tops = [(s.weight * s.grad).abs().flatten().topk(k).indices for s in pair]
            common = len(set(tops[0].tolist()) & set(tops[1].tolist()))
            overlaps[kind].append(common / (2 * k - common))
    observed, null = (sum(values) / 20 for values in overlaps.values())
    assert null == pytest.approx(observed, rel=0.05)
    assert observed > 100 * stability.chance_jaccard(k, weight.numel())


@pytest.mark.parametrize("n", [4, 7, 100])
def test_halves_are_a_random_partition(n):
    splits = [stability.halves(n, 0, split) for split in range(20)]
    for first, second in splits:
        assert sorted(first + second) == list(range(n))
        assert len(second) - len(first) == n % 2
    assert len({tuple(first) for first, _ in splits}) > 2
    assert stability.halves(n, 0, 3) == splits[3]
    assert [stability.halves(n, 1, split) for split in range(20)] != splits


def test_the_smallest_corpus_has_two_sequences_in_each_half():
    assert [len(half) for half in stability.halves(stability.MIN_SEQUENCES, 0, 0)] == [2, 2]


def test_overlap_by_hand():
    """What is in common has the ranks 1, 2, 3, 4 in one and 4, 1, 2, 3 in the longer two: Σ d² = 9 + 1 + 1 + 1."""
    one = torch.tensor([[0, 1], [0, 2], [1, 1], [2, 0], [1, 2]])
    two = torch.tensor([[0, 2], [1, 1], [2, 1], [3, 0], [3, 1], [1, 2], [0, 1]])
    assert stability.overlap(one, two) == {"jaccard": 4 / 8, "n_common": 4, "rank_correlation": pytest.approx(-0.2)}


@pytest.mark.parametrize(("n", "rho"), [(2, math.nan), (3, -1)])
def test_two_in_common_have_no_rank_correlation(n, rho):
    line = torch.stack([torch.zeros(n, dtype=torch.int64), torch.arange(n)], dim=1)
    found = stability.overlap(line, line.flip(0))
    assert (found["jaccard"], found["n_common"]) == (1, n)
    assert found["rank_correlation"] == pytest.approx(rho, nan_ok=True)


def rankings(scores):
    result = stability.Ranking({"a.weight": (1, 6)}, 3, per_layer=False)
    result.update("a.weight", torch.zeros(1, 6), torch.tensor([scores]))
    return {"obd": result}


def test_rows_of_the_table_by_hand():
    ends, middle, begin = [9.0, 8, 0, 0, 0, 7], [0.0, 9, 8, 7, 0, 0], [9.0, 8, 7, 0, 0, 0]
    splits = [
        stability.Halves(rankings(ends), rankings(middle), rankings(begin), rankings(begin)),
        stability.Halves(rankings(begin), rankings(ends), rankings(middle), rankings(ends)),
    ]
    full = rankings(ends) | {"magnitude": rankings(begin)["obd"]}
    splits = [stability.Halves(*(half | {"magnitude": half["obd"]} for half in split)) for split in splits]
    table = stability.table(full, splits, [2, 3], 6)
    expected = [  # of obd with K = 3: {0, 1, 5}, {1, 2, 3} and {0, 1, 2}
        ["halves", "obd", 0, 0, 1 / 5, 1, 1],
        ["halves", "obd", 1, 1, 2 / 4, 2, 1 / 5],
        ["seeds", "obd", 0, 1, 2 / 4, 2, 2 / 4],
    ]
    columns = ["kind", "other", "seed", "other_seed", "jaccard", "n_common", "jaccard_null"]
    assert table[(table["k"] == 3) & (table["metric"] == "obd")][columns].iloc[:3].to_numpy().tolist() == expected
    last = table.iloc[-1]
    assert (last["kind"], last["metric"], last["other"], last["k"]) == ("metrics", "obd", "magnitude", 3)
    assert (last["jaccard"], last["n_common"]) == (0.5, 2) and pd.isna(last["jaccard_null"]) and pd.isna(last["seed"])
    assert len(table) == 2 * (2 * 3 + 1)
    assert table["jaccard_chance"].unique().tolist() == [stability.chance_jaccard(k, 6) for k in (2, 3)]


def test_halves_and_their_nulls_are_of_their_own_sequences_and_seeds(monkeypatch):
    """The engine gives as a gradient which sequences it was called with."""
    sequences, seen = [torch.tensor([i]) for i in range(7)], []

    def sensitivities(model, some, names, needs, settings):
        members = [int(sequence) for sequence in some]
        grad = torch.zeros(7)
        grad[members] = 1 + torch.tensor(members).float()
        return None, iter([Sensitivity("a.weight", torch.ones(7), grad=grad)])

    def dealt_anew(sensitivity, seed):
        seen.append(seed)
        return Sensitivity("a.weight", torch.ones(7), grad=sensitivity.grad.flip(0))

    monkeypatch.setattr(stability, "dealt_anew", dealt_anew)
    engine = SimpleNamespace(gives={"grad"}, sensitivities=sensitivities)
    parameters = {"a.weight": torch.nn.Parameter(torch.ones(7))}
    splits = list(stability.discover_halves(engine, None, sequences, parameters, ["grad_x_weight"], 3, 2, seed=5))
    assert seen == [[5, 0, 0], [5, 0, 1], [5, 1, 0], [5, 1, 1]]
    for split, found in enumerate(splits):
        for members, top, null in zip(stability.halves(7, 5, split), found[:2], found[2:], strict=True):
            best = top["grad_x_weight"].best(3)
            assert best.index.tolist() == members[::-1][:3]
            assert best.score.tolist() == [1 + i for i in members[::-1][:3]]
            assert null["grad_x_weight"].best(3).index.tolist() == [6 - i for i in members[::-1][:3]]
        assert [ranking.per_layer for by_metric in found for ranking in by_metric.values()] == [False] * 4


def test_overlap_of_lists_with_nothing_in_common():
    one, two = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[1, 1], [1, 2]])
    found = stability.overlap(one, two)
    assert (found["jaccard"], found["n_common"]) == (0, 0)
    assert math.isnan(found["rank_correlation"])


@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 5), (3, 4), (4, 9)])
def test_chance_is_the_mean_over_all_pairs_of_sets(k, n):
    sets = [set(chosen) for chosen in itertools.combinations(range(n), k)]
    mean = sum(len(sets[0] & other) / len(sets[0] | other) for other in sets) / len(sets)
    assert stability.chance_jaccard(k, n) == pytest.approx(mean)


def test_chance_for_the_size_of_a_real_model():
    k, n = 500, 2_800_000_000
    assert stability.chance_jaccard(k, n) == pytest.approx(k / (2 * n), rel=1e-2)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_picture_is_written(found, tmp_path):
    plot_stability(found[0], tmp_path / "stability.png")
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
