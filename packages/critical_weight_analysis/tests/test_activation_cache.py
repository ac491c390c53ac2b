import pytest
import torch
from critical_weight_analysis.layerwise import activation_cache, engine
from critical_weight_analysis.layerwise.activation_cache import ActivationCache, bytes_to_spare, only_added
from engines import LAYERWISE, structure_of
from reference import naive_sensitivities
from test_layerwise_engine import ALL, assert_same_sums, measure
from torch.nn.functional import linear


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 3000, 1 << 30])
def test_budget_changes_no_sum(model, sequences, monkeypatch, left):
    monkeypatch.setattr(engine, "bytes_to_spare", lambda parameters: left)
    naive = naive_sensitivities(model, sequences)
    _, found = measure(model, sequences, batch_size=2)
    assert_same_sums(found, naive, ALL)


def test_budget_is_given_back_and_never_exceeded(tiny_model, sequences, monkeypatch):
    lowest, caches = [], set()
    monkeypatch.setattr(engine, "bytes_to_spare", lambda parameters: 3000 * len(sequences))
    compute = ActivationCache._compute
    look = lambda self, *call: (compute(self, *call), caches.add(self), lowest.append(self.budget))[0]  # noqa: E731
    monkeypatch.setattr(ActivationCache, "_compute", look)
    measure(tiny_model("llama"), sequences)
    assert 0 <= min(lowest) < 1000
    assert [cache.budget for cache in caches] == [3000] * len(sequences)


def test_second_run_computes_no_product_that_is_kept(tiny_model, sequences, monkeypatch):
    monkeypatch.setattr(engine, "bytes_to_spare", lambda parameters: 1 << 30)
    model = tiny_model("llama")
    products = []
    known = activation_cache._KnownResult.apply
    monkeypatch.setattr(
        activation_cache._KnownResult, "apply", lambda *call: (products.append(call[1]), known(*call))[1]
    )
    measure(model, sequences[:1])
    assert len(products) == 3 * 7


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama", ["down_proj"]),
        ("gpt2", ["mlp.c_proj"]),
        ("neox", ["attention.dense", "dense_4h_to_h"]),  # both are added to the residual in parallel
    ],
)
def test_products_that_are_only_added_to_the_residual_are_found(tiny_model, name, weights):
    model = tiny_model(name)
    unneeded = structure_of(model).unneeded
    found = [name for name, parameter in model.named_parameters() if id(parameter) in unneeded]
    assert len(found) == 3 * len(weights)
    assert all(any(f"{weight}.weight" in name for weight in weights) for name in found)


def test_only_added_looks_at_every_way_to_the_output():
    x = torch.randn(3, requires_grad=True)
    added, squared, both = x * 2, x * 3, x * 4
    output = (x + added + squared.square()) + both.view(3) + both.exp()
    nodes = {tensor.grad_fn: name for tensor, name in ((added, "added"), (squared, "squared"), (both, "both"))}
    assert only_added(output, nodes, None) == {"added"}


def test_result_that_was_overwritten_is_computed_again():
    weight = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
    x = torch.randn(2, 3)
    cache = ActivationCache(1 << 20, frozenset())
    cache.layer = "layer"
    with cache:
        linear(x, weight).mul_(2)
    with cache.second_forward("layer"):
        again = linear(x, weight)
    torch.testing.assert_close(again, x @ weight.T)


def test_budget_of_a_model_is_bounded_by_its_size():
    parameter = torch.nn.Parameter(torch.zeros(10, 10))
    assert bytes_to_spare([parameter]) == 400


def kept_of(*weights, x):
    cache = ActivationCache(1 << 20, frozenset())
    with cache.first_forward("layer"):
        for weight in weights:
            linear(x, weight)
    return cache


@pytest.mark.parametrize("again", [[1, 0], [1], [0, 0, 1], [0, 1, 1], [0], []])
def test_a_layer_that_makes_other_calls_is_computed_again(again):
    weights = [torch.nn.Parameter(torch.randn(3, 3), requires_grad=False) for _ in range(2)]
    cache = kept_of(*weights, x=torch.full((2, 3), torch.nan))
    x = torch.randn(2, 3)
    same = 0
    while again[same : same + 1] == [[0, 1, None][same]]:
        same += 1
    with cache.second_forward("layer"):
        results = [linear(x, weights[number]) for number in again]
    assert all(result.isnan().all() for result in results[:same])
    for number, result in list(zip(again, results, strict=True))[same:]:
        torch.testing.assert_close(result, x @ weights[number].T)
    assert cache.budget == 1 << 20


def test_a_result_of_another_shape_is_computed_again():
    weight = torch.nn.Parameter(torch.randn(3, 3), requires_grad=False)
    cache, x = kept_of(weight, x=torch.randn(2, 3)), torch.randn(5, 3)
    with cache.second_forward("layer"):
        torch.testing.assert_close(linear(x, weight), x @ weight.T)


def test_losses_alone_keep_nothing(tiny_model, sequences, monkeypatch):
    monkeypatch.setattr(engine, "bytes_to_spare", lambda parameters: pytest.fail("nothing is to be cache"))
    losses, _ = LAYERWISE.sensitivities(tiny_model("gpt2"), sequences, ["transformer.wte.weight"], frozenset())
    assert losses.isfinite().all()
