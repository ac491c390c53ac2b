import itertools

import pytest
import torch
from bridge.exchange.errors import RunError
from critical_weight_analysis.layerwise.gradient_sums import GradientSums
from critical_weight_analysis.layerwise.parameter_uses import GradientPieces, Product

ALL = frozenset({"grad", "fisher", "curvature"})
BY_POSITION = frozenset({"tokens", "inputs"})


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def sums_of(shape, lengths, needs=ALL):
    return GradientSums("w", torch.nn.Parameter(random(*shape), requires_grad=False), needs, lengths)


def assert_sums(sums, gradients, lengths, needs=ALL):
    found, means = sums.finish(), [g / length for g, length in zip(gradients, lengths, strict=True)]
    expected = {
        "grad": sum(gradients) / sum(lengths),
        "curvature": sum(g**2 for g in gradients) / sum(lengths),
        "fisher": sum(g**2 for g in means) / len(lengths),
    }
    for field, truth in expected.items():
        if field in needs:
            torch.testing.assert_close(getattr(found, field), truth)
        else:
            assert getattr(found, field) is None
    return found


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


KINDS = ["products", "dense", "rows"]


@pytest.mark.parametrize("second", [kinds for n in (1, 2, 3) for kinds in itertools.combinations(KINDS, n)])
@pytest.mark.parametrize("needs", [ALL, {"grad"}, {"curvature"}])
def test_parts_of_every_kind_together(second, needs):
    """A batch of two sequences: one product, and then parts of other kinds."""
    torch.manual_seed(0)
    sums, (left, right), ids = sums_of((6, 3), [2, 5], frozenset(needs)), (random(2, 6), random(2, 3)), [4, 4]
    parts = {"products": [Product(left, right)], "dense": [random(6, 3)], "rows": [(torch.tensor(ids), random(2, 3))]}
    sums.add(
        [(0, GradientPieces(products=[Product(2 * left, right)])), (1, GradientPieces(**{k: parts[k] for k in second}))]
    )
    by_kind = {"products": left.T @ right, "dense": parts["dense"][0], "rows": torch.zeros(6, 3, dtype=torch.float64)}
    by_kind["rows"][4] = parts["rows"][0][1].sum(0)
    assert_sums(sums, [2 * left.T @ right, sum(by_kind[kind] for kind in second)], [2, 5], needs)


@pytest.mark.parametrize("completed", [True, False])
@pytest.mark.parametrize("needs", [ALL | BY_POSITION, ALL, {"grad"}])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_rows_set_apart_are_squared_with_their_other_part(monkeypatch, block, needs, completed):
    monkeypatch.setattr("critical_weight_analysis.layerwise.gradient_sums.BLOCK", block)
    torch.manual_seed(0)
    lengths, sums = [3, 5], sums_of((9, 3), [3, 5], frozenset(needs))
    by_position, inputs = [], torch.zeros(9, 3, dtype=torch.float64)  # (T_i, 9, 3) each
    for i, length in enumerate(lengths):
        ids, rows = torch.tensor([7, 2, 7, 4, 0][:length]), random(length, 3)
        left, right = random(length, 9), random(length, 3)
        for start, stop in [(0, 4), (4, 9)]:
            sums.add_products([(i, Product(left[:, start:stop], right))], start, {i: ids})
        positions = left[:, :, None] * right[:, None]
        inputs += right.square().sum(0)
        if completed:
            sums.add_rows(i, ids, rows)
            positions[range(length), ids] += rows
            inputs.index_add_(0, ids, torch.ones(length, 3, dtype=torch.float64))
        by_position.append(positions)
    found = assert_sums(sums, [positions.sum(0) for positions in by_position], lengths, needs)
    if needs >= BY_POSITION:
        torch.testing.assert_close(found.tokens, torch.cat(by_position).square().sum(0) / 8)
        torch.testing.assert_close(found.inputs, inputs)


@pytest.mark.parametrize(("block", "n_rows"), [(1, 1), (5, 1), (6, 2), (10, 3), (1 << 18, 6)])
def test_gradients_are_made_some_rows_at_a_time(monkeypatch, block, n_rows):
    monkeypatch.setattr("critical_weight_analysis.layerwise.gradient_sums.BLOCK", block)
    sums, rows = sums_of((6, 3), [2, 2]), []
    monkeypatch.setattr(sums.squares, "add_block", lambda i, of, gradient: rows.append((i, of, gradient.shape)))
    sums.add_products([(i, Product(random(2, 6), random(2, 3))) for i in (0, 1)], 0, None)
    blocks = [slice(start, start + n_rows) for start in range(0, 6, n_rows)]
    assert rows == [(i, of, (n_rows, 3)) for of in blocks for i in (0, 1)]


@pytest.mark.parametrize("field", ["fisher", "curvature"])
def test_one_of_the_squares_alone_where_all_lengths_are_the_same(field):
    torch.manual_seed(0)
    sums, gradients = sums_of((6, 3), [4, 4], frozenset({field})), [random(6, 3), random(6, 3)]
    for i, gradient in enumerate(gradients):
        sums.add_dense(i, gradient)
    assert_sums(sums, gradients, [4, 4], {field})


