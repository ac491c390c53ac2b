from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from bridge.exchange.tables import SAMPLED_WEIGHTS, Table, read_table, write_table
from bridge.exchange.weight_sample import draw_probability
from critical_weight_analysis import sampling
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.highest_scores import top_indices
from critical_weight_analysis.metrics import METRICS, Sensitivity
from critical_weight_analysis.sampling import N_HEAD, N_ROWS, Sample, candidate_probability, ranks_among_all
from critical_weight_analysis.whole_model import WholeModelEngine
from llm_perturb.evaluation.parameters import in_scope
from reference import naive_score, naive_sensitivities, naive_top

NAMES = [metric for metric in METRICS if METRICS[metric].needs <= WholeModelEngine.gives]


def places(frame):
    cols = [None if pd.isna(col) else int(col) for col in frame["col"]]
    return list(zip(frame["parameter"], frame["row"], cols, strict=True))


def sampled(weights: dict[str, torch.Tensor], metrics=("magnitude",), order=None, seed=0) -> pd.DataFrame:
    sample = Sample({name: tuple(weight.shape) for name, weight in weights.items()}, metrics, seed)
    for name in order or weights:
        sensitivity = Sensitivity(name, weights[name])
        sample.update(sensitivity, [top_indices(METRICS[metric].score(sensitivity), N_HEAD) for metric in metrics])
    return sample.table()


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["matrices", "all"])
def test_rows_hold_the_scores_and_ranks_by_every_metric(model, sequences, scope, monkeypatch):
    monkeypatch.setattr(sampling, "N_ROWS", 500)
    parameters = in_scope(model, scope)
    table = discover(engine_for(model), model, sequences, parameters, NAMES, 5).sampled
    naive = naive_sensitivities(model, sequences)
    here = places(table)
    assert len(set(here)) == len(here) == 500
    assert here == sorted(here, key=lambda place: (list(parameters).index(place[0]), place[1], place[2] or 0))
    n = sum(parameter.numel() for parameter in parameters.values())
    ranks = []
    for metric in NAMES:
        scores = {name: naive_score(metric, naive, name) for name in parameters}
        expected = [scores[name][row if col is None else (row, col)].item() for name, row, col in here]
        assert table[f"score_{metric}"].tolist() == pytest.approx(expected, rel=1e-9)
        rank_of = {line[:3]: at + 1 for at, line in enumerate(naive_top(scores, n))}
        ranks.append([rank_of[place] for place in here])
        sure = np.array(ranks[-1]) < 0.9 * n  # below are the biases of keys, whose gradient is rounding alone
        assert (table[f"share_{metric}"] * n)[sure].tolist() == pytest.approx(np.array(ranks[-1])[sure].tolist())
    values = [parameters[name][row if col is None else (row, col)].item() for name, row, col in here]
    assert table["value"].tolist() == values
    # every weight was a candidate: one threshold explains all probabilities, and those at 1 are the likeliest
    probability = draw_probability((table[[f"share_{m}" for m in NAMES]] * n).to_numpy(), n)
    drawn = table["inclusion"] < 1
    ratio = (table["inclusion"] / probability)[drawn]
    assert ratio.tolist() == pytest.approx([ratio.iloc[0]] * len(ratio))
    assert (probability[~drawn] * ratio.iloc[0] >= 1 - 1e-12).all()


def test_scores_are_those_of_the_ranking_bit_for_bit(tiny_model, sequences):
    model = tiny_model("neox", torch.float32)
    found = discover(engine_for(model), model, sequences, in_scope(model), NAMES, 2)
    keys = ["parameter", "row", "col"]
    for metric in NAMES:
        top = found.rankings[metric].top_per_layer(2)
        both = top.merge(found.sampled, on=keys, suffixes=("", "_sampled"))
        assert len(both) == len(top)
        assert both["score"].tolist() == both[f"score_{metric}"].tolist()
        assert both["value"].tolist() == both["value_sampled"].tolist()


def test_the_draw_depends_on_nothing_but_the_seed():
    flat = {f"{n}.weight": torch.ones(30, 20) for n in range(20)}
    table = sampled(flat)
    assert len(table) == N_ROWS == 4000
    assert sampled(flat, order=reversed(flat)).equals(table)
    assert not sampled(flat, seed=1).equals(table)


def test_candidates_are_some_drawn_of_all_weights_and_the_hundred_highest_of_each_parameter(monkeypatch):
    """By two metrics whose highest are the ends of a line."""
    shapes = {"a.weight": (400, 500), "b.weight": (3, 2)}
    weight, grad = {n: torch.arange(1.0, 1 + s[0] * s[1]).view(s) for n, s in shapes.items()}, {}
    grad = {name: 1 / w**2 for name, w in weight.items()}
    sample, metrics = Sample(shapes, ["magnitude"]), ["magnitude", "grad_x_weight"]
    for name in shapes:
        sample.update(Sensitivity(name, weight[name]), [torch.empty(0, dtype=torch.int64)])
    assert len(sample.state()["index"]) == 131072  # all different
    monkeypatch.setattr(sampling, "N_UNIFORM", 0)
    stream = [Sensitivity(name, weight[name], grad=grad[name]) for name in shapes]
    engine = SimpleNamespace(gives={"grad"}, sensitivities=lambda *args: (torch.zeros(1), iter(stream)))
    table = discover(engine, None, [], {name: torch.nn.Parameter(w) for name, w in weight.items()}, metrics, 1).sampled
    chosen = table["row"] * 500 + table["col"]
    assert chosen[table["parameter"] == "a.weight"].tolist() == [*range(100), *range(199_900, 200_000)]
    assert (table["parameter"] == "b.weight").sum() == 6
    assert (table["inclusion"] == 1).all()


