import pytest
import torch
from critical_weight_analysis.discovery import discover
from critical_weight_analysis.layerwise import engine
from critical_weight_analysis.layerwise.backward_checkpoints import Resume
from critical_weight_analysis.layerwise.pass_settings import Settings
from llm_perturb.evaluation.parameters import in_scope

METRICS = ["grad_x_weight", "grad_squared", "wanda", "obd"]
IDENTITY = {"batch_size": 2}


class KilledError(Exception):
    pass


def tables(model, sequences, resume=None):
    settings = Settings(batch_size=2, resume=resume)
    found = discover(engine, model, sequences, in_scope(model), METRICS, 20, settings=settings)
    frames = [found.sampled, *(ranking.top(20) for ranking in found.rankings.values())]
    frames += [ranking.top_per_layer(5) for ranking in found.rankings.values()]
    frames += [summary.table({}) for summary in found.summaries.values()]
    frames += [found.controls.bottom(metric, 20) for metric in METRICS]
    return [*frames, found.controls.random(20, found.rankings.values())]


def killed_after(monkeypatch, model, sequences, folder, n_parameters):
    """Run until the sums of that many parameters are known, then die."""
    known = []

    def finish(self, original=engine.Sums.finish):
        if len(known) == n_parameters:
            raise KilledError
        known.append(self.name)
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(engine.Sums, "finish", finish)
        tables(model, sequences, Resume(folder, IDENTITY))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # their products have kernels of their own
@pytest.mark.parametrize("n_parameters", [0, 3, 7, 9, 11])
def test_killed_pass_goes_on_and_finds_the_same(model, sequences, monkeypatch, tmp_path, n_parameters, dtype):
    model = model.to(dtype)
    truth = tables(model, sequences)
    killed_after(monkeypatch, model, sequences, tmp_path, n_parameters)
    resume = Resume(tmp_path, IDENTITY)
    in_last = [name for name in in_scope(model) if ".2." in name]
    after = [name for name in in_scope(model) if name == "lm_head.weight"]
    assert (resume.layers > 0) == (n_parameters >= len(after) + len(in_last))
    computed, original = [], engine._Pass._layer

    def counted(self, layer, sums):
        computed.append(layer)
        return original(self, layer, sums)

    monkeypatch.setattr(engine._Pass, "_layer", counted)
    for one, other in zip(tables(model, sequences, resume), truth, strict=True):
        assert one.equals(other)
    assert len(computed) == 3 - resume.layers
    resume.clear()
    assert list(tmp_path.iterdir()) == []


def test_state_of_other_batches_is_not_used(tiny_model, sequences, monkeypatch, tmp_path):
    model = tiny_model("llama")
    killed_after(monkeypatch, model, sequences, tmp_path, 12)
    assert Resume(tmp_path, IDENTITY).layers
    assert Resume(tmp_path, {"batch_size": 3}).layers == 0


def test_last_state_that_every_process_has(tmp_path):
    class Two:
        rank, world = 0, 2

        def gather(self, item):
            return [item, {1, 2} if isinstance(item, set) else item]

    resume = Resume(tmp_path, IDENTITY)
    for layers in (1, 2, 3):
        resume._written = 0.0
        resume.found = f"after {layers}"
        resume.save(layers, [torch.zeros(1)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resume-0-2.pt", "resume-0-3.pt"]
    assert Resume(tmp_path, IDENTITY).found == "after 3"
    assert Resume(tmp_path, IDENTITY, Two()).found == "after 2"


def test_writing_takes_a_small_part_of_the_time(tmp_path):
    resume = Resume(tmp_path, IDENTITY)
    resume.save(1, [])
    resume._took = 1000.0
    resume.save(2, [])
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0-1.pt"]
