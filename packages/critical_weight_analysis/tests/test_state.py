"""What each collector saves comes back bit for bit, and what does not fit it is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from critical_weight_analysis.control_lists import Controls
from critical_weight_analysis.highest_scores import top_indices
from critical_weight_analysis.layer_summary import Summary
from critical_weight_analysis.layerwise.saved_state import StateError, nested, read_state, within, write_state
from critical_weight_analysis.metrics import METRICS, Sensitivity
from critical_weight_analysis.ranking import Ranking
from critical_weight_analysis.sampling import N_HEAD, Sample

SHAPES = {"a.weight": (6, 5), "b.weight": (4,), "c.weight": (7, 3), "d.weight": (1, 1)}
NAMES = ["magnitude", "grad_x_weight"]
K = 9


def sensitivity(name):
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    weight, grad = torch.randn(2, *SHAPES[name], generator=generator, dtype=torch.float64)
    return Sensitivity(name, weight, grad=grad / 3)


class Collected:
    """All collectors, filled parameter by parameter as a pass does it."""

    def __init__(self, per_layer=True, shapes=SHAPES, metrics=NAMES, seed=0):
        self.metrics = metrics
        self.rankings = {metric: Ranking(shapes, K, per_layer) for metric in metrics}
        self.summaries = {metric: Summary(list(shapes)) for metric in metrics}
        self.controls, self.sample = Controls(shapes, metrics, K, seed), Sample(shapes, metrics)
        groups = {"rankings": self.rankings, "summaries": self.summaries}
        self.by_name = nested(groups) | {"controls": self.controls, "sample": self.sample}

    def fill(self, names):
        for name in names:
            here = sensitivity(name)
            for metric in self.metrics:
                scores = METRICS[metric].score(here)
                self.rankings[metric].update(name, here.weight, scores)
                self.summaries[metric].update(name, scores)
                self.controls.update(metric, here, scores)
            self.sample.update(here, [top_indices(METRICS[metric].score(here), N_HEAD) for metric in self.metrics])
        return self

    def tables(self):
        rankings = self.rankings.values()
        tops = [ranking.top(K) for ranking in rankings]
        within_each = [ranking.top_per_layer(4) for ranking in rankings if ranking.per_layer]
        summaries = [summary.table({K: top}) for summary, top in zip(self.summaries.values(), tops, strict=True)]
        controls = [*(self.controls.bottom(metric, K) for metric in self.metrics), self.controls.random(K, rankings)]
        return [*tops, *within_each, *summaries, *controls, self.sample.table()]


@pytest.mark.parametrize("per_layer", [True, False])
@pytest.mark.parametrize("n", range(len(SHAPES) + 1))
def test_tables_are_the_same_wherever_the_state_was_saved(tmp_path, per_layer, n):
    order = ["c.weight", "a.weight", "d.weight", "b.weight"]
    first, second = Collected(per_layer).fill(order[:n]), Collected(per_layer)
    path = tmp_path / "state.safetensors"
    write_state(path, {}, nested({name: collector.state() for name, collector in first.by_name.items()}))
    _, tensors = read_state(path)
    for name, collector in second.by_name.items():
        collector.restore(within(tensors, name))
    expected = Collected(per_layer).fill(order).tables()
    for one, other in zip(second.fill(order[n:]).tables(), expected, strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
        assert one.to_csv() == other.to_csv()


def test_restoring_replaces_all_that_was_there():
    blank = {name: collector.state() for name, collector in Collected().by_name.items()}
    used = Collected().fill(["a.weight", "b.weight"])
    for name, collector in used.by_name.items():
        collector.restore(blank[name])
    for one, other in zip(used.fill(SHAPES).tables(), Collected().fill(SHAPES).tables(), strict=True):
        pd.testing.assert_frame_equal(one, other, check_exact=True)


COLLECTORS = list(Collected().by_name)


@pytest.mark.parametrize("name", COLLECTORS)
def test_what_is_missing_or_of_another_type_is_refused(name):
    collector = Collected().fill(SHAPES).by_name[name]
    state = collector.state()
    for key, tensor in state.items():
        without = {other: value for other, value in state.items() if other != key}
        with pytest.raises(StateError, match="expected a column"):
            collector.restore(without)
        with pytest.raises(StateError, match="expected a column"):
            collector.restore(state | {key: tensor.to(torch.float16)})
        with pytest.raises(StateError, match=r"not of one length|other control weights|expected a column"):
            collector.restore(state | {key: tensor[1:] if len(tensor) else torch.tensor(0)})


@pytest.mark.parametrize("name", [name for name in COLLECTORS if name != "controls"])
@pytest.mark.parametrize("number", [-1, len(SHAPES), 2**62])
def test_parameters_that_the_model_does_not_have_are_refused(name, number):
    collector = Collected().fill(SHAPES).by_name[name]
    state = collector.state()
    state["parameter"][-1] = number
    with pytest.raises(StateError, match="a parameter is not of this model"):
        collector.restore(state)


def test_a_parameter_that_occurs_twice_is_refused():
    ranking = Collected().fill(SHAPES).rankings["magnitude"]
    state = {name: torch.cat([column, column]) for name, column in ranking.state().items()}
    with pytest.raises(StateError, match="occurs twice"):
        ranking.restore(state)


def test_controls_of_another_seed_and_a_sample_of_other_metrics_are_refused():
    state = Collected(seed=1).fill(SHAPES).controls.state()
    with pytest.raises(StateError, match="other control weights were drawn then"):
        Collected(seed=0).controls.restore(state)
    state = Collected().fill(SHAPES).controls.state()
    for key in ("drawn/parameter", "drawn/index"):
        with pytest.raises(StateError, match="other control weights were drawn then"):
            Collected().controls.restore(state | {key: state[key].flip(0)})
    for metrics, others in [(NAMES, NAMES[:1]), (NAMES[:1], NAMES)]:
        state = Collected(metrics=metrics).fill(SHAPES).sample.state()
        with pytest.raises(StateError, match="of other metrics"):
            Collected(metrics=others).sample.restore(state)


def test_every_float64_survives_a_summary(tmp_path):
    numbers = np.frombuffer(np.random.default_rng(0).bytes(8 * 400), dtype=np.float64)
    numbers = [*numbers[np.isfinite(numbers)].tolist(), 0.1, 5e-324, 1.7976931348623157e308, -0.0]
    names = [f"p{n}.weight" for n in range(len(numbers))]
    summary, other = Summary(names), Summary(names)
    for name, value in zip(names, numbers, strict=True):
        summary.update(name, torch.tensor([value], dtype=torch.float64))
    write_state(tmp_path / "s", {}, summary.state())
    other.restore(read_state(tmp_path / "s")[1])
    assert [f.hex() for f in other.table({})["score_max"]] == [f.hex() for f in numbers]
    assert other.table({}).map(type).equals(summary.table({}).map(type))
