"""Where a parameter sits in a decoder: its component and its depth, read from its name.

Known families: GPT-2, GPT-NeoX (Pythia), Llama and its kin (Mistral, Qwen, Gemma, SmolLM2), OPT, GPT-J, BLOOM,
Phi-3. A name that none of them uses is ``other``.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

COMPONENTS = (
    "embedding",
    "attention query",
    "attention key",
    "attention value",
    "attention query_key_value",
    "attention output",
    "mlp gate",
    "mlp in",
    "mlp out",
    "norm",
    "head",
    "other",
)
QUERY_KEY_VALUE = ("attention query", "attention key", "attention value")
FUSED_QUERY_KEY_VALUE = "attention query_key_value"
FUSED_MLP = "mlp in"  # gate_up_proj holds both; it counts as mlp in unless its shape is known

# The last parts of a module path, most specific first; the first that matches decides.
_RULES = [
    (re.compile(pattern), component)
    for pattern, component in [
        (r"(^|\.)(ln_\w+|[^.]*(?i:norm)[^.]*)$", "norm"),
        (r"(^|\.)(lm_head|embed_out|output_projection)$", "head"),
        (r"(^|\.)(wte|wpe|embed_tokens|embed_positions|embed_in|word_embeddings)$", "embedding"),
        (r"(^|\.)(q_proj|query|wq)$", "attention query"),
        (r"(^|\.)(k_proj|key|wk)$", "attention key"),
        (r"(^|\.)(v_proj|value|wv)$", "attention value"),
        (r"(^|\.)(c_attn|query_key_value|qkv_proj|Wqkv|qkv)$", FUSED_QUERY_KEY_VALUE),
        (r"(^|\.)(attn|attention|self_attn|self_attention)\.(c_proj|dense|o_proj|out_proj|wo)$", "attention output"),
        (r"(^|\.)(gate_proj|w1)$", "mlp gate"),
        (r"(^|\.)(c_fc|dense_h_to_4h|up_proj|fc1|fc_in|gate_up_proj|w3)$", "mlp in"),
        (r"(^|\.)(mlp\.c_proj|dense_4h_to_h|down_proj|fc2|fc_out|w2)$", "mlp out"),
    ]
]
_TENSOR_NAMES = re.compile(r"\.(weight|bias)$")


class Place(NamedTuple):
    """A parameter's component, and its decoder layer from 0 (None outside the layers: embedding, head, last norm)."""

    component: str
    depth: int | None


def place_of(parameter: str) -> Place:
    """Component and depth of a parameter (or a layer: its module path) by its name."""
    module = _TENSOR_NAMES.sub("", parameter)
    component = next((component for rule, component in _RULES if rule.search(module)), "other")
    depth = next((int(part) for part in module.split(".") if part.isdigit()), None)
    return Place(component, depth)


def relative_depth(depth: int, n_layers: int) -> float:
    """The middle of decoder layer ``depth`` of ``n_layers`` as a share of the whole depth, between 0 and 1."""
    assert 0 <= depth < n_layers, f"layer {depth} of {n_layers}"
    return (depth + 0.5) / n_layers


def component_of_weight(
    parameter: str,
    row: int,
    col: int | None = None,
    shape: tuple[int, ...] | None = None,
    head_dim: int | None = None,
) -> str:
    """Component of one weight; a weight of a fused projection goes to its part if the needed fact is given.

    GPT-2's ``c_attn`` (Conv1D, stored (in, out)): query, key and value are thirds of the columns (of the
    entries, for the bias); needs ``shape``. GPT-NeoX's and BLOOM's ``query_key_value``: the rows run over
    (head, part, head_dim); needs ``head_dim``. ``gate_up_proj``: the first half of the rows is the gate;
    needs ``shape``. Without the fact, and for other fusions, the fused component is returned.
    """
    module = _TENSOR_NAMES.sub("", parameter)
    component = place_of(parameter).component
    if module.endswith("c_attn") and shape:
        index = row if len(shape) == 1 else col
        return QUERY_KEY_VALUE[index * 3 // shape[-1]]
    if module.endswith("attention.query_key_value") and head_dim:
        return QUERY_KEY_VALUE[row // head_dim % 3]
    if module.endswith("gate_up_proj") and shape:
        return "mlp gate" if row * 2 < shape[0] else "mlp in"
    return component


def interleaved_head_dim(parameter: str, n_weights: int, model: dict) -> int | None:
    """The head_dim of a ``query_key_value`` whose rows run over (head, part, head_dim), else None.

    Args:
        parameter: its name.
        n_weights: its size; a fusion with fewer keys than queries shows by it, and is not of this layout.
        model: the facts of the model in a discovery's manifest.
    """
    n_heads, head_dim = model.get("num_attention_heads"), model.get("head_dim")
    fused = _TENSOR_NAMES.sub("", parameter).endswith("attention.query_key_value")
    return head_dim if fused and n_heads and head_dim and n_weights % (3 * n_heads * head_dim) == 0 else None


def conv1d_qkv_shape(parameter: str, n_weights: int) -> tuple[int, ...] | None:
    """Shape of GPT-2's ``c_attn`` tensor, (d, 3d) or (3d,), from its number of weights; None for any other."""
    module = _TENSOR_NAMES.sub("", parameter)
    if not module.endswith("attn.c_attn"):
        return None
    if parameter.endswith(".bias"):
        return (n_weights,)
    width = round((n_weights / 3) ** 0.5)
    return (width, 3 * width) if 3 * width * width == n_weights else None


class Layout:
    """The components of a model's weights, with fused projections taken apart where the layout is known.

    Args:
        sizes: the number of weights of every parameter.
        model: the facts of the model in a discovery's manifest.
    """

    def __init__(self, sizes: Mapping[str, int], model: dict) -> None:
        self._shapes = {name: conv1d_qkv_shape(name, size) for name, size in sizes.items()}
        self._head_dims = {name: interleaved_head_dim(name, size, model) for name, size in sizes.items()}

    def component(self, parameter: str, row: int, col: int | None) -> str:
        """Of one weight."""
        return component_of_weight(parameter, row, col, self._shapes.get(parameter), self._head_dims.get(parameter))

    def components(self, parameter: str) -> tuple[str, ...]:
        """All that a parameter holds."""
        whole = place_of(parameter).component
        apart = self._shapes.get(parameter) or self._head_dims.get(parameter)
        return QUERY_KEY_VALUE if apart and whole == FUSED_QUERY_KEY_VALUE else (whole,)
