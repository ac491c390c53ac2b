import pytest
import torch
from critical_weight_analysis.layerwise import output_head as output_head
from critical_weight_analysis.layerwise.gradient_sums import GradientSums

NEEDS = frozenset({"grad", "fisher"})


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("columns", [3, 7, 50, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_blocks(monkeypatch, cores, columns, with_bias):
    monkeypatch.setattr(output_head, "COLUMNS", columns)
    monkeypatch.setattr(output_head, "n_cores", lambda device: cores)
    pieces = []  # how many there are side by side

    def one_by_one(device, work, items):
        results = [work(item) for item in items]
        pieces.append(len(results))
        return results

    monkeypatch.setattr(output_head, "on_cores", one_by_one)
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 50, bias=with_bias).double().requires_grad_(False)
    head.weight.mul_(20)
    hidden, targets = torch.randn(9, 6, dtype=torch.float64), torch.randint(50, (9,))
    targets[2] = targets[5]
    rows = {0: slice(4), 1: slice(4, 9)}  # of two sequences
    sums = {name: GradientSums(name, parameter, NEEDS, [4, 5]) for name, parameter in head.named_parameters()}
    loss, blocks = output_head.plain_loss(head, hidden, targets)
    at_hidden = output_head.back(head, hidden, blocks, rows, sums["weight"], sums.get("bias"), None)
    assert pieces == [len(blocks), min(cores, len(blocks))] and len(blocks) == -(-50 // columns)

    again = torch.nn.Linear(6, 50, bias=with_bias).double()
    again.load_state_dict(head.state_dict())
    leaf = hidden.clone().requires_grad_()
    truth = -again(leaf).log_softmax(1)[range(9), targets]
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=0)
    torch.testing.assert_close(at_hidden, torch.autograd.grad(truth.sum(), leaf, retain_graph=True)[0])
    for name, parameter in again.named_parameters():
        gradients = [torch.autograd.grad(truth[of].sum(), parameter, retain_graph=True)[0] for of in rows.values()]
        found = sums[name].finish()
        torch.testing.assert_close(found.grad, sum(gradients) / 9)
        torch.testing.assert_close(found.fisher, ((gradients[0] / 4) ** 2 + (gradients[1] / 5) ** 2) / 2)


def test_loss_and_gradient_of_logits_that_the_model_changes_after_the_head(monkeypatch):
    monkeypatch.setattr(output_head, "COLUMNS", 3)
    z = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logits = 5 * torch.tanh(z / 2)
    for row, targets in enumerate([torch.tensor([6, 0, 2]), torch.tensor([1, 5, 5, 3])]):
        real = slice(len(targets))
        nats, blocks = output_head.any_loss(logits, z, (row, real), targets)
        truth = -logits[row].log_softmax(1)[range(len(targets)), targets]
        gradient = torch.autograd.grad(truth.sum(), z, retain_graph=True)[0]
        assert not nats.requires_grad
        torch.testing.assert_close(nats, truth.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.cat([of_block() for _, of_block in blocks], dim=1), gradient[row, real])
        assert [block.start for block, _ in blocks] == [0, 3, 6]


def test_large_logits_do_not_overflow():
    head = torch.nn.Linear(1, 3000, bias=False).requires_grad_(False)
    head.weight.zero_()[5] = 1000
    loss, blocks = output_head.plain_loss(head, torch.ones(1, 1), torch.tensor([7]))
    assert loss.item() == 1000
    assert torch.cat([gradient() for _, gradient in blocks], dim=1)[0, [5, 7]].tolist() == [1, -1]
