import pytest
import torch
from bridge.exchange.errors import RunError
from critical_weight_analysis.layerwise.gradient_sums import GradientSums
from critical_weight_analysis.layerwise.parameter_uses import GradientPieces, Product

ALL = frozenset({"grad", "fisher", "curvature"})


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def sums_of(shape, lengths, needs=ALL):
    return GradientSums("w", torch.nn.Parameter(random(*shape), requires_grad=False), needs, lengths)


def assert_sums(sums, gradients, lengths):
    found = sums.finish()
    torch.testing.assert_close(found.grad, sum(gradients) / sum(lengths))
    torch.testing.assert_close(found.curvature, sum(g**2 for g in gradients) / sum(lengths))
    means = [g / length for g, length in zip(gradients, lengths, strict=True)]
    torch.testing.assert_close(found.fisher, sum(g**2 for g in means) / len(lengths))


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize("lengths", [[2, 5], [4, 4]])
def test_uses_of_one_sequence_are_added_before_they_are_squared(monkeypatch, block, lengths):
    monkeypatch.setattr("critical_weight_analysis.layerwise.gradient_sums.BLOCK", block)
    torch.manual_seed(0)
    sums, gradients = sums_of((6, 3), lengths), []
    for i, length in enumerate(lengths):
        one, two = (random(length, 6), random(length, 3)), (random(1, 6), random(1, 3))
        sums.add([(i, GradientPieces(products=[Product(*one), Product(*two)]))])
        gradients.append(one[0].T @ one[1] + two[0].T @ two[1])
    assert_sums(sums, gradients, lengths)


def test_parts_of_every_kind_together():
    torch.manual_seed(0)
    sums, left, right, dense = sums_of((6, 3), [2]), random(2, 6), random(2, 3), random(6, 3)
    ids, rows = torch.tensor([4, 4]), random(2, 3)
    sums.add([(0, GradientPieces(products=[Product(left, right)], dense=[dense], rows=[(ids, rows)]))])
    gradient = left.T @ right + dense
    gradient[4] += rows.sum(0)
    assert_sums(sums, [gradient], [2])


@pytest.mark.parametrize("completed", [True, False])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_rows_set_apart_are_squared_with_their_other_part(monkeypatch, block, completed):
    monkeypatch.setattr("critical_weight_analysis.layerwise.gradient_sums.BLOCK", block)
    torch.manual_seed(0)
    lengths, sums, gradients = [3, 4], sums_of((9, 3), [3, 4]), []
    for i, length in enumerate(lengths):
        ids, rows = torch.tensor([7, 2, 7, 0][:length]), random(length, 3)
        left, right = random(length, 9), random(length, 3)
        for start in (0, 4):
            sums.add_products([(i, Product(left[:, start : 9 if start else 4], right))], start, {i: ids})
        gradient = left.T @ right
        if completed:
            sums.add_rows(i, ids, rows)
            gradient.index_add_(0, ids, rows)
        gradients.append(gradient)
    assert_sums(sums, gradients, lengths)


@pytest.mark.parametrize("field", sorted(ALL))
def test_sum_that_is_not_finite_names_its_parameter(field):
    sums = sums_of((2, 2), [1, 2], frozenset({field}))
    sums.add_dense(1, torch.tensor([[1.0, torch.inf], [0.0, 0.0]]))
    with pytest.raises(RunError, match=f"{field} of w is not finite"):
        sums.finish()
