import pytest
import torch
from critical_weight_analysis.layerwise import hidden_states
from critical_weight_analysis.layerwise.hidden_states import HiddenStates, storage_for
from critical_weight_analysis.layerwise.pass_settings import Settings
from engines import LAYERWISE
from reference import naive_sensitivities

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", ["memory", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_put_comes_back_once(monkeypatch, tmp_path, place, dtype):
    monkeypatch.setattr(hidden_states, "storage_for", lambda n_bytes, device: place)
    states = HiddenStates(0, CPU, tmp_path)
    tensors = {("a", number): torch.randn(2, 3 + number, 4).to(dtype) for number in range(3)}
    for key, tensor in tensors.items():
        states.put(key, tensor)
    assert len(list(tmp_path.rglob("*-*"))) == (4 if place == "file" else 0)
    for key, tensor in tensors.items():
        assert torch.equal(states.take(key), tensor)
    with pytest.raises(KeyError):
        states.take(("a", 0))
    assert not list(tmp_path.rglob("a-*"))
    del states
    assert list(tmp_path.iterdir()) == []


def test_files_are_used_where_memory_does_not_suffice():
    assert storage_for(10**3, CPU) == "memory"
    assert storage_for(10**15, CPU) == "file"


@pytest.mark.slow
def test_pass_with_files_is_exact(model, sequences, monkeypatch, tmp_path):
    monkeypatch.setattr(hidden_states, "storage_for", lambda n_bytes, device: "file")
    names = [name for name, _ in model.named_parameters()]
    settings = Settings(batch_size=2, scratch=tmp_path)
    _, stream = LAYERWISE.sensitivities(model, sequences, names, frozenset({"grad"}), settings)
    naive = naive_sensitivities(model, sequences)
    for found in stream:
        torch.testing.assert_close(found.grad, naive.grad[found.name], rtol=1e-9, atol=1e-13)
