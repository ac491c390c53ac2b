import pytest
import torch
from critical_weight_analysis.layerwise import output_head as output_head
from critical_weight_analysis.layerwise.gradient_sums import GradientSums


@pytest.mark.parametrize("columns", [3, 7, 50, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_blocks(monkeypatch, columns, with_bias):
    monkeypatch.setattr(output_head, "COLUMNS", columns)
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 50, bias=with_bias).double().requires_grad_(False)
    head.weight.mul_(20)
    hidden, targets = torch.randn(9, 6, dtype=torch.float64), torch.randint(50, (9,))
    targets[2] = targets[5]
    weight = GradientSums("w", head.weight, frozenset({"grad", "fisher"}), [9])
    bias = GradientSums("b", head.bias, frozenset({"grad", "fisher"}), [9]) if with_bias else None
    loss, blocks = output_head.plain_loss(head, hidden, targets)
    at_hidden = output_head.back(head, hidden, blocks, {0: slice(9)}, weight, bias, None)

    again = torch.nn.Linear(6, 50, bias=with_bias).double()
    again.load_state_dict(head.state_dict())
    leaf = hidden.clone().requires_grad_()
    truth = -again(leaf).log_softmax(1)[range(9), targets].sum()
    truth.backward()
    assert loss.sum().item() == pytest.approx(truth.item(), rel=1e-13)
    torch.testing.assert_close(at_hidden, leaf.grad)
    torch.testing.assert_close(weight.finish().fisher, (again.weight.grad / 9) ** 2)
    if with_bias:
        torch.testing.assert_close(bias.finish().grad, again.bias.grad / 9)


def test_large_logits_do_not_overflow():
    head = torch.nn.Linear(1, 3000, bias=False).requires_grad_(False)
    head.weight.zero_()[5] = 1000
    loss, blocks = output_head.plain_loss(head, torch.ones(1, 1), torch.tensor([7]))
    assert loss.item() == 1000
    assert torch.cat([gradient() for _, gradient in blocks], dim=1)[0, [5, 7]].tolist() == [1, -1]
