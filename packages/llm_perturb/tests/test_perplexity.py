import copy
import math

import pytest
import torch
from bridge.exchange.errors import RequestError, RunError
from llm_perturb.evaluation import perplexity
from llm_perturb.evaluation.corpus import Corpus
from llm_perturb.evaluation.perplexity import Perplexity, measure, reference_of, sequence_losses, summarize
from llm_perturb.suffix_forward import SuffixForward
from reference import naive_losses
from tiny_models import build, random_sequences


def test_losses_are_those_of_each_sequence_alone(model, sequences):
    losses = sequence_losses(model, sequences)
    assert losses.dtype == torch.float64
    assert losses.shape == (len(sequences),)
    torch.testing.assert_close(losses, naive_losses(model, sequences), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size", [2, 3, 8, 100])
def test_padding_and_batching_change_nothing(model, sequences, batch_size):
    alone = naive_losses(model, sequences)
    torch.testing.assert_close(sequence_losses(model, sequences, batch_size), alone, rtol=1e-12, atol=0)


def test_the_order_of_the_sequences_is_kept(model, sequences):
    forwards, backwards = sequence_losses(model, sequences, 3), sequence_losses(model, sequences[::-1], 3)
    torch.testing.assert_close(forwards, backwards.flip(0), rtol=1e-12, atol=0)


def test_the_same_call_gives_the_same_bits(model, sequences):
    assert torch.equal(sequence_losses(model, sequences, 3), sequence_losses(model, sequences, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models_are_summed_wide(sequences, dtype):
    """The loss of bfloat16 logits, taken in float32 or wider: no further digit is lost on the way."""
    model = build("llama", dtype)
    torch.testing.assert_close(sequence_losses(model, sequences), naive_losses(model, sequences), rtol=1e-5, atol=0)


def test_perplexity_weights_tokens_not_texts():
    corpus = Corpus([torch.zeros(2, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)], {})
    losses = torch.tensor([5.0, 9.0])  # one token at 5 nats, nine at 1
    found = summarize(losses, corpus)
    assert found == Perplexity(nll=1.4, ppl=math.exp(1.4), n_tokens=10, n_sequences=2)
    mean_of_perplexities = (math.exp(5) + math.exp(1)) / 2
    assert abs(found.ppl - mean_of_perplexities) > 10


def test_perplexity_of_a_corpus_is_exp_of_its_mean_token_loss(model, sequences):
    corpus = Corpus(sequences, {})
    found = summarize(sequence_losses(model, sequences, 3), corpus)
    nll = naive_losses(model, sequences).sum().item() / sum(len(sequence) - 1 for sequence in sequences)
    assert found.nll == pytest.approx(nll, rel=1e-12)
    assert found.ppl == pytest.approx(math.exp(nll), rel=1e-12)
    assert found.n_tokens == sum(len(sequence) for sequence in sequences) - len(sequences)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(sequences, value, batch_size):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = value
    with pytest.raises(RunError, match="loss of sequence 0 is not finite"):
        sequence_losses(model, sequences, batch_size)


def test_the_error_names_the_first_bad_sequence(sequences):
    model = build("gpt2")
    rare = next(
        t for t in range(50) if not any((s == t).any() for s in sequences[:4]) and (sequences[4][:1] == t).any()
    )
    with torch.no_grad():
        model.transformer.wte.weight.data = model.transformer.wte.weight.data.clone()
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.data.clone())
        model.transformer.wte.weight[rare] = math.nan
    with pytest.raises(RunError, match="loss of sequence 4 is not finite"):
        sequence_losses(model, sequences)


def test_a_loss_that_is_not_finite_is_a_result_where_that_is_asked_for(sequences):
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    assert sequence_losses(model, sequences, check=False).isnan().all()
    assert measure(model, sequences, check=False).losses.isnan().all()
    for batch_size, hint in ((1, ""), (2, "; it may be in a batch of its own: --batch-size 1")):
        for function in (measure, sequence_losses):
            with pytest.raises(RunError, match=f"^the loss of sequence 0 is not finite{hint}$"):
                function(model, sequences, batch_size)


def test_a_batch_is_padded_on_the_right_under_a_mask_where_one_is_needed():
    model = build("llama")
    ids, predicted, more = perplexity.pad(model, [torch.tensor([7, 8, 9, 6]), torch.tensor([5, 4])])
    assert ids.tolist() == [[7, 8, 9, 6], [5, 4, 0, 0]]
    assert predicted.tolist() == [[True, True, True], [True, False, False]]
    assert {name: mask.tolist() for name, mask in more.items()} == {"attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]]}
    ids, predicted, more = perplexity.pad(model, [torch.tensor([7, 8, 9]), torch.tensor([5, 4, 0])])
    assert (ids.tolist(), predicted.tolist(), more) == ([[7, 8, 9], [5, 4, 0]], [[True, True]] * 2, {})


def test_nothing_is_padded_unless_a_batch_size_is_named(model, sequences, monkeypatch):
    seen, real = [], perplexity.measure_batch
    monkeypatch.setattr(perplexity, "measure_batch", lambda m, s, r=None: seen.append(len(s)) or real(m, s, r))
    measure(model, sequences)
    sequence_losses(model, sequences)
    assert seen == [1] * 16


def test_what_is_measured_is_named_on_stderr_where_it_is_asked_for(sequences, monkeypatch):
    loops = []
    monkeypatch.setattr(perplexity, "over", lambda items, what, shown: loops.append((what, shown)) or items)
    for function in (measure, sequence_losses):
        function(build("llama"), sequences[:2], progress="baseline")
        function(build("llama"), sequences[:2])
    assert loops == 2 * [("baseline", True), ("", False)]


def test_exp_never_overflows():
    assert perplexity.exp(1.0) == math.e
    assert perplexity.exp(709.7) == math.exp(709.7)
    assert perplexity.exp(709.8) == math.inf  # the largest float is e^709.78
    assert perplexity.exp(1e6) == math.inf
    assert perplexity.exp(math.inf) == math.inf
    assert math.isnan(perplexity.exp(math.nan))


def test_the_most_padded_batch_is_that_with_the_most_padding_in_all():
    sequences = [torch.zeros(n) for n in (9, 4, 2, 5, 7, 9)]
    order = perplexity.batches(sequences, 2)
    assert order == [[2, 1], [3, 4], [0, 5]]  # lengths 2 4, 5 7, 9 9
    assert perplexity.most_padded(order, sequences) == [2, 1]  # of two with as much, the first
    assert perplexity.most_padded([[2, 1], [3, 4, 0]], sequences) == [3, 4, 0]
    assert perplexity.most_padded([[2], [0, 5]], sequences) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_padding_may_change_a_loss_by_a_tenth_of_the_rounding_of_a_logit(dtype):
    model = build("llama", dtype)
    sequences = random_sequences()
    chosen = perplexity.most_padded(perplexity.batches(sequences, 3), sequences)
    allowed = {torch.float64: 1e-4, torch.bfloat16: 1.6 * 2**-7}[dtype]
    losses = sequence_losses(model, sequences)
    for sign in (1, -1):
        for at in chosen:
            other = losses.clone()
            other[at] *= 1 + sign * 0.95 * allowed
            perplexity.check_padding(model, sequences, other, 3)
            other[at] = losses[at] * (1 + sign * 1.05 * allowed)
            with pytest.raises(RequestError, match="a padded batch changes .*: --batch-size 1, not 3"):
                perplexity.check_padding(model, sequences, other, 3)
    elsewhere = torch.ones(len(sequences), dtype=torch.bool)
    elsewhere[chosen] = False
    perplexity.check_padding(model, sequences, torch.where(elsewhere, 2 * losses, losses), 3)


def test_texts_that_cost_nothing_may_cost_nothing_in_a_batch(monkeypatch, sequences):
    alone = torch.tensor([0.0, -1e-17, 0.0], dtype=torch.float64)
    monkeypatch.setattr(perplexity, "sequence_losses", lambda model, chosen: alone)
    perplexity.check_padding(build("llama"), [torch.zeros(n) for n in (2, 3, 4)], alone, 3)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8, 50])
def test_batches_hold_every_sequence_once_with_its_neighbours_by_length(sequences, batch_size):
    batches = perplexity.batches(sequences, batch_size)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sequences)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    lengths = [len(sequences[i]) for batch in batches for i in batch]
    assert lengths == sorted(lengths)


def test_correct_tokens_are_counted_in_each_sequence(model, sequences):
    expected = [
        int((model(input_ids=sequence[None]).logits[0, :-1].argmax(-1) == sequence[1:]).sum()) for sequence in sequences
    ]
    for batch_size in (1, 3):
        assert measure(model, sequences, batch_size).correct.tolist() == expected


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_divergence_from_a_reference_is_summed_over_each_sequence(model, sequences, batch_size):
    kept, twin = reference_of(model, sequences, batch_size), copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # the head too
    expected = []
    for sequence in sequences:
        p, q = (m(input_ids=sequence[None]).logits[0, :-1].log_softmax(-1) for m in (model, twin))
        expected.append((p.exp() * (p - q)).sum().item())
    model.load_state_dict(twin.state_dict())  # in place: what is kept must not change with it
    found = SuffixForward(model, sequences, batch_size, kept).measure()
    torch.testing.assert_close(found.divergence, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert measure(model, sequences, batch_size).divergence is None
