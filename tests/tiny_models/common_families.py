"""The three families that most tests use, each with what sets it apart."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiny_models.texts import VOCABULARY


class WideRMSNorm(LlamaRMSNorm):
    """Llama's norm computes in float32 even in a float64 model; comparing to nine digits needs all of it wide."""

    def forward(self, hidden):
        """The same formula in the dtype of the input."""
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


def _gpt2() -> PreTrainedModel:
    """Conv1D weights stored (in, out), embedding and output head tied, learned positions."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=8,
            n_layer=3,
            n_head=2,
            n_inner=20,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _neox() -> PreTrainedModel:
    """Parallel residual, fused query_key_value, untied head."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=20,
            max_position_embeddings=16,
            use_parallel_residual=True,
            tie_word_embeddings=False,
        )
    )


def _llama(tied: bool) -> PreTrainedModel:
    """Grouped-query heads and a gated MLP."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=20,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )
    )
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = WideRMSNorm
    return model


BUILDERS = {
    "gpt2": _gpt2,
    "neox": _neox,
    "llama": lambda: _llama(tied=False),
    "llama_tied": lambda: _llama(tied=True),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The tiny model of that name, every parameter random (biases and gains too), ready to be measured."""
    torch.manual_seed(0)
    model = BUILDERS[name]().to(torch.float64).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
        parameter.requires_grad_(False)
    model.to(dtype)
    return model
