import pytest
import torch
from llm_perturb.evaluation import lm_loss
from llm_perturb.evaluation.decoder_head import is_plain
from llm_perturb.evaluation.perplexity import sequence_losses
from reference import naive_losses
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    RemBertConfig,
    RemBertForCausalLM,
)


def linear(n_tokens, n_hidden, bias, dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Linear(n_hidden, n_tokens, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("vocabulary", [5, 2047, 2048, 2049, 5000])
def test_chunks_of_the_vocabulary_add_up(vocabulary, bias):
    output = linear(vocabulary, 6, bias)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    edges = [0, 1, 2046, 2047, 2048, 2049, 4095, 4096, vocabulary - 1]
    targets = torch.tensor([min(edge, vocabulary - 1) for edge in edges])
    expected = -output(hidden).log_softmax(1)[torch.arange(9), targets]
    torch.testing.assert_close(lm_loss.token_scores(output, hidden, targets).nats, expected, rtol=1e-12, atol=1e-14)


def test_large_logits_do_not_overflow():
    output, hidden = linear(2500, 6, True, torch.float32), 1e4 * torch.randn(9, 6)
    targets = torch.arange(9) * 250
    expected = -output(hidden).double().log_softmax(1)[torch.arange(9), targets]
    torch.testing.assert_close(
        lm_loss.token_scores(output, hidden, targets).nats.double(), expected, rtol=1e-5, atol=1e-3
    )


def test_narrow_logits_are_summed_wide():
    output, hidden = linear(2500, 6, True, torch.bfloat16), torch.randn(9, 6).to(torch.bfloat16)
    targets = torch.arange(9) * 250
    expected = -output(hidden).float().log_softmax(1)[torch.arange(9), targets]
    found = lm_loss.token_scores(output, hidden, targets).nats
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 7, 49, 50, 51])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_size_of_a_chunk_changes_nothing(model, sequences, monkeypatch, columns, batch_size):
    monkeypatch.setattr(lm_loss, "COLUMNS", columns)
    torch.testing.assert_close(
        sequence_losses(model, sequences, batch_size), naive_losses(model, sequences), rtol=1e-12, atol=0
    )


def test_ordinary_models_have_a_plain_head(model):
    assert is_plain(model)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=0.5)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
        lambda: RemBertForCausalLM(
            RemBertConfig(**SIZES, input_embedding_size=6, output_embedding_size=10, is_decoder=True)
        ),
    ],
    ids=["softcap", "scaled", "another_width"],
)
def test_a_head_that_does_more_than_a_product_is_not_shortened(build, sequences):
    torch.manual_seed(0)
    model = build().to(torch.float64).eval().requires_grad_(False)
    assert not is_plain(model)
    torch.testing.assert_close(sequence_losses(model, sequences, 3), naive_losses(model, sequences), rtol=1e-5, atol=0)


def test_the_probe_changes_no_random_state(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    is_plain(model)
    assert torch.equal(torch.rand(3), expected)


def naive_divergence(p_logits, q_logits):
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
def test_the_divergence_is_that_of_the_whole_distributions(vocabulary):
    before, after = linear(vocabulary, 6, True), linear(vocabulary, 6, True)
    after.weight.data += 0.3 * torch.randn_like(after.weight)
    hidden, other = torch.randn(7, 6, dtype=torch.float64), torch.randn(3, 7, 6, dtype=torch.float64)
    found = lm_loss.token_divergence(before, hidden, after, other.view(21, 6))
    torch.testing.assert_close(found.view(3, 7), naive_divergence(before(hidden), after(other)), rtol=1e-10, atol=0)
    assert (found > 0).all()


def test_the_divergence_of_the_same_predictions_is_nothing():
    output, hidden = linear(2500, 6, True, torch.float32), 5 * torch.randn(7, 6)
    assert lm_loss.token_divergence(output, hidden, output, hidden).abs().max() < 1e-14


def test_the_divergence_of_large_logits_does_not_overflow():
    output, hidden = linear(2500, 6, True), 1e4 * torch.randn(2, 7, 6, dtype=torch.float64)
    expected = naive_divergence(output(hidden[0]), output(hidden[1]))
    found = lm_loss.token_divergence(output, hidden[0], output, hidden[1])
    assert expected.max() > 1000
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_a_tiny_divergence_is_not_lost_in_rounding():
    """A millionth of a change makes a divergence of a million-millionth, in float32 too."""
    output, hidden = linear(2500, 6, False), 5 * torch.randn(7, 6, dtype=torch.float64)
    other = hidden + 1e-5 * torch.randn_like(hidden)
    expected = naive_divergence(output(hidden), output(other))
    assert expected.max() < 1e-8
    found = lm_loss.token_divergence(output, hidden, output, other)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("vocabulary", [5, 2048, 5000])
def test_a_token_is_correct_where_it_is_the_most_probable(vocabulary):
    output, hidden = linear(vocabulary, 6, True), torch.randn(40, 6, dtype=torch.float64)
    best = output(hidden).argmax(1)
    targets = torch.where(torch.arange(40) % 3 == 0, (best + 1) % vocabulary, best)
    expected = torch.arange(40) % 3 != 0
    assert torch.equal(lm_loss.token_scores(output, hidden, targets).correct, expected)
    assert torch.equal(lm_loss.exact_scores(output(hidden), targets).correct, expected)


def test_the_most_probable_token_of_a_block_is_wrong_where_that_of_another_is_more_probable():
    output, hidden = linear(5000, 6, True), torch.randn(40, 6, dtype=torch.float64)
    logits = output(hidden)
    blocks = [slice(0, 2048), slice(2048, 4096), slice(4096, 5000)]
    best = torch.stack([block.start + logits[:, block].argmax(1) for block in blocks])
    for targets in best:
        expected = logits.argmax(1) == targets
        assert not expected.all()
        assert torch.equal(lm_loss.token_scores(output, hidden, targets).correct, expected)


def test_equally_probable_tokens_are_all_correct():
    output, hidden = linear(5, 6, True), torch.randn(4, 6, dtype=torch.float64)
    output.weight[:3] = output.weight[0]
    output.bias[:3] = 9
    for target in range(5):
        targets = torch.full((4,), target)
        assert lm_loss.token_scores(output, hidden, targets).correct.tolist() == [target < 3] * 4
        assert lm_loss.exact_scores(output(hidden), targets).correct.tolist() == [target < 3] * 4