def test_both_squares_are_multiples_of_one_sum_where_all_lengths_are_the_same():
    torch.manual_seed(0)
    sums = sums_of((60, 30), [3, 3, 3], frozenset({"fisher", "curvature"}))
    for i in range(3):
        sums.add_dense(i, random(60, 30))
    found = sums.finish()
    assert torch.equal(found.fisher, found.curvature * (1 / 27 / (1 / 9)))


@pytest.mark.parametrize(
    "needs", [{"grad"}, {"tokens"}, {"fisher"}, {"curvature"}, {"fisher", "curvature"}, {"inputs"}]
)
def test_sequences_are_told_apart_for_squares_and_for_inputs(needs):
    assert sums_of((6, 3), [4], frozenset(needs)).by_sequence == bool(needs - {"grad", "tokens"})


def test_rows_of_an_embedding_alone():
    sums, rows = sums_of((4, 2), [2], ALL | BY_POSITION), torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    sums.add([(0, GradientPieces(rows=[(torch.tensor([2, 2]), rows)]))])
    found = assert_sums(sums, [torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 7.0], [0.0, 0.0]]).double()], [2])
    assert found.tokens[2].tolist() == [5, 14.5] and found.inputs[2].tolist() == [2, 2]


@pytest.mark.parametrize("need", sorted(BY_POSITION))
def test_sums_over_positions_of_a_gradient_that_is_no_product_are_refused(need):
    with pytest.raises(RunError, match="w is not only multiplied with inputs; leave it out"):
        sums_of((2, 2), [1], frozenset({need})).add_dense(0, torch.zeros(2, 2))


@pytest.mark.parametrize("lengths", [(2, 1), (1, 2)])
def test_uses_of_different_lengths_have_no_squares_by_position(lengths):
    products = [Product(random(length, 6), random(length, 3)) for length in lengths]
    with pytest.raises(RunError, match="w meets several inputs at a position"):
        sums_of((6, 3), [2], frozenset({"tokens"})).add([(0, GradientPieces(products=products))])


def test_uses_at_one_position_are_added_before_they_are_squared():
    torch.manual_seed(0)
    sums, one, two = sums_of((6, 3), [2], BY_POSITION), (random(2, 6), random(2, 3)), (random(2, 6), random(2, 3))
    sums.add([(0, GradientPieces(products=[Product(*one), Product(*two, input_is_left=True)]))])
    positions = sum(left[:, :, None] * right[:, None] for left, right in (one, two))
    found = sums.finish()
    torch.testing.assert_close(found.tokens, positions.square().sum(0) / 2)
    torch.testing.assert_close(found.inputs, two[0].square().sum(0)[:, None] + one[1].square().sum(0))


def test_squares_of_what_cancels_are_not_negative():
    torch.manual_seed(0)
    sums, ids, left, right = (
        sums_of((1, 1000), [1], frozenset({"tokens"})),
        torch.tensor([0]),
        random(1, 1),
        random(1, 1000),
    )
    sums.add_products([(0, Product(left, right))], 0, {0: ids})
    sums.add_rows(0, ids, -left * right)
    tokens = sums.finish().tokens
    assert tokens.min() == 0 and tokens.max() < 1e-14


@pytest.mark.parametrize("needs", [ALL | BY_POSITION, {"fisher", "curvature"}])
def test_every_sum_is_added_up_over_the_processes(needs):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(random(6, 3), requires_grad=False)
    one, two = (GradientSums("w", parameter, frozenset(needs), [2], r) for r in (lambda t: None, lambda t: t.mul_(3)))
    product, ids, rows = Product(random(2, 6), random(2, 3)), torch.tensor([4, 0]), random(2, 3)
    for sums in (one, two):
        sums.add_products([(0, product)], 0, None)
        sums.add_rows(0, ids, rows)
    alone, together = one.finish(), two.finish()
    for field in needs:
        torch.testing.assert_close(getattr(together, field), 3 * getattr(alone, field))


def test_inputs_without_a_gradient_are_counted():
    sums = sums_of((2, 3), [1], frozenset({"inputs"}))
    sums.inputs.add_input(torch.tensor([1.0, 2.0, 3.0]))
    assert sums.finish().inputs.tolist() == [[1, 4, 9], [1, 4, 9]]


@pytest.mark.parametrize("field", sorted(ALL))
def test_sum_that_is_not_finite_names_its_parameter(field):
    sums = sums_of((2, 2), [1, 2], frozenset({field}))
    sums.add_dense(1, torch.tensor([[1.0, torch.inf], [0.0, 0.0]]))
    with pytest.raises(RunError, match=f"{field} of w is not finite"):
        sums.finish()


def test_sums_near_the_end_of_the_range_are_finite():
    sums = sums_of((2, 2), [1], frozenset({"grad"}))
    sums.add_dense(0, torch.full((2, 2), 1.7e308, dtype=torch.float64))
    assert sums.finish().grad.tolist() == [[1.7e308] * 2] * 2
