import math

import numpy as np
import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.batched_single_weights import Copies
from llm_perturb.choose_weights import choose_weights
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.parameters import match, named_parameters
from llm_perturb.measurement_plan import Plan, lines, share, single_weights
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target, draw, draw_matched
from llm_perturb.weights_csv import WeightList
from reference import naive_highest, naive_lowest, naive_score
from tiny_models import build

UP = "gpt_neox.layers.0.mlp.dense_h_to_4h"  # 160 weights
DENSE = "gpt_neox.layers.1.attention.dense"  # 64 weights


@pytest.fixture
def neox():
    return build("neox")


def plan_of(model, layers=(UP,), **changes):
    named = named_parameters(model)
    targets = [Target(layer, {name: named[name] for name in match(model, layer)}) for layer in layers]
    parts = {
        "targets": targets,
        "lists": [],
        "ks": [2, 5],
        "selections": ["top", "random", "bottom"],
        "metrics": ["obd"],
        "perturbations": [Perturbation("zero")],
        "seeds": [0, 1],
    }
    return Plan(**(parts | changes))


def listed(name, indices, path="top_9_weights_obd.csv"):
    """A CSV's content: these weights of one parameter, best first."""
    scores = np.arange(len(indices), 0, -1, dtype=float)
    return WeightList(path, np.array([name] * len(indices), dtype=object), np.array(indices), scores)


def chosen(plan, model, sequences, rank=0, world=1):
    return choose_weights(plan, share(plan.conditions(), rank, world), model, Corpus(sequences, {}))


def test_rows_are_ordered_by_target_selection_perturbation_k_and_seed(neox):
    perturbations = [Perturbation("sign_flip"), Perturbation("gaussian_noise")]
    plan = plan_of(neox, [DENSE, UP], perturbations=perturbations, selections=["random", "top"], seeds=[3, 1])
    found = [(s.target.layer, s.selection, s.perturbation.kind, s.k, s.seed) for s in plan.conditions()]
    expected = [
        (layer, selection, kind, k, seed)
        for layer in (DENSE, UP)
        for selection in ("random", "top_obd")
        for kind in ("sign_flip", "gaussian_noise")
        for k in (2, 5)
        for seed in ([3, 1] if selection == "random" or kind == "gaussian_noise" else [None])
    ]
    assert found == expected
    assert len({shell.key for shell in plan.conditions()}) == len(expected)


def test_seeds_belong_to_what_is_drawn_and_to_nothing_else(neox):
    perturbations = [Perturbation("zero"), Perturbation("quantize"), Perturbation("gaussian_noise")]
    for shell in plan_of(neox, perturbations=perturbations).conditions():
        drawn = shell.selection == "random" or shell.perturbation.kind == "gaussian_noise"
        assert (shell.seed is not None) == drawn


def test_every_metric_has_its_top_and_its_bottom_and_random_comes_once(neox):
    plan = plan_of(neox, metrics=["obd", "magnitude"])
    labels = list(dict.fromkeys(shell.selection for shell in plan.conditions()))
    assert labels == ["top_obd", "top_magnitude", "random", "bottom_obd", "bottom_magnitude"]


def test_lists_take_the_place_of_the_metric_at_the_top_only(neox):
    plan = plan_of(neox, lists=[listed(f"{UP}.weight", [1, 2], "top_9_per_layer_magnitude.csv")])
    labels = list(dict.fromkeys(shell.selection for shell in plan.conditions()))
    assert labels == ["top_magnitude", "random", "bottom_obd"]


@pytest.mark.parametrize("world", range(1, 7))
@pytest.mark.parametrize("layers", [[UP], [UP, DENSE], [UP, DENSE, "lm_head", "gpt_neox.layers.2", "ALL"]])
def test_the_shares_are_a_partition(neox, world, layers):
    plan = plan_of(neox, layers)
    shares = [[shell.key for shell in share(plan.conditions(), rank, world)] for rank in range(world)]
    together = [key for part in shares for key in part]
    assert len(together) == len(set(together))
    assert set(together) == {shell.key for shell in plan.conditions()}
    assert max(map(len, shares)) - min(map(len, shares)) <= len(plan.conditions()) / len(layers)


@pytest.mark.parametrize("metric", ["grad_x_weight", "grad_squared", "obd", "taylor2", "magnitude"])
def test_top_and_bottom_are_those_of_a_full_sort_of_naive_scores(neox, sequences, metric):
    layer = "gpt_neox.layers.1"
    plan = plan_of(neox, [layer], metrics=[metric], selections=["top", "bottom"], ks=[1, 10, 60])
    line = torch.cat([naive_score(neox, sequences, name, metric).view(-1) for name in match(neox, layer)]).tolist()
    for condition in chosen(plan, neox, sequences):
        naive = naive_highest if condition.selection.startswith("top_") else naive_lowest
        expected = naive(line, condition.k)
        assert condition.positions.tolist() == expected
        assert condition.score_sum == pytest.approx(sum(line[j] for j in expected), rel=1e-9)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_weights_do_not_depend_on_the_number_of_processes(neox, sequences, world):
    plan = plan_of(neox, [UP, DENSE], perturbations=[Perturbation("zero"), Perturbation("gaussian_noise")])
    alone = {condition.key: condition.positions.tolist() for condition in chosen(plan, neox, sequences)}
    shared = {}
    for rank in range(world):
        shared |= {c.key: c.positions.tolist() for c in chosen(plan, neox, sequences, rank, world)}
    assert shared == alone


