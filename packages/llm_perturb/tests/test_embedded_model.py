"""What only trained weights show: single weights that the whole model hangs on, and many that it can spare."""

import pytest
import torch
from llm_perturb.batched_single_weights import group
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import CorpusOptions, Texts, read_texts, tokenize
from llm_perturb.evaluation.embedded_model import embedded_checkpoint
from llm_perturb.evaluation.parameters import match, named_parameters
from llm_perturb.evaluation.perplexity import sequence_losses, summarize
from llm_perturb.measurement_condition import Condition
from llm_perturb.perturbation import Perturbation
from llm_perturb.selection import Target, draw
from llm_perturb.sweep import sweep
from transformers import AutoTokenizer

pytestmark = pytest.mark.real_model

DOWN = "model.layers.11.mlp.down_proj.weight"  # (576, 1536)
ROW, COL = 507, 1229
N_COLUMNS = 1536


@pytest.fixture(scope="module")
def effects():
    """delta_nll, in nats per token, of each set of weights zeroed, by name; and the baseline."""
    loaded = models.load(device="cpu")
    corpus_options = CorpusOptions(eval_limit=20, max_length=96)
    corpus = tokenize(read_texts(corpus_options), loaded.tokenizer, corpus_options, loaded.max_positions)
    named = named_parameters(loaded.model)
    everything = Target("ALL", {name: named[name] for name in match(loaded.model, "ALL")})
    down = Target(DOWN, {DOWN: named[DOWN]})
    largest_name = max(everything.parameters, key=lambda name: named[name].abs().max().item())
    largest = Target(largest_name, {largest_name: named[largest_name]})
    none = torch.empty(0, dtype=torch.int64)
    row = torch.arange(N_COLUMNS)
    sets = {
        "one weight": (down, torch.tensor([ROW * N_COLUMNS + COL])),
        "its row": (down, ROW * N_COLUMNS + row),
        "another row": (down, 100 * N_COLUMNS + row),
        "the largest weight": (largest, named[largest_name].abs().argmax().view(1)),
        "100 random weights": (everything, draw(everything.n_weights, 100, none, ["embedded model"])),
    }
    conditions = [
        Condition(target, name, Perturbation("zero"), len(positions), None, positions)
        for name, (target, positions) in sets.items()
    ]
    conditions += [
        Condition(down, "weight", Perturbation("zero"), 1, None, torch.tensor([row * N_COLUMNS + COL]), row=row)
        for row in (ROW, 100)
    ]
    baseline = sequence_losses(loaded.model, corpus.sequences)
    found = {"baseline": summarize(baseline, corpus).nll}
    for outcome in sweep(loaded.model, corpus, group(loaded.model, conditions), baseline):
        condition = outcome.condition
        name = condition.selection if condition.row is None else f"copy, row {condition.row}"
        found[name] = (outcome.losses - baseline).sum().item() / corpus.n_tokens
    return found


def test_the_model_predicts_english(effects):
    assert 2.0 < effects["baseline"] < 4.5  # random weights give about 10.8


def test_one_weight_of_134_million_breaks_the_model(effects):
    assert effects["one weight"] > 1.0


def test_its_row_breaks_it_even_more(effects):
    assert effects["its row"] > effects["one weight"]


def test_in_a_copy_of_the_batch_it_does_the_same(effects):
    assert effects[f"copy, row {ROW}"] == pytest.approx(effects["one weight"], abs=1e-5)
    assert abs(effects["copy, row 100"]) < 0.01


def test_another_row_of_the_same_matrix_is_spared_easily(effects):
    assert abs(effects["another row"]) < 0.1


def test_the_weight_of_largest_magnitude_is_not_critical(effects):
    assert abs(effects["the largest weight"]) < 0.01


def test_a_hundred_random_weights_are_not_missed(effects):
    assert abs(effects["100 random weights"]) < 0.01


def test_special_tokens_inside_texts_are_text_and_chats_are_rendered():
    tokenizer = AutoTokenizer.from_pretrained(embedded_checkpoint())
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}

    def ids_of(texts, **options):
        return tokenize(Texts(texts, "here"), tokenizer, CorpusOptions(**options)).sequences[0].tolist()

    written = ["One <|endoftext|> two <|im_end|>."]
    assert not special & set(ids_of(written))
    assert len(special & set(ids_of(written, parse_special_tokens=True))) == 2
    plain = ["Nothing special here, not even </s>."]
    assert ids_of(plain) == ids_of(plain, parse_special_tokens=True) == tokenizer(plain[0]).input_ids
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ids_of([chat]) == list(rendered)
    assert special & set(rendered)
