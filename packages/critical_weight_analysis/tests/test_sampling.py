from collections import Counter
from math import log10

import pandas as pd
import pytest
import torch
from bridge.exchange.tables import SAMPLED_WEIGHTS, Table, read_table, write_table
from critical_weight_analysis import whole_model
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.metrics import FORMULAS, NEEDS, Sensitivity
from critical_weight_analysis.ranking import top_indices
from critical_weight_analysis.sampling import N_HEAD, N_STRATUM, Sample
from llm_perturb.evaluation.parameters import in_scope
from reference import naive_score, naive_sensitivities, naive_top

METRICS = [metric for metric in FORMULAS if NEEDS[metric] <= whole_model.GIVES]


def places(frame):
    cols = [None if pd.isna(col) else int(col) for col in frame["col"]]
    return list(zip(frame["parameter"], frame["row"], cols, strict=True))


def sampled(weights: dict[str, torch.Tensor], metrics=("magnitude",), order=None) -> pd.DataFrame:
    sample = Sample({name: tuple(weight.shape) for name, weight in weights.items()}, metrics)
    for name in order or weights:
        sensitivity = Sensitivity(name, weights[name])
        sample.update(sensitivity, [top_indices(FORMULAS[metric](sensitivity), N_HEAD) for metric in metrics])
    return sample.table()


@pytest.mark.parametrize("scope", ["matrices", "all"])
def test_tops_of_every_metric_with_the_scores_of_all(model, sequences, scope):
    parameters = in_scope(model, scope)
    found = discover(engine_for(model), model, sequences, parameters, METRICS, 5).sampled
    naive = naive_sensitivities(model, sequences)
    scores = {metric: {name: naive_score(metric, naive, name) for name in parameters} for metric in METRICS}
    here = places(found)
    assert len(set(here)) == len(here)
    assert here == sorted(here, key=lambda place: (list(parameters).index(place[0]), place[1], place[2] or 0))
    for metric in METRICS:
        tops = [naive_top({name: s}, 2) for name, s in scores[metric].items()] + [naive_top(scores[metric], 9)]
        assert {line[:3] for top in tops for line in top} <= set(here)
        expected = [scores[metric][name][row if col is None else (row, col)].item() for name, row, col in here]
        assert found[f"score_{metric}"].tolist() == pytest.approx(expected, rel=1e-9)
    per_parameter = found["parameter"].value_counts()
    assert set(per_parameter.index) == set(parameters)
    n = sum(parameter.numel() for parameter in parameters.values())
    assert len(found) <= len(parameters) * (2 * len(METRICS) + 2) + N_STRATUM * len(METRICS) * (2 * log10(n) + 1)
    for metric in METRICS:
        ranks = [line[:3] for line in naive_top(scores[metric], n)]
        shares = {place: (at + 1) / n for at, place in enumerate(ranks)}
        expected = pd.Series([shares[place] for place in here])
        sure = expected < 0.9  # below are the biases of keys, whose gradient is rounding alone
        assert found.loc[sure, f"share_{metric}"].tolist() == pytest.approx(expected[sure].tolist())
        strata = [int(2 * log10(rank)) for rank in range(1, n + 1)]
        there = Counter(int(2 * log10(round(share * n))) for share in found[f"share_{metric}"])
        assert all(there[s] >= min(N_STRATUM, strata.count(s)) for s in set(strata))
    values = [parameters[name][row if col is None else (row, col)].item() for name, row, col in here]
    assert found["value"].tolist() == values


def test_scores_are_those_of_the_ranking_bit_for_bit(tiny_model, sequences):
    model = tiny_model("neox", torch.float32)
    found = discover(engine_for(model), model, sequences, in_scope(model), METRICS, 2)
    keys = ["parameter", "row", "col"]
    for metric in METRICS:
        top = found.rankings[metric].top_per_layer(2)
        both = top.merge(found.sampled, on=keys, suffixes=("", "_sampled"))
        assert len(both) == len(top)
        assert both["score"].tolist() == both[f"score_{metric}"].tolist()
        assert both["value"].tolist() == both["value_sampled"].tolist()


def test_two_of_each_parameter_are_drawn_and_depend_on_its_name_alone():
    names = [f"{n}.weight" for n in range(40)]
    flat = {name: torch.ones(300, 200) for name in names}
    assert sampled(flat, order=reversed(names)).equals(sampled(flat))
    together, alone = sampled(flat), [sampled({name: flat[name]}) for name in names[:5]]
    for name, frame in zip(names, alone, strict=False):
        both = set(places(frame)) & set(places(together[together["parameter"] == name]))
        assert len(both) >= 2 + 2  # the first two, of equal scores, and the two drawn


@pytest.mark.parametrize("seed", [0, 1])
def test_share_of_weights_that_score_at_least_as_high(seed):
    weight = torch.randn(700, 1000, generator=torch.Generator().manual_seed(seed)) ** 3
    weights = {"a.weight": weight, "b.weight": 3 * weight[:100].flip(0)}
    found = sampled(weights)
    everything = torch.cat([w.abs().reshape(-1) for w in weights.values()]).sort(descending=True).values
    exact = torch.searchsorted(-everything, -torch.tensor(found["score_magnitude"], dtype=torch.float32), right=True)
    n = len(everything)
    shares = torch.tensor(found["share_magnitude"])
    assert torch.allclose((shares * n)[exact <= 100], exact[exact <= 100].double())
    low = exact > 2000  # of which some 330 were drawn
    assert (shares[low] / (exact[low] / n)).log().abs().max() < 0.25
    between = (exact > 100) & ~low
    assert (shares[between] / (exact[between] / n)).log().abs().max() < 2
    assert torch.histc((shares * n).log10(), 6, 0, 6).min() >= 8


def test_draws_are_spread_over_the_whole_parameter():
    weights = {f"{n}.weight": torch.ones(10, 50) for n in range(200)}
    drawn = sampled(weights)
    drawn = drawn[(drawn["row"] > 0) | (drawn["col"] >= 2)]
    assert set(drawn["row"]) == set(range(10))
    flat = drawn["row"] * 50 + drawn["col"]
    assert 200 < flat.mean() < 300


def test_head_of_all_weights_may_lie_in_one_parameter():
    weights = {"a.weight": torch.zeros(40, 40), "b.weight": 5 + torch.arange(1600.0).reshape(40, 40)}
    found = sampled(weights)
    head = {("b.weight", 39, col) for col in range(31, 40)}
    assert head <= set(places(found))
    assert len(found) <= 2 + 2 + N_STRATUM * (2 * log10(3200) + 1) + 2


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
