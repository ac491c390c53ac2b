import threading

import pytest
import torch
from critical_weight_analysis.layerwise.parallel import MOST, n_cores, on_cores
from reference import naive_sensitivities
from test_layerwise_engine import ALL, assert_same_sums, measure

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_from_several_threads(threads):
    both = threading.Barrier(2, timeout=30)

    def work(item):
        if item < 2:
            both.wait()  # passes only if two are at work together
        return item, threading.current_thread().name, torch.get_num_threads()

    results = on_cores(CPU, work, range(7))
    assert [item for item, *_ in results] == list(range(7))
    assert len({name for _, name, _ in results}) > 1
    assert {n for *_, n in results} == {threads // n_cores(CPU)}
    assert torch.get_num_threads() == threads
    assert n_cores(CPU) == min(threads, MOST)


def test_a_gpu_gets_one_piece_at_a_time(threads):
    assert n_cores(torch.device("cuda")) == 1
    names = on_cores(torch.device("cuda"), lambda item: threading.current_thread().name, range(3))
    assert set(names) == {threading.current_thread().name}


def test_an_error_is_raised_after_all_have_ended_and_the_threads_are_given_back(threads):
    ended = []

    def work(item):
        if item == 1:
            raise ValueError("piece 1")
        ended.append(item)

    with pytest.raises(ValueError, match="piece 1"):
        on_cores(CPU, work, range(6))
    assert sorted(ended) == [0, 2, 3, 4, 5]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("with_gradients", [False, True])
def test_gradients_are_recorded_as_where_it_was_called(threads, with_gradients):
    x = torch.ones(2, requires_grad=True)
    with torch.set_grad_enabled(with_gradients):
        results = on_cores(CPU, lambda item: item * x, range(3))
    assert [result.requires_grad for result in results] == [with_gradients] * 3


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_sums_on_several_cores_are_those_of_autograd(threads, model, sequences, batch_size):
    naive = naive_sensitivities(model, sequences)
    _, found = measure(model, sequences, batch_size=batch_size)
    assert_same_sums(found, naive, ALL)


def test_sums_on_several_cores_are_the_same_bits_every_time(threads, tiny_model, sequences):
    model = tiny_model("llama")
    runs = [measure(model, sequences, batch_size=2)[1] for _ in range(3)]
    for name, first in runs[0].items():
        for run in runs[1:]:
            for field in ALL:
                assert torch.equal(getattr(first, field), getattr(run[name], field)), (name, field)