def test_what_is_left_of_a_killed_run_gets_the_same_weights(neox, sequences):
    plan = plan_of(neox, [UP, DENSE])
    whole = {condition.key: condition.positions.tolist() for condition in chosen(plan, neox, sequences)}
    for shell in plan.conditions():
        (alone,) = choose_weights(plan, [shell], neox, Corpus(sequences, {}))
        assert alone.positions.tolist() == whole[shell.key]
    assert choose_weights(plan, [], neox, Corpus(sequences, {})) == []


def test_random_controls_avoid_every_top_set_of_their_k(neox, sequences):
    plan = plan_of(neox, [DENSE], metrics=["obd", "magnitude"], ks=[1, 20], seeds=list(range(30)))
    conditions = chosen(plan, neox, sequences)
    drawn = set()
    for k in (1, 20):
        tops = [c.positions.tolist() for c in conditions if c.selection.startswith("top_") and c.k == k]
        forbidden = {position for top in tops for position in top}
        assert len(tops) == 2
        for control in (c for c in conditions if c.selection == "random" and c.k == k):
            assert len(set(control.positions.tolist())) == k
            assert not forbidden & set(control.positions.tolist())
            assert math.isnan(control.score_sum)
            drawn |= set(control.positions.tolist())
    assert len(drawn) > 40  # of 64: not always the same corner


def test_random_controls_avoid_the_top_even_when_only_they_are_asked_for(neox, sequences):
    plan = plan_of(neox, [DENSE], selections=["random"], ks=[30], seeds=[0])
    (control,) = chosen(plan, neox, sequences)
    scores = naive_score(neox, sequences, f"{DENSE}.weight", "obd").view(-1).tolist()
    assert not set(naive_highest(scores, 30)) & set(control.positions.tolist())


def test_the_same_seed_draws_the_same_control_for_every_perturbation_and_another_for_every_seed(neox, sequences):
    perturbations = [Perturbation("zero"), Perturbation("sign_flip")]
    plan = plan_of(neox, selections=["random"], perturbations=perturbations, ks=[5])
    zero_0, zero_1, flip_0, flip_1 = (c.positions.tolist() for c in chosen(plan, neox, sequences))
    assert (zero_0, zero_1) == (flip_0, flip_1)
    assert zero_0 != zero_1


def test_a_list_shorter_than_k_gives_all_it_has_and_a_control_of_that_size(neox, sequences):
    plan = plan_of(neox, lists=[listed(f"{UP}.weight", [7, 3, 9])], ks=[2, 5])
    by = {(c.selection, c.k): c for c in chosen(plan, neox, sequences)}
    assert by["top_obd", 2].positions.tolist() == [7, 3]
    assert by["top_obd", 5].positions.tolist() == [7, 3, 9]
    assert by["top_obd", 5].score_sum == 6.0
    assert len(by["random", 5].positions) == 3
    assert not {7, 3, 9} & set(by["random", 5].positions.tolist())
    assert len(by["bottom_obd", 5].positions) == 5


def test_controls_of_two_lists_are_as_large_as_the_shorter(neox, sequences):
    lists = [listed(f"{UP}.weight", [7, 3, 9]), listed(f"{UP}.weight", [8, 2, 1, 0], "top_9_weights_taylor2.csv")]
    by = {(c.selection, c.k): c for c in chosen(plan_of(neox, lists=lists, ks=[5]), neox, sequences)}
    assert len(by["top_taylor2", 5].positions) == 4
    assert len(by["random", 5].positions) == 3
    assert not {7, 3, 9, 8, 2, 1, 0} & set(by["random", 5].positions.tolist())


def test_with_lists_and_without_bottom_no_gradient_is_taken(neox, sequences, monkeypatch):
    from llm_perturb import choose_weights as module

    monkeypatch.setattr(module, "target_scores", lambda *args: pytest.fail("a gradient was taken"))
    plan = plan_of(neox, lists=[listed(f"{UP}.weight", [7, 3, 9])], selections=["top", "random"])
    assert len(chosen(plan, neox, sequences)) == 2 + 4


def test_targets_in_several_passes_have_the_weights_of_one_pass(neox, sequences, monkeypatch):
    from llm_perturb import choose_weights as module

    plan = plan_of(neox, [UP, DENSE, "lm_head"])
    once = {c.key: c.positions.tolist() for c in chosen(plan, neox, sequences)}
    for limit in (200, 50):  # also below the weights of a single target
        monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", limit)
        assert {c.key: c.positions.tolist() for c in chosen(plan, neox, sequences)} == once


