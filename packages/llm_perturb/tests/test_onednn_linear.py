import pytest
import torch
from llm_perturb.evaluation.onednn_linear import linear, own_products
from llm_perturb.evaluation.perplexity import measure, sequence_losses
from reference import naive_losses
from tiny_models import BUILDERS, build
from torch import nn
from transformers.pytorch_utils import Conv1D


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 6), (6,), (1, 1, 6), (5, 6), (2, 3, 6)])
def test_the_product_is_that_of_sums_over_the_inputs(shape, dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, (4, 6), (4,)))
    for b in (bias, None):
        expected = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (0 if b is None else b.double())
        found = linear(x, weight, b)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        precision = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found.double(), expected, **precision)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 100])
@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (33, 33)])
def test_a_row_does_not_depend_on_how_many_there_are(n, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(300, shape[1]), torch.randn(shape)
    assert torch.equal(linear(x[7 : 7 + n], weight), linear(x, weight)[7 : 7 + n])


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_model_is_as_before_afterwards(family, sequences):
    model = build(family, torch.float32)
    before = model(input_ids=sequences[0][None]).logits
    with pytest.raises(KeyboardInterrupt), own_products(model):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(input_ids=sequences[0][None]).logits, before)


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_the_losses_are_those_of_the_model_itself(family, sequences):
    model = build(family, torch.float32)
    torch.testing.assert_close(sequence_losses(model, sequences), naive_losses(model, sequences), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama"])
def test_the_batch_size_changes_no_bit(family):
    """Of sequences of one length: padding to another changes the shape of the attention."""
    model = build(family, torch.float32)
    sequences = list(torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(1)))
    alone = measure(model, sequences)
    for batch_size in (2, 3, 8):
        assert torch.equal(measure(model, sequences, batch_size).losses, alone.losses)


def test_maps_are_computed_from_the_weights_that_they_have_now(sequences):
    model = build("gpt2", torch.float32)
    maps = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert len(maps) > 4
    for module in maps:
        before = sequence_losses(model, sequences)
        module.weight.data.view(-1)[1] += 1
        assert not torch.equal(sequence_losses(model, sequences), before)
