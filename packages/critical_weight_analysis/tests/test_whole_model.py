import pytest
import torch
from bridge.exchange.errors import RunError
from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.whole_model import WholeModelEngine
from llm_perturb.evaluation.perplexity import sequence_losses
from reference import finite_difference, naive_sensitivities
from transformers import LlamaConfig, LlamaForCausalLM

ALL = frozenset({"grad", "fisher", "curvature"})


def measure(model, sequences, names=None, needs=ALL, **options):
    names = [name for name, _ in model.named_parameters()] if names is None else names
    losses, stream = WholeModelEngine().sensitivities(model, sequences, names, frozenset(needs), Settings(**options))
    return losses, {sensitivity.name: sensitivity for sensitivity in stream}


def test_sums_and_losses_are_those_of_one_gradient_at_a_time(model, sequences):
    naive = naive_sensitivities(model, sequences)
    losses, found = measure(model, sequences)
    torch.testing.assert_close(losses, naive.losses, rtol=1e-12, atol=0)
    assert list(found) == list(naive.grad)
    for field in ALL:
        for name, sensitivity in found.items():
            torch.testing.assert_close(getattr(sensitivity, field), getattr(naive, field)[name], rtol=1e-9, atol=1e-16)
            assert torch.equal(sensitivity.weight, naive.weight[name])


def test_gradient_is_the_slope_of_the_loss(model, sequences):
    sequences = sequences[:3]
    _, found = measure(model, sequences, needs={"grad"})
    generator = torch.Generator().manual_seed(1)
    for name, sensitivity in list(found.items())[::3]:
        flat = int(torch.randint(sensitivity.grad.numel(), (), generator=generator))
        index = torch.unravel_index(torch.tensor(flat), sensitivity.grad.shape)
        slope = finite_difference(model, sequences, name, index)
        assert sensitivity.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_tied_tensor_is_there_once_with_both_uses(tiny_model, sequences, name):
    model = tiny_model(name)
    _, found = measure(model, sequences, needs={"grad"})
    assert "lm_head.weight" not in found
    embedding = next(iter(found.values()))
    seen = {int(token) for sequence in sequences for token in sequence}
    unseen = next(token for token in range(50) if token not in seen)
    assert embedding.grad[unseen].abs().min() > 0  # the head's use: every token of the vocabulary is predicted against
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    _, apart = measure(model, sequences, needs={"grad"})
    both = apart[embedding.name].grad + apart["lm_head.weight"].grad
    torch.testing.assert_close(embedding.grad, both, rtol=1e-9, atol=1e-16)


def test_losses_are_those_of_the_instrument(model, sequences):
    losses, _ = measure(model, sequences, needs=())
    torch.testing.assert_close(losses, sequence_losses(model, sequences), rtol=1e-12, atol=0)


def test_float32_loss_keeps_its_digits_over_a_large_vocabulary():
    vocabulary = 50_000
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(80)  # logits as far apart as a trained model's
    sequences = [torch.randint(vocabulary, (12,)) for _ in range(2)]
    losses, _ = measure(model, sequences, [], ())
    exact, _ = measure(model.double(), sequences, [], ())
    torch.testing.assert_close(losses, exact, rtol=1e-7, atol=0)


def test_only_what_is_asked_for_in_model_order(tiny_model, sequences):
    model = tiny_model("neox")
    names = [name for name, _ in model.named_parameters()]
    _, everything = measure(model, sequences)
    _, found = measure(model, sequences, names=[names[7], names[2]], needs={"fisher"})
    assert list(found) == [names[2], names[7]]
    for name, sensitivity in found.items():
        assert sensitivity.grad is None and sensitivity.curvature is None
        assert torch.equal(sensitivity.fisher, everything[name].fisher)


def test_same_bits_again_whatever_the_batch_size(model, sequences):
    first, second = (measure(model, sequences, batch_size=batch_size)[1] for batch_size in (1, 3))
    for name in first:
        assert all(torch.equal(getattr(first[name], field), getattr(second[name], field)) for field in ALL)


def test_sums_are_at_least_float32(tiny_model, sequences):
    model = tiny_model("llama", torch.bfloat16)
    losses, found = measure(model, sequences)
    assert losses.dtype == torch.float64
    assert {getattr(s, field).dtype for s in found.values() for field in ALL} == {torch.float32}
    assert {s.weight.dtype for s in found.values()} == {torch.bfloat16}


def test_leaves_the_model_as_it_was(tiny_model, sequences):
    model = tiny_model("gpt2")
    flags = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        flags[name] = i % 3 == 0
        parameter.requires_grad_(flags[name])
    measure(model, sequences, names=list(flags)[::2])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_parameter_without_part_in_the_loss_has_zero_gradient(tiny_model, sequences):
    model = tiny_model("llama")
    model.extra = torch.nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    _, found = measure(model, sequences)
    assert found["extra.weight"].grad.abs().max() == 0


def test_loss_that_is_not_finite_names_the_sequence_and_puts_the_flags_back(tiny_model, sequences):
    model = tiny_model("llama")
    model.model.embed_tokens.weight[sequences[3][0]] = torch.nan
    before = [s for s in sequences[:3] if sequences[3][0] not in s]
    with pytest.raises(RunError, match=f"loss of sequence {len(before)} is nan, not finite"):
        measure(model, [*before, sequences[3]])
    assert not any(p.requires_grad for p in model.parameters())


def test_missing_gradients_are_an_error(tiny_model, sequences):
    model = tiny_model("llama")
    model.extra = torch.nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(RunError, match="no parameter in scope received a gradient"):
        measure(model, sequences, names=["extra.weight"])
