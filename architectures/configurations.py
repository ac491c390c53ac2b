"""The smallest configuration of every model type: numbers of layers, heads and features for each name that is used."""

import inspect
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Entries that a configuration takes if it has them. The names mean the same in all model types.
_SIZES: dict[str, Any] = {
    # text
    "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    # widths and layers
    "hidden_size": 32, "d_model": 32, "embed_dim": 32, "hidden_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64,
    "num_hidden_layers": 3,
    "decoder_layers": 3, "decoder_ffn_dim": 64, "encoder_layers": 1, "encoder_ffn_dim": 64,
    "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    # attention
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_heads": 4, "d_kv": 8, "kv_channels": 8,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "attention_head_dim": 8, "attention_hidden_size": 32,
    "rotary_dim": 4, "sliding_window": 4, "global_head_dim": 8, "num_global_key_value_heads": 2,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "qk_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "num_kv_shared_layers": 1,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    # experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    # states in place of attention
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 8, "mamba_head_dim": 8, "n_mamba_heads": 2,
    "mamba_headdim": 32, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_ssm": 64,
    "mamba_d_conv": 4, "mamba_d_inner": 64, "mamba_chunk_size": 8, "state_size": 8, "ssm_state_size": 8,
    "time_step_rank": 4, "n_groups": 1, "expand": 2, "conv_kernel": 4, "chunk_size": 8,
    "lru_width": 32, "rnn_hidden_size": 32,
    # further
    "laurel_rank": 4, "altup_num_inputs": 2,
}  # fmt: skip

_DECODER = {"is_decoder": True}
_LATENT_ATTENTION = {"num_key_value_heads": 4, "head_dim": 4}
_ALTERNATING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
# What one model type needs beyond that.
_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["bert", "bert-generation", "electra", "ernie", "megatron-bert", "rembert", "roformer"], _DECODER),
    **dict.fromkeys(
        ["roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"],
        _DECODER | {"pad_token_id": 0},
    ),
    "xmod": _DECODER | {"languages": ["en_XX"], "default_language": "en_XX", "pad_token_id": 0},
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "xlm": {"pad_token_id": 0},
    "modernbert-decoder": {"pad_token_id": 0},
    "reformer": _DECODER | {
        "pad_token_id": 0, "attn_layers": ["local", "lsh", "local"], "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16], "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
        "feed_forward_size": 64, "attention_head_size": 8, "num_buckets": 2,
    },
    "prophetnet": {
        "num_buckets": 8, "relative_max_distance": 16, "pad_token_id": 0, "num_decoder_layers": 3,
        "num_decoder_attention_heads": 4,
    },
    "xlnet": {"n_head": 4, "d_head": 8, "n_layer": 3, "d_inner": 64},
    "codegen": {"n_ctx": 64},
    "gpt_neo": {
        "num_layers": 4, "num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4,
    },
    **dict.fromkeys(
        ["axk1", "deepseek_v2", "deepseek_v3", "dots3_note_text", "minicpm3", "youtu"],
        _LATENT_ATTENTION,
    ),
    **dict.fromkeys(["axk2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"], _LATENT_ATTENTION | {"n_group": 1}),
    "longcat_flash": _LATENT_ATTENTION | {"num_layers": 2},
    "gemma3n_text": _ALTERNATING | {
        "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    **dict.fromkeys(["gemma4_text", "gemma4_unified_text"], _ALTERNATING | {"num_kv_shared_layers": 2}),
    "mamba2": {"num_heads": 8},
    "zamba2": {
        "layer_types": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "zaya": {"num_experts_per_tok": 1},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
}  # fmt: skip
# Lists with one entry for each layer are made anew from the number of layers.
_ONE_A_LAYER = {
    "layer_types", "layers_block_type", "block_types", "mlp_layer_types", "mlp_only_layers", "hybrid_layer_ids",
    "layers_num_heads", "layer_block_types", "attn_layer_indices",
}  # fmt: skip


def configuration(model_type: str) -> PreTrainedConfig:
    """The small configuration of a model type; of one that takes images or sound too, its text part is small."""
    return _small(CONFIG_MAPPING[model_type], _OWN.get(model_type, {}))


def _small(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    default = kind()
    names = set(default.to_dict()) | set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    sizes = {name: size for name, size in _SIZES.items() if name in names and name not in _ONE_A_LAYER}
    parts = {name: getattr(default, name, None) for name in kind.sub_configs if name not in own}
    small = {
        name: _small(type(part), _OWN.get(part.model_type, {}))
        for name, part in parts.items()
        if isinstance(part, PreTrainedConfig)
    }
    return kind(**{**sizes, **small, **own})
