import pandas as pd
import pytest
import torch
from bridge.exchange.tables import TOP_WEIGHTS, read_table, write_table
from critical_weight_analysis.control_lists import Controls
from critical_weight_analysis.discovery import discover, engine_for
from critical_weight_analysis.metrics import METRICS, Sensitivity
from critical_weight_analysis.ranking import Ranking
from critical_weight_analysis.whole_model import WholeModelEngine
from llm_perturb.evaluation.parameters import in_scope, named_parameters
from llm_perturb.weights_csv import read_weight_list
from reference import naive_score, naive_sensitivities, naive_top

NAMES = [metric for metric in METRICS if METRICS[metric].needs <= WholeModelEngine.gives]
SHAPES = {"a.weight": (6, 5), "b.weight": (4,), "c.weight": (7, 3), "d.weight": (1, 1)}
N = 30 + 4 + 21 + 1


def places(frame):
    cols = [None if pd.isna(col) else int(col) for col in frame["col"]]
    return list(zip(frame["parameter"], frame["row"], cols, strict=True))


def collected(scores, k, seed=0, order=None):
    """Controls and ranking of one metric after all parameters; the weights are twice the scores."""
    controls, ranking = Controls(SHAPES, ["magnitude"], k, seed), Ranking(SHAPES, k)
    for name in order or SHAPES:
        ranking.update(name, 2 * scores[name], scores[name])
        controls.update("magnitude", Sensitivity(name, 2 * scores[name]), scores[name])
    return controls, ranking


def some_scores(n_levels=10**6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(n_levels, shape, generator=generator).float() for name, shape in SHAPES.items()}


def naive_bottom(scores, k):
    """The lowest by a sort of everything; ``naive_top`` of the negated scores keeps the order of ties."""
    return [(*line[:3], -line[3]) for line in naive_top({name: -s for name, s in scores.items()}, k)]


@pytest.mark.parametrize("n_levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("k", [1, 9, N - 1, N])
@pytest.mark.parametrize("order", [1, -1])
def test_bottom_is_the_full_sort(n_levels, k, order):
    scores = some_scores(n_levels)
    bottom = collected(scores, k, order=list(SHAPES)[::order])[0].bottom("magnitude", k)
    assert bottom["rank"].tolist() == list(range(1, k + 1))
    lines = [(*place, score) for place, score in zip(places(bottom), bottom["score"], strict=True)]
    assert lines == naive_bottom(scores, k)
    assert bottom["value"].tolist() == [2 * score for score in bottom["score"]]


@pytest.mark.slow
def test_bottom_and_random_of_one_pass(model, sequences):
    parameters = in_scope(model)  # the gradient of a key bias is rounding alone
    found = discover(engine_for(model), model, sequences, parameters, NAMES, 60, seed=3)
    naive = naive_sensitivities(model, sequences)
    by_metric = {metric: {name: naive_score(metric, naive, name) for name in parameters} for metric in NAMES}
    tops = {line[:3] for scores in by_metric.values() for line in naive_top(scores, 60)}
    for metric, scores in by_metric.items():
        bottom = found.controls.bottom(metric, 60)
        expected = naive_bottom(scores, 60)
        assert bottom["score"].tolist() == pytest.approx([line[3] for line in expected], rel=1e-9, abs=1e-30)
        here = [scores[name][row if col is None else (row, col)].item() for name, row, col in places(bottom)]
        assert bottom["score"].tolist() == pytest.approx(here, rel=1e-9, abs=1e-30)
    random = found.controls.random(60, found.rankings.values())
    assert len(set(places(random))) == 60
    assert not tops & set(places(random))
    at = [(name, row if col is None else (row, col)) for name, row, col in places(random)]
    assert random["value"].tolist() == [parameters[name][index].item() for name, index in at]
    first = by_metric[NAMES[0]]
    assert random["score"].tolist() == pytest.approx([first[name][index].item() for name, index in at], rel=1e-9)


@pytest.mark.parametrize("order", [1, -1])
def test_no_more_is_held_than_the_lowest_of_all_parameters_together(order):
    controls, _ = collected(some_scores(), 9, order=list(SHAPES)[::order])
    assert len(controls.state()["lowest/magnitude/index"]) == 9


def test_a_smaller_random_list_is_the_beginning_of_a_larger_one():
    controls, ranking = collected(some_scores(), 12)
    pd.testing.assert_frame_equal(controls.random(5, [ranking]), controls.random(12, [ranking]).head(5))


def test_random_depends_on_the_seed_and_not_on_the_order_of_the_parameters():
    scores = some_scores()
    draws = {seed: collected(scores, 12, seed) for seed in (0, 1)}
    frames = {seed: controls.random(12, [ranking]) for seed, (controls, ranking) in draws.items()}
    assert places(frames[0]) != places(frames[1])
    controls, ranking = collected(scores, 12, 0, order=reversed(SHAPES))
    pd.testing.assert_frame_equal(controls.random(12, [ranking]), frames[0])


@pytest.mark.slow
def test_every_weight_outside_of_the_top_is_drawn_equally_often():
    scores, n_draws = some_scores(), 500
    top = set(places(collected(scores, 6)[1].top(6)))
    counts = pd.Series([place for s in range(n_draws) for place in _random_places(scores, s)]).value_counts()
    assert not top & set(counts.index)
    assert len(counts) == N - 6
    expected = n_draws * 6 / (N - 6)  # a binomial, its standard deviation about 7
    assert (counts - expected).abs().max() < 5 * expected**0.5


def _random_places(scores, seed):
    controls, ranking = collected(scores, 6, seed)
    return places(controls.random(6, [ranking]))


@pytest.mark.parametrize(("k", "left"), [(40, N - 40), (N, 0)])
def test_no_more_than_there_are_outside(k, left):
    controls, ranking = collected(some_scores(), k)
    assert len(controls.random(k, [ranking])) == left


def test_the_instrument_reads_both_lists(tiny_model, sequences, tmp_path):
    model = tiny_model("gpt2", torch.float32)
    found = discover(engine_for(model), model, sequences, in_scope(model, "all"), ["grad_x_weight"], 9)
    frames = {
        "random_9_weights.csv": found.controls.random(9, found.rankings.values()),
        "bottom_9_weights_grad_x_weight.csv": found.controls.bottom("grad_x_weight", 9),
    }
    for name, frame in frames.items():
        write_table(tmp_path / name, frame, TOP_WEIGHTS)
        pd.testing.assert_frame_equal(read_table(tmp_path / name, TOP_WEIGHTS), frame, check_dtype=False)
        weights = read_weight_list(str(tmp_path / name), named_parameters(model))
        assert weights.names.tolist() == frame["parameter"].tolist()
        assert weights.scores.tolist() == frame["score"].tolist()
