from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from bridge.exchange.errors import RunError
from critical_weight_analysis import discovery
from critical_weight_analysis.discovery import discover, engine_for, scores_of
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import METRICS, Sensitivity
from engines import WHOLE_MODEL
from llm_perturb.evaluation.parameters import in_scope
from reference import naive_score, naive_sensitivities, naive_top

NAMES = [metric for metric in METRICS if METRICS[metric].needs <= WHOLE_MODEL.gives]


def rows(frame):
    cols = [None if pd.isna(col) else int(col) for col in frame["col"]]
    return list(zip(frame["parameter"], frame["row"], cols, strict=True))


@pytest.mark.parametrize("scope", ["matrices", "all"])
def test_every_ranking_of_one_pass_is_the_full_sort(model, sequences, scope):
    parameters = in_scope(model, scope)
    found = discover(engine_for(model), model, sequences, parameters, NAMES, 200)
    naive = naive_sensitivities(model, sequences)
    torch.testing.assert_close(found.losses, naive.losses, rtol=1e-9, atol=0)
    for metric in NAMES:
        scores = {name: naive_score(metric, naive, name) for name in parameters}
        expected = naive_top(scores, 200)
        top = found.rankings[metric].top(200)
        assert rows(top) == [line[:3] for line in expected]
        assert top["score"].tolist() == pytest.approx([line[3] for line in expected], rel=1e-9)
        within = found.rankings[metric].top_per_layer(3)
        assert rows(within) == [line[:3] for name, s in scores.items() for line in naive_top({name: s}, 3)]
        summary = found.summaries[metric].table({200: top})
        assert summary["parameter"].tolist() == list(parameters)
        assert summary["in_top_200"].sum() == 200
        assert summary["score_sum"].tolist() == pytest.approx([s.sum().item() for s in scores.values()], rel=1e-9)


@pytest.mark.slow
def test_batch_size_changes_no_ranking(model, sequences):
    parameters = in_scope(model)
    tops = [
        discover(engine_for(model), model, sequences, parameters, NAMES, 50, settings=Settings(batch_size=b)).rankings
        for b in (1, 3, 8)
    ]
    for metric in NAMES:
        first, *others = (rankings[metric].top(50) for rankings in tops)
        for other in others:
            pd.testing.assert_frame_equal(first, other, rtol=1e-9)


def test_tied_tensor_is_ranked_once_under_its_first_name(tiny_model, sequences):
    model = tiny_model("gpt2")
    parameters = in_scope(model, "matrices", include=["*wte*", "*lm_head*"])
    found = discover(engine_for(model), model, sequences, parameters, ["magnitude"], 50 * 8)
    assert set(found.rankings["magnitude"].top(50 * 8)["parameter"]) == {"transformer.wte.weight"}


def test_losses_come_before_the_first_score_and_may_stop_the_run(tiny_model, sequences):
    model = tiny_model("neox")
    seen = []

    def stop(losses):
        seen.append(len(losses))
        raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        discover(WHOLE_MODEL, model, sequences, in_scope(model), ["obd"], 5, on_losses=stop)
    assert seen == [len(sequences)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("metric", NAMES)
def test_score_that_is_not_finite_names_metric_and_parameter(metric, bad):
    tensor = torch.ones(2, 3)
    tensor[1, 1] = bad
    sensitivity = Sensitivity("a.b.weight", tensor, grad=tensor, fisher=tensor, curvature=tensor)
    with pytest.raises(RunError, match=f"score {metric} of a.b.weight is not finite at 1 of 6 weights"):
        scores_of(metric, sensitivity)


def test_gradient_that_is_not_finite_stops_the_pass(tiny_model, sequences):
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"

    def broken(*arguments):
        losses, stream = WHOLE_MODEL.sensitivities(*arguments)
        return losses, (spoil(sensitivity) if sensitivity.name == name else sensitivity for sensitivity in stream)

    def spoil(sensitivity):
        sensitivity.grad[0, 0] = torch.inf
        return sensitivity

    engine = SimpleNamespace(sensitivities=broken, gives=WHOLE_MODEL.gives)
    with pytest.raises(RunError, match=f"grad_x_weight of {name} is not finite"):
        discover(engine, model, sequences, in_scope(model), ["grad_x_weight"], 5)


def test_scores_of_a_large_parameter_are_taken_by_one_metric_after_the_other(tiny_model, sequences, monkeypatch):
    model = tiny_model("llama")
    expected = discover(engine_for(model), model, sequences, in_scope(model), NAMES, 50)
    monkeypatch.setattr(discovery, "TOGETHER", 0)
    monkeypatch.setattr(discovery, "on_cores", lambda *args: pytest.fail("several at a time"))
    found = discover(engine_for(model), model, sequences, in_scope(model), NAMES, 50)
    for metric in NAMES:
        assert found.rankings[metric].top(50).equals(expected.rankings[metric].top(50))
