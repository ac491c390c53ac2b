"""How long a sequence a model takes, whatever its configuration calls that."""

import pytest
import torch
from llm_perturb.evaluation.model_sizes import max_positions
from tiny_models import BUILDERS
from transformers import AutoModelForCausalLM, MambaConfig, MptConfig, RobertaConfig


def model_of(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_the_positions_of_the_common_families(name):
    tiny = BUILDERS[name]()
    declared = {"gpt2": "n_positions"}.get(name, "max_position_embeddings")
    assert max_positions(tiny) == getattr(tiny.config, declared) > 1


def test_mpt_calls_them_max_seq_len():
    assert max_positions(model_of(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=32, max_seq_len=64))) == 64


def test_roberta_has_fewer_than_rows():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(
        is_decoder=True,
        vocab_size=32,
        max_position_embeddings=66,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        **sizes,
    )
    assert max_positions(model_of(config)) == 64


def test_a_model_that_declares_none_has_no_limit():
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4)
    assert max_positions(model_of(config)) is None