def test_all_rows_where_there_are_no_more():
    table = sampled({"a.weight": torch.arange(600.0).reshape(20, 30)})
    assert places(table) == [("a.weight", row, col) for row in range(20) for col in range(30)]
    assert (table["inclusion"] == 1).all()
    assert table["share_magnitude"].tolist() == [(600 - i) / 600 for i in range(600)]


def test_candidates_outside_the_heads_share_one_probability():
    certain = np.array([True, False, True, False, False])
    assert candidate_probability(certain, 32).tolist() == [1, 0.1, 1, 0.1, 0.1]
    assert candidate_probability(np.array([True, True]), 2).tolist() == [1, 1]
    assert candidate_probability(np.array([True, False]), 2).tolist() == [1, 1]


def test_a_rank_is_the_number_of_weights_that_the_candidates_before_stand_for():
    scores = np.array([1.0, 9.0, 5.0, 5.0, 7.0])
    candidate = np.array([0.1, 1, 1, 0.25, 0.1])
    # in order: 9 stands for 1; 7 for 10; 5 for 1; 5 for 4; 1 for 10
    assert ranks_among_all(scores, candidate).tolist() == [21.5, 1, 12, 14.5, 6.5]
    assert ranks_among_all(scores, np.ones(5)).tolist() == [5, 1, 3, 4, 2]


@pytest.mark.parametrize("seed", [0, 1])
def test_share_of_weights_that_score_at_least_as_high(seed, monkeypatch):
    monkeypatch.setattr(sampling, "N_UNIFORM", 1 << 14)
    weight = torch.randn(500, 1000, generator=torch.Generator().manual_seed(seed)) ** 3
    weights = {"a.weight": weight, "b.weight": 3 * weight[:100].flip(0)}
    table = sampled(weights, seed=seed)
    everything = torch.cat([w.abs().reshape(-1) for w in weights.values()]).sort(descending=True).values
    exact = torch.searchsorted(-everything, -torch.tensor(table["score_magnitude"], dtype=torch.float32), right=True)
    ranks = torch.tensor(table["share_magnitude"]) * len(everything)
    assert torch.allclose(ranks[exact <= 100], exact[exact <= 100].double())
    low = exact > 4000  # of which some 100 were drawn
    assert (ranks[low] / exact[low]).log().abs().max() < 0.3
    between = (exact > 100) & ~low
    assert (ranks[between] / exact[between]).log().abs().max() < 2
    assert torch.histc(ranks.log10(), 6, 0, 6).min() >= 8


def test_weighting_gives_the_model_back(monkeypatch):
    """Over seeds, sums of value / inclusion are right: of ones, of a group of weights, of heavy-tailed values."""
    monkeypatch.setattr(sampling, "N_UNIFORM", 2000)
    monkeypatch.setattr(sampling, "N_ROWS", 300)
    generator = torch.Generator().manual_seed(3)
    weights = {f"{n}.weight": torch.randn(100, 100, generator=generator) ** 3 * (n + 1) for n in range(3)}
    tables = [sampled(weights, seed=seed) for seed in range(80)]
    assert all(len(table) == 300 for table in tables)
    size = sum(weight.abs().sum().item() for weight in weights.values())
    totals = [(30_000, [np.ones(300)] * 80)]
    totals += [(2000, [(table["parameter"] == "0.weight") & (table["row"] < 20) for table in tables])]
    totals += [(size, [table["value"].abs() for table in tables])]
    for total, values in totals:
        sums = [(value / table["inclusion"]).sum() for value, table in zip(values, tables, strict=True)]
        assert np.mean(sums) == pytest.approx(total, abs=4 * np.std(sums) / np.sqrt(80))


def test_parameters_of_few_weights_and_of_one_dimension():
    found = sampled({"a.weight": torch.tensor([[2.0]]), "norm.weight": torch.tensor([1.0, -3.0, 0.5])})
    assert places(found)[0] == ("a.weight", 0, 0)
    vector = found[found["parameter"] == "norm.weight"]
    assert vector["col"].isna().all() and vector["row"].tolist() == [0, 1, 2]
    assert vector["value"].tolist() == [1.0, -3.0, 0.5]
    assert found["layer"].tolist() == ["a", "norm", "norm", "norm"]


def test_table_is_written_and_read_without_loss(tmp_path):
    found = sampled({"a.weight": torch.randn(30, 30, generator=torch.Generator().manual_seed(1))})
    path = tmp_path / "sampled_weights.csv"
    write_table(path, found, SAMPLED_WEIGHTS)
    floats = {"score_magnitude": "float", "share_magnitude": "float"}
    table = Table("sampled weights", SAMPLED_WEIGHTS.columns | floats)
    pd.testing.assert_frame_equal(read_table(path, table), found, check_dtype=False, rtol=0, atol=0)
