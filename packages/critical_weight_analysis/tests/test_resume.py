import json
import shutil
import struct

import pytest
import torch
from critical_weight_analysis.discovery import discover
from critical_weight_analysis.layerwise import engine
from critical_weight_analysis.layerwise.backward_checkpoints import Resume
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.layerwise.saved_state import StateError, read_state, write_state
from engines import LAYERWISE
from llm_perturb.evaluation.parameters import in_scope

METRICS = ["grad_x_weight", "grad_squared", "wanda", "obd"]
IDENTITY = {"batch_size": 2}


class KilledError(Exception):
    pass


class Word:
    """A collector of one word."""

    def __init__(self, word=""):
        self.word = word

    def state(self):
        return {"word": torch.tensor(list(self.word.encode()), dtype=torch.uint8)}

    def restore(self, state):
        if "word" not in state:
            raise StateError("expected a word")
        self.word = bytes(state["word"].tolist()).decode()


class Two:
    """The first of two processes, of which the other has the states of layers 1 and 2."""

    rank, world = 0, 2

    def gather(self, item):
        return [item, {1, 2} if isinstance(item, set) else item]


def save(folder, layers, word="", gradients=(), **options):
    resume = Resume(folder, IDENTITY, **options)
    resume.attach({"word": Word(word)})
    resume._written = 0.0
    resume.save(layers, list(gradients))


def restored(folder, processes=None, name="word"):
    """The layers done and the word of the state in a folder, with the warnings on the way."""
    collector, warnings = Word("nothing"), []
    resume = Resume(folder, IDENTITY, processes, warnings.append)
    resume.attach({name: collector})
    return resume.layers, collector.word, warnings


def tables(model, sequences, resume=None):
    settings = Settings(batch_size=2, resume=resume)
    found = discover(LAYERWISE, model, sequences, in_scope(model), METRICS, 20, settings=settings)
    frames = [found.sampled, *(ranking.top(20) for ranking in found.rankings.values())]
    frames += [ranking.top_per_layer(5) for ranking in found.rankings.values()]
    frames += [summary.table({}) for summary in found.summaries.values()]
    frames += [found.controls.bottom(metric, 20) for metric in METRICS]
    return [*frames, found.controls.random(20, found.rankings.values())]


def killed_after(monkeypatch, model, sequences, folder, n_parameters):
    """Run until the sums of that many parameters are known, then die."""
    known = []

    def finish(self, original=engine.GradientSums.finish):
        if len(known) == n_parameters:
            raise KilledError
        known.append(self.name)
        return original(self)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(engine.GradientSums, "finish", finish)
        tables(model, sequences, Resume(folder, IDENTITY))


@pytest.mark.slow
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
    computed, original = set(), engine._Pass._back_through_layer

    def counted(self, layer, sums, numbered_batch):
        computed.add(layer)
        return original(self, layer, sums, numbered_batch)

    monkeypatch.setattr(engine._Pass, "_back_through_layer", counted)
    for one, other in zip(tables(model, sequences, resume), truth, strict=True):
        assert one.equals(other)
    assert len(set(computed)) == 3 - resume.layers
    resume.clear()
    assert list(tmp_path.iterdir()) == []


def test_state_of_other_batches_is_not_used(tiny_model, sequences, monkeypatch, tmp_path):
    model = tiny_model("llama")
    killed_after(monkeypatch, model, sequences, tmp_path, 12)
    assert Resume(tmp_path, IDENTITY).layers
    assert Resume(tmp_path, {"batch_size": 3}).layers == 0


