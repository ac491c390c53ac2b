"""Which processes may start, and on what; what several of them compute is in test_perturbation_run.py."""

from types import SimpleNamespace

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation import processes


@pytest.fixture
def machine(monkeypatch):
    """A machine with two GPUs; the fixture is the list of what the processes' state is made with."""
    made = []

    def state(cpu: bool) -> SimpleNamespace:
        made.append(cpu)
        return SimpleNamespace(process_index=0, num_processes=3, device=torch.device("cpu" if cpu else "cuda"))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "PartialState", state)
    monkeypatch.setattr(processes, "_share_cores", lambda world: made.append(world))
    return made


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_needs_a_gpu_of_its_own(machine, monkeypatch, device):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    message = "^3 processes were started on a machine with 2 GPUs, .*; start 2, or give --device cpu$"
    with pytest.raises(RequestError, match=message):
        processes.Processes(device)
    assert machine == []


@pytest.mark.parametrize("here", ["2", None], ids=["several machines", "no launcher"])
def test_the_gpus_of_this_machine_are_counted_against_its_own_processes(machine, monkeypatch, here):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert processes.Processes("auto").device.type == "cuda"
    assert machine == [False]


def test_on_the_cpu_processes_take_no_gpu_and_share_the_cores(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert processes.Processes("cpu").device.type == "cpu"
    assert machine == [True, 3]
