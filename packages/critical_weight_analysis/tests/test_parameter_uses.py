import pytest
import torch
from bridge.exchange.errors import RunError
from critical_weight_analysis.layerwise.parameter_uses import Recorder
from torch.nn.functional import embedding, linear


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64), requires_grad=False)


def gradient_of(parts):
    return sum([left.T @ right for left, right, _ in parts.products] + parts.dense)


def test_linear_maps_give_products_and_biases_sums():
    weight, bias, x = parameter(4, 3), parameter(4), torch.randn(2, 5, 3, dtype=torch.float64)
    recorder = Recorder({"w": weight, "b": bias})
    with recorder:
        out = linear(x.requires_grad_(), weight, bias).square()
    out.sum().backward()
    for index in range(2):
        grad = 2 * (x[index] @ weight.T + bias)
        parts = recorder.pieces(index, batch=2, length=4)
        torch.testing.assert_close(gradient_of(parts["w"]), grad[:4].T @ x[index, :4])
        torch.testing.assert_close(gradient_of(parts["b"]), grad[:4].sum(0))


def test_weight_used_twice_has_both_parts():
    weight, x = parameter(3, 3), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    recorder = Recorder({"w": weight})
    with recorder:
        out = torch.addmm(x.new_zeros(3), linear(x, weight), weight) + (weight * 2).sum()
    out.sum().backward()
    again = weight.detach().clone().requires_grad_()
    (x.detach() @ again.T @ again + (again * 2).sum()).sum().backward()
    torch.testing.assert_close(gradient_of(recorder.pieces()["w"]), again.grad)


def test_any_other_use_is_seen_and_the_parameter_left_alone():
    gain = parameter(3)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    recorder = Recorder({"gain": gain})
    with recorder:
        assert gain.dtype == torch.float64
        assert not recorder.used
        out = torch.stack([x * (1 + gain), x]).sum()
    out.backward()
    assert recorder.used == {(None, "gain")}
    torch.testing.assert_close(gradient_of(recorder.pieces()["gain"]), x.detach().sum(0))
    assert not gain.requires_grad and gain.grad is None
    with pytest.raises(RunError, match="gain cannot be told apart by sequence: --batch-size 1"):
        recorder.pieces(0, batch=2)


def test_embedding_gives_rows_even_for_the_padding_token():
    table = parameter(6, 3)
    recorder = Recorder({"table": table})
    with recorder:
        out = embedding(torch.tensor([[1, 4, 1]]), table, padding_idx=1)
        out += 1
    out.square().sum().backward()
    ((ids, grad),) = recorder.pieces()["table"].rows
    assert ids.tolist() == [1, 4, 1]
    torch.testing.assert_close(grad, 2 * out[0].detach())


def test_input_overwritten_after_its_use_is_noticed():
    weight, x = parameter(3, 3), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    with Recorder({"w": weight}):
        y = x * 1
        out = linear(y, weight)
        y.detach().mul_(2)
    with pytest.raises(RunError, match="the input of w was overwritten"):
        out.sum().backward()


@pytest.mark.parametrize(
    "convert", [lambda w: w.type(torch.float64), lambda w: w.to(torch.float64), lambda w: w.double()]
)
def test_conversion_to_the_dtype_that_it_has_is_no_use(convert):
    weight, x = parameter(4, 3), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    recorder = Recorder({"w": weight})
    with recorder:
        assert convert(weight) is weight
        out = linear(x, convert(weight))
    out.square().sum().backward()
    assert not recorder.used
    assert [use.kind for use in recorder.uses] == ["linear"]
    torch.testing.assert_close(gradient_of(recorder.pieces()["w"]), 2 * out.detach().T @ x.detach())