def test_last_state_that_every_process_has(tmp_path):
    resume, word = Resume(tmp_path, IDENTITY), Word()
    resume.attach({"word": word})
    for layers in (1, 2, 3):
        resume._written = 0.0
        word.word = f"after {layers}"
        resume.save(layers, [torch.zeros(1)])
    names = ["resume-0-2.safetensors", "resume-0-3.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert restored(tmp_path) == (3, "after 3", [])
    assert restored(tmp_path, Two()) == (2, "after 2", [])


def test_writing_takes_a_small_part_of_the_time(tmp_path):
    resume = Resume(tmp_path, IDENTITY)
    resume.save(1, [])
    resume._took = 1000.0
    resume.save(2, [])
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0-1.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_come_back_bit_for_bit_and_in_order(tmp_path, dtype):
    gradients = [torch.randn(2, n + 1, 4, dtype=torch.float64).to(dtype) for n in range(12)]
    gradients[0].view(-1)[:3] = torch.tensor([-0.0, torch.nan, torch.inf])
    gradients[1] = gradients[1].transpose(0, 2)
    gradients += [torch.zeros(3, 4, dtype=dtype)[::9, :0], torch.ones(3, 4, dtype=dtype)[::9, ::9]]
    save(tmp_path, 1, gradients=gradients)
    back = Resume(tmp_path, IDENTITY).take_gradients()
    for one, other in zip(back, gradients, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        other = other.clone(memory_format=torch.contiguous_format)
        assert torch.equal(one.clone().view(torch.uint8), other.view(torch.uint8))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "one bit of the tensors": lambda path: flip(path, -1),
    "one bit of the header": lambda path: flip(path, path.read_bytes().index(b"batch_size")),
    "no length": lambda path: path.write_bytes(struct.pack("<Q", 2**63)),
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_set_aside_and_the_one_before_is_taken(tmp_path, damage):
    save(tmp_path, 1, "one", [torch.ones(3)])
    save(tmp_path, 2, "two", [torch.ones(3)])
    last = tmp_path / "resume-0-2.safetensors"
    DAMAGES[damage](last)
    layers, word, (warning,) = restored(tmp_path)
    assert (layers, word) == (1, "one")
    assert warning.startswith(f"{last} cannot be used (")
    assert "it is now resume-0-2.safetensors.damaged, and what only it held is computed again" in warning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resume-0-1.safetensors", f"{last.name}.damaged"]
    assert restored(tmp_path) == (1, "one", [])


def test_a_state_that_does_not_fit_restores_nothing(tmp_path):
    save(tmp_path, 2, "two")
    first, second, warnings = Word("first"), Word("second"), []
    resume = Resume(tmp_path, IDENTITY, warn=warnings.append)
    resume.attach({"word": first, "another": second})
    assert (resume.layers, first.word, second.word) == (0, "first", "second")
    assert len(warnings) == 1 and "(expected a word)" in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0-2.safetensors.damaged"]


def test_a_state_of_a_later_format_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr("critical_weight_analysis.layerwise.backward_checkpoints._FORMAT", 99)
    save(tmp_path, 2, "two")
    monkeypatch.undo()
    assert restored(tmp_path) == (0, "nothing", [])


def test_a_state_of_other_batches_does_not_hide_an_earlier_one(tmp_path):
    save(tmp_path, 1, "one")
    write_state(tmp_path / "resume-0-5.safetensors", {"identity": {"batch_size": 3}, "layers": 5}, {})
    assert restored(tmp_path) == (1, "one", [])


def test_what_a_killed_process_was_writing_is_removed_and_never_read(tmp_path):
    save(tmp_path, 1, "one")
    shutil.copy(tmp_path / "resume-0-1.safetensors", tmp_path / ".resume-0-2.safetensors.77.tmp")
    assert restored(tmp_path) == (1, "one", [])
    assert [path.name for path in tmp_path.iterdir()] == ["resume-0-1.safetensors"]


def test_all_files_are_removed_in_the_end_and_no_others(tmp_path):
    mine = ["resume-0-1.pt", "resume-0-2.tmp", "resume-2-1.safetensors", "resume-0-3.safetensors.damaged"]
    others = ["resume-1-1.safetensors", "resume-3-7.pt", "top_5_weights.csv", "resume-x-1.safetensors"]
    for name in [*mine, *others]:
        (tmp_path / name).write_text("anything")
    others.append("resume-0-4.safetensors.damaged")
    (tmp_path / others[-1]).mkdir()
    Resume(tmp_path, IDENTITY, Two()).clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("damage", ["cut", "one bit of the tensors"])
def test_killed_pass_with_a_damaged_state_finds_the_same(tiny_model, sequences, monkeypatch, tmp_path, damage):
    model = tiny_model("llama")
    truth = tables(model, sequences)
    killed_after(monkeypatch, model, sequences, tmp_path, len(in_scope(model)) - 1)
    last = max(tmp_path.iterdir())
    DAMAGES[damage](last)
    warnings = []
    resume = Resume(tmp_path, IDENTITY, warn=warnings.append)
    for one, other in zip(tables(model, sequences, resume), truth, strict=True):
        assert one.equals(other)
    assert len(warnings) == 1


def test_state_file_is_plain_safetensors(tmp_path):
    save(tmp_path, 1, "one", [torch.ones(3)])
    content = (tmp_path / "resume-0-1.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert set(header) == {"__metadata__", "gradients/0", "results/word/word"}
    assert set(header["__metadata__"]) == {"header", "sha256"}
    assert read_state(tmp_path / "resume-0-1.safetensors")[0] == {"identity": {"format": 2, **IDENTITY}, "layers": 1}
