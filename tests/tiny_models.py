"""Tiny random models, built from configs and never downloaded, for the tests of several packages."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY = 50


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


def shared_key_values() -> PreTrainedModel:
    """Gemma3n, whose last layers take keys and values of others."""
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        vocab_size=50, vocab_size_per_layer_input=50, hidden_size=8, hidden_size_per_layer_input=4, head_dim=4,
        intermediate_size=20, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, laurel_rank=2,
        altup_num_inputs=2, max_position_embeddings=16, sliding_window=4, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3nForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_sequences(lengths: Sequence[int] = (7, 2, 12, 5, 3, 7, 9, 4)) -> list[torch.Tensor]:
    """Random sequences; those of 2 to 12 tokens predict 1 to 11."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 tokens, the commonest words of a text: fewer and longer tokens than bytes, for speed."""
    counts = Counter(re.findall(r"\w+|[^\w\s]+", text))
    words = ["<unk>", *(word for word, _ in counts.most_common(255))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save_checkpoint(
    folder: Path,
    name: str,
    n_layers: int = 6,
    width: int = 16,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Write a random model of a family, for 256 tokens (bytes by default), as ``from_pretrained`` reads it."""
    torch.manual_seed(seed)
    tiny = BUILDERS[name]()
    config, of_family = tiny.config, {"gpt2": ("n_positions", "n_inner")}
    positions, inner = of_family.get(name, ("max_position_embeddings", "intermediate_size"))
    config.update({"vocab_size": 256, "num_hidden_layers": n_layers, "hidden_size": width, inner: 3 * width})
    config.update({positions: 512} | ({"head_dim": width // 4} if name.startswith("llama") else {}))
    model = type(tiny)(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
