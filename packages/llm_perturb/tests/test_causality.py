"""A model for which the loss of a text is not defined, or depends on the batch, is refused in one line."""

import json

import pytest
import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.run_folder import RunOptions
from llm_perturb.baseline_run import measure_baseline
from llm_perturb.evaluation import models
from llm_perturb.evaluation.causality import LENGTH, check_causal, later_tokens_matter, probe_sequences
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.perplexity import check_padding, sequence_losses
from llm_perturb.perturbation_options import PerturbationOptions
from llm_perturb.perturbation_run import measure_perturbations
from tiny_models import build, byte_tokenizer, save_checkpoint
from tiny_models.checkpoints import save_family
from tiny_models.odd_models import bert
from torch import nn

NOT_CAUSAL = "later tokens change this model's predictions of earlier ones: it is not a causal language model"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_causal_models_pass(model, batch_size):
    check_causal(model, batch_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_narrow_models_pass(name, dtype):
    check_causal(build(name, dtype), batch_size=3)


def test_a_masked_language_model_is_refused_and_its_decoder_is_not():
    with pytest.raises(RequestError, match=NOT_CAUSAL):
        check_causal(bert(is_decoder=False))
    check_causal(bert(is_decoder=True))


def test_a_model_that_looks_one_token_ahead_is_refused():
    model = build("llama", torch.float32)
    model.model.layers[2].register_forward_hook(lambda module, args, output: output + 0.05 * output.roll(-1, 1))
    with pytest.raises(RequestError, match=NOT_CAUSAL):
        check_causal(model)


def test_a_model_that_computes_something_else_each_time_is_refused():
    model = build("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: output * (1 + torch.rand(())))
    with pytest.raises(RequestError, match="gives other predictions when it is run again"):
        check_causal(model)


def test_a_rare_flip_is_no_reason(monkeypatch):
    """Rounding may send a token to another expert in one probe."""
    model, calls = build("llama"), []

    def flip_once(module, args, output):
        calls.append(None)
        return output + 1.0 if len(calls) in {1, 3} else output

    model.model.norm.register_forward_hook(flip_once)
    check_causal(model)
    assert len(calls) > 3


def test_a_model_that_cannot_be_run_on_ids_is_refused():
    model = build("llama")
    model.model.norm.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(RequestError, match="cannot be run on the ids of a few tokens alone: ZeroDivisionError"):
        check_causal(model)


def test_padding_that_changes_a_prediction_is_refused():
    model = build("llama")
    model.model.layers[1].register_forward_hook(lambda module, args, output: output + 0.01 * output.mean(0))
    check_causal(model)
    with pytest.raises(RequestError, match="a padded batch changes this model's predictions: --batch-size 1, not 4"):
        check_causal(model, 4)


def test_padding_that_changes_a_loss_is_refused(sequences):
    """As of a model whose choice of keys depends on how long the batch is, once it is longer than the probe."""
    model = build("llama")
    hook = lambda module, args, output: output * (1 + 1e-3 * max(0, output.shape[1] - LENGTH))  # noqa: E731
    model.model.layers[1].register_forward_hook(hook)
    check_causal(model, 4)
    with pytest.raises(RequestError, match="a padded batch changes .*: --batch-size 1, not 4"):
        check_padding(model, sequences, sequence_losses(model, sequences, 4), 4)
    check_padding(model, sequences, sequence_losses(model, sequences), 1)


def test_padding_that_changes_nothing_passes(model, sequences):
    check_padding(model, sequences, sequence_losses(model, sequences, 3), 3)


def test_sequences_of_the_probe():
    model = build("llama")
    for seed in range(20):
        one, other = probe_sequences(model, seed)
        assert torch.equal(one[:2], other[:2])
        assert (one[2:] != other[2:]).all()
        assert max(one.max(), other.max()) < 50
    model.resize_token_embeddings(2, mean_resizing=False)
    assert {int(token) for token in torch.cat(probe_sequences(model))} == {0, 1}


@pytest.mark.parametrize(("change", "matters"), [(0.0, False), (1e-5, False), (2e-2, True)])
def test_change_of_earlier_predictions_is_relative_to_that_of_later_ones(change, matters):
    one = torch.randn(5, 7)
    other = one + torch.tensor([0, change, 5.0, 1.0, 1.0])[:, None]
    assert later_tokens_matter(one, other) == matters


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts.txt").write_text("one text\nanother text that is longer\n")
    return CorpusOptions(data_file=str(tmp_path / "texts.txt"), max_length=32)


@pytest.mark.parametrize("command", ["baseline", "perturbations"])
def test_the_commands_refuse_it(command, texts, tmp_path):
    bert(is_decoder=False, vocabulary=256).float().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    setup = {
        "model_options": models.ModelOptions(model=str(tmp_path / "model"), device="cpu"),
        "corpus_options": texts,
        "batch_size": 1,
        "run_options": RunOptions(output=str(tmp_path / "out")),
    }
    with pytest.raises(RequestError, match=NOT_CAUSAL):
        if command == "baseline":
            measure_baseline(**setup)
        else:
            options = PerturbationOptions(target_layer=["bert.encoder.layer.1.output.dense"], k=[3])
            measure_perturbations(options=options, **setup)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("asked", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_that_is_not_there_can_be_replaced(asked, tmp_path):
    save_checkpoint(tmp_path, "llama", n_layers=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {asked: "flash_attention_2"}))
    for weights in ("resident", "streamed"):
        with pytest.raises(RequestError, match="cannot be loaded; .* --attn-implementation eager"):
            models.load(str(tmp_path), device="cpu", weights=weights)
        loaded = models.load(str(tmp_path), device="cpu", weights=weights, attn_implementation="eager")
        assert loaded.model.config._attn_implementation == "eager"
    with pytest.raises(RequestError, match="no_such_kernel"):
        models.load(str(tmp_path), device="cpu", attn_implementation="no_such_kernel")


def test_a_mixture_of_experts_in_float64(sequences, tmp_path):
    save_family(tmp_path, "mixtral", torch.float32)
    narrow, wide = (models.load(str(tmp_path), dtype=dtype, device="cpu").model for dtype in ("float32", "float64"))
    losses = sequence_losses(wide, sequences)
    torch.testing.assert_close(losses, sequence_losses(narrow, sequences), rtol=1e-5, atol=0)
    assert isinstance(wide.model.layers, nn.ModuleList) and wide.dtype == torch.float64
