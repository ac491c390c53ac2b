"""Models of many families, saved as ``from_pretrained`` reads them; transformers stores experts one by one."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tiny_models.common_families import BUILDERS
from tiny_models.texts import byte_tokenizer, word_tokenizer

LLAMA = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
    "shared_expert_intermediate_size": 12, "num_hidden_layers": 4,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4,
}  # fmt: skip
GPT2 = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
GPT_NEO = {"vocab_size": 50, "max_position_embeddings": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
FAMILIES = {
    "llama": LLAMA,
    "llama_tied": LLAMA | {"tie_word_embeddings": True},
    "gpt2": GPT2 | {"eos_token_id": 0},
    "gpt_neo": GPT_NEO | {"attention_types": [[["global", "local"], 1]], "bos_token_id": 0, "eos_token_id": 0},
    "gpt_neox": {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"},
    "mixtral": LLAMA | EXPERTS,
    "phimoe": LLAMA | EXPERTS,
    "qwen3_moe": LLAMA | QWEN_EXPERTS,
    "qwen3_next": LLAMA | QWEN_EXPERTS | LINEAR_ATTENTION,
    "deepseek_v2": LLAMA | DEEPSEEK,
    "deepseek_v3": LLAMA | DEEPSEEK,  # with a stored buffer, the routers' correction
    "hrm_text": LLAMA,  # two projections stored as one tensor
}


def save_model(
    model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options: object
) -> Path:
    """Write a model with a tokenizer (by default one of few tokens); the options are those of ``save_pretrained``."""
    model.save_pretrained(folder, **options)
    (tokenizer or word_tokenizer("a few words")).save_pretrained(folder)
    return folder


def save_family(folder, family, dtype=torch.float64, seed=0, changed=None, **options):
    """Write a random model of a family, all stored tensors random, and return it.

    ``changed`` are entries of the configuration that are set once the model is saved.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.removesuffix("_tied"), **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    stored = model.state_dict().keys()
    for tensor in [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in stored)]:
        tensor.add_(0.2 * torch.randn_like(tensor))
    save_model(model, folder, **options)
    if changed:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return model


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
    save_model(model, folder, tokenizer or byte_tokenizer())
