"""What part of a decoder a parameter is: its component and its depth, read from its name.

Known families: GPT-2, GPT-NeoX (Pythia), Llama and its kin (Mistral, Qwen, Gemma, SmolLM2), OPT, GPT-J, BLOOM,
Phi-3. A name that none of them uses is ``other``. Query, key and value that a model keeps in one tensor are taken apart
where the attention of its model type is known (``fused_projection``), and stay one component elsewhere.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
        # gate_up_proj holds the gate as well; where one ends and the other begins is not known from its name
        (r"(^|\.)(c_fc|dense_h_to_4h|up_proj|fc1|fc_in|gate_up_proj|w3)$", "mlp in"),
        (r"(^|\.)(mlp\.c_proj|dense_4h_to_h|down_proj|fc2|fc_out|w2)$", "mlp out"),
    ]
]
_TENSOR_NAMES = re.compile(r"\.(weight|bias)$")


class DecoderPart(NamedTuple):
    """A parameter's component, and its decoder layer from 0 (None outside the layers: embedding, head, last norm)."""

    component: str
    depth: int | None


def decoder_part(parameter: str) -> DecoderPart:
    """Component and depth of a parameter (or a layer: its module path) by its name."""
    module = _TENSOR_NAMES.sub("", parameter)
    component = next((component for rule, component in _RULES if rule.search(module)), "other")
    depth = next((int(part) for part in module.split(".") if part.isdigit()), None)
    return DecoderPart(component=component, depth=depth)


@dataclass(frozen=True, kw_only=True)
class FusedProjection:
    """The order in which one tensor holds several projections.

    Along one axis of the stored tensor, runs of consecutive indices belong to one projection each. The sequence of runs
    begins again after the last one.

    Attributes:
        axis: 0 for rows (and for the entries of a vector), 1 for columns.
        runs: component and length of each run.
    """

    axis: int
    runs: tuple[tuple[str, int], ...]

    @property
    def components(self) -> tuple[str, ...]:
        """Each component once, in the order of the runs."""
        return tuple(dict.fromkeys(component for component, _ in self.runs))

    def component(self, row: int, col: int | None) -> str:
        """The component of the weight at a position of the stored tensor."""
        index = row if self.axis == 0 else col
        assert index is not None, "a vector has no columns"
        index %= sum(length for _, length in self.runs)
        for component, length in self.runs:
            if index < length:
                return component
            index -= length
        raise AssertionError("unreachable: the index is below the sum of the lengths")


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How the attention of a model type takes query, key and value out of one projection.

    Attributes:
        order: ``grouped``: each key head's queries, then that key, then its value; ``consecutive``: all queries, all
            keys, all values; ``four parts``: four times the queries, values and keys of a fourth of the heads.
        axis: of the stored weight (of a bias it is 0).
    """

    order: Literal["grouped", "consecutive", "four parts"]
    axis: int = 0


_SIZES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")

# By model_type, as the attention of transformers splits the output of the projection. Any other is left whole.
_SPLITS = {
    "gpt2": _Split(order="consecutive", axis=1),
    "openai-gpt": _Split(order="consecutive", axis=1),
    "mpt": _Split(order="consecutive"),
    "phi3": _Split(order="consecutive"),
    "dbrx": _Split(order="consecutive"),
    "gpt_neox": _Split(order="grouped"),
    "gpt_neox_japanese": _Split(order="grouped"),
    "bloom": _Split(order="grouped"),
    "persimmon": _Split(order="grouped"),
    "falcon": _Split(order="grouped"),
    "gpt_bigcode": _Split(order="grouped"),
    "codegen": _Split(order="four parts"),
}


def fused_projection(parameter: str, n_weights: int, model: Mapping[str, Any]) -> FusedProjection | None:
    """How a parameter holds query, key and value; None if it does not, or if their order is not known.

    The order is that of the model type's attention; the sizes are those of the model's configuration, and must give the
    size of the parameter.

    Args:
        parameter: its full name.
        n_weights: its number of weights.
        model: the metadata of the model in a discovery's manifest; ``model_type``, ``hidden_size``,
            ``num_attention_heads``, ``num_key_value_heads`` and ``head_dim`` are used.
    """
    split = _SPLITS.get(model.get("model_type", ""))
    sizes: list[Any] = [model.get(key) for key in _SIZES]
    if split is None or not all(sizes) or decoder_part(parameter).component != FUSED_QUERY_KEY_VALUE:
        return None
    width, n_heads, n_key_heads, head_dim = map(int, sizes)
    length = (n_heads + 2 * n_key_heads) * head_dim
    is_bias = parameter.endswith(".bias")
    if n_weights != (length if is_bias else length * width):
        return None
    query, key, value = QUERY_KEY_VALUE
    if split.order == "grouped":
        runs = (query, n_heads // n_key_heads * head_dim), (key, head_dim), (value, head_dim)
    elif split.order == "consecutive":
        runs = (query, n_heads * head_dim), (key, n_key_heads * head_dim), (value, n_key_heads * head_dim)
    else:
        part = n_heads * head_dim // 4
        runs = (query, part), (value, part), (key, part)
    return FusedProjection(axis=0 if is_bias else split.axis, runs=runs)


class ModelComponents:
    """The components of a model's weights, with fused projections taken apart where their order is known.

    Args:
        n_weights: the number of weights of every parameter.
        model: the metadata of the model in a discovery's manifest.
    """

    def __init__(self, n_weights: Mapping[str, int], model: Mapping[str, Any]) -> None:
        self._fused = {name: fused_projection(name, n, model) for name, n in n_weights.items()}

    def of_weight(self, parameter: str, row: int, col: int | None) -> str:
        """The component of one weight."""
        fused = self._fused.get(parameter)
        return fused.component(row, col) if fused else decoder_part(parameter).component

    def of_parameter(self, parameter: str) -> tuple[str, ...]:
        """All components that a parameter holds."""
        fused = self._fused.get(parameter)
        return fused.components if fused else (decoder_part(parameter).component,)