def test_conditions_whose_weights_are_known_come_first_and_as_they_are(neox, sequences):
    plan = plan_of(neox, [DENSE], selections=["random"], seeds=[0])
    first, second = single_weights(listed(f"{UP}.weight", [17, 3]), named_parameters(neox), [Perturbation("zero")], [0])
    copies = Copies((second,))
    units = choose_weights(plan, [*plan.conditions(), first, copies], neox, Corpus(sequences, {}))
    assert units[:2] == [first, copies]
    assert [len(unit.positions) for unit in units[2:]] == [2, 5]


def test_a_control_that_cannot_avoid_the_top_is_refused(neox, sequences):
    with pytest.raises(RequestError, match="random control of 33 weights is impossible: 31 of 64"):
        chosen(plan_of(neox, [DENSE], ks=[33]), neox, sequences)


# controls of the same magnitude, whole rows and columns, single weights


def test_matched_controls_are_others_of_nearly_the_same_magnitude(neox, sequences):
    plan = plan_of(neox, ["lm_head"], selections=["top", "matched", "random"], metrics=["obd", "magnitude"], ks=[20])
    by = {(c.selection, c.seed): c.positions for c in chosen(plan, neox, sequences)}
    tops = {*by["top_obd", None].tolist(), *by["top_magnitude", None].tolist()}
    magnitude = neox.lm_head.weight.abs().view(-1)
    for seed in (0, 1):
        matched = by["matched_obd", seed]
        assert len(set(matched.tolist())) == 20
        assert not tops & set(matched.tolist())
        gap = (magnitude[matched] - magnitude[by["top_obd", None]]).abs().mean()
        assert gap < 0.5 * (magnitude[by["random", seed]] - magnitude[by["top_obd", None]]).abs().mean()
    assert by["matched_obd", 0].tolist() != by["matched_obd", 1].tolist()
    excluded = torch.tensor(sorted(tops))
    for seed in (0, 1):
        for metric in ("obd", "magnitude"):
            key = [seed, "matched control", metric, "lm_head", 20]
            expected = draw_matched(magnitude, by[f"top_{metric}", None], excluded, key)
            assert by[f"matched_{metric}", seed].tolist() == expected.tolist()
        expected = draw(neox.lm_head.weight.numel(), 20, excluded, [seed, "random control", "", "lm_head", 20])
        assert by["random", seed].tolist() == expected.tolist()


@pytest.mark.parametrize(("axis", "label", "n"), [(0, "row", 20), (1, "col", 8)])
def test_rows_and_columns_are_those_of_the_stored_matrix(neox, axis, label, n):
    (target,) = plan_of(neox).targets
    conditions = lines(target, axis, [2, n - 1], [Perturbation("zero")], [0, 1])
    assert [(c.selection, c.seed) for c in conditions] == [
        (label, None), (label, None), (f"random_{label}", 0), (f"random_{label}", 1)
    ]  # fmt: skip
    for condition in conditions:
        index = getattr(condition, label)
        assert index is not None
        assert (index in {2, n - 1}) == (condition.selection == label)
        touched = torch.zeros(20 * 8)
        touched[condition.positions] = 1
        assert (touched.view(20, 8).select(axis, index) == 1).all()
        assert touched.sum() == len(condition.positions) == condition.k == 160 // n
    assert len({condition.key for condition in conditions}) == 4


@pytest.mark.parametrize(("layer", "indices", "message"), [
    (UP, [20], "--rows 20 is out of range"),
    (UP, [-1], "--rows -1 is out of range"),
    (UP, list(range(20)), "leaves no other row"),
    ("gpt_neox.layers.1", [0], "needs a TARGET_LAYER that is one matrix"),
    ("gpt_neox.final_layer_norm", [0], "needs a TARGET_LAYER that is one matrix"),
])  # fmt: skip
def test_rows_that_cannot_be_are_refused(neox, layer, indices, message):
    with pytest.raises(RequestError, match=message):
        lines(plan_of(neox, [layer]).targets[0], 0, indices, [Perturbation("zero")], [0])


def test_every_weight_of_a_list_is_a_condition_of_its_own(neox):
    named, name = named_parameters(neox), f"{UP}.weight"
    conditions = single_weights(listed(name, [17, 3]), named, [Perturbation("zero")], [0, 1])
    assert [(c.selection, c.k, c.seed, c.row, c.col) for c in conditions] == [
        ("weight", 1, None, 2, 1), ("weight", 1, None, 0, 3)
    ]  # fmt: skip
    assert [(c.positions.tolist(), c.score_sum) for c in conditions] == [([17], 2.0), ([3], 1.0)]
    (bias,) = single_weights(listed(f"{UP}.bias", [5]), named, [Perturbation("zero")], [0])
    assert (bias.row, bias.col, bias.positions.tolist()) == (5, None, [5])
    assert bias.target.parameters == {f"{UP}.bias": named[f"{UP}.bias"]}
    assert len({c.key for c in [*conditions, bias]}) == 3
