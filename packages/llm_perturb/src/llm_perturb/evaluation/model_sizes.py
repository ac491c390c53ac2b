"""Sizes of a model that its configuration names: positions and attention heads."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError

# what configurations call the number of positions; transformers maps most of the other names to the first
_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"),
    *("max_target_positions", "context_length"),
)


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that a model has positions for, as its configuration names it; None if it does not.

    Models of the RoBERTa kind count positions from the row after that of the padding token.
    """
    config = model.config.get_text_config()
    declared = (getattr(config, name, None) for name in _POSITIONS)
    positions = next((number for number in declared if isinstance(number, int) and number > 0), None)
    if positions is None:
        return None
    skipped = 0
    for module in model.modules():
        padding: object = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            skipped = padding + 1
    return positions - skipped


def attention_sizes(model: PreTrainedModel) -> dict[str, str | int]:
    """Model type and sizes of the attention, where the config tells: by them, fused projections are taken apart."""
    config = model.config.get_text_config()
    n_heads, width = _entry(config, "num_attention_heads"), _entry(config, "hidden_size")
    if not n_heads or not width:
        return {"model_type": config.model_type}
    return {
        "model_type": config.model_type,
        "hidden_size": width,
        "num_attention_heads": n_heads,
        "num_key_value_heads": _key_value_heads(config, n_heads),
        "head_dim": _entry(config, "head_dim") or width // n_heads,
    }


def _key_value_heads(config: PreTrainedConfig, n_heads: int) -> int:
    """How many heads of keys and values; Falcon and GPT-BigCode say so by flags of their own."""
    if hasattr(config, "multi_query") and not getattr(config, "new_decoder_architecture", False):
        return 1 if config.multi_query else n_heads
    return _entry(config, "num_key_value_heads") or _entry(config, "num_kv_heads") or n_heads


def _entry(config: PreTrainedConfig, name: str) -> int | None:
    """A number of the configuration; None where it has none, or others from layer to layer."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None
