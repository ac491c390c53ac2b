"""The parts of a fused projection, as the bridge reads them from a weight's position, are those of the real modules."""

import importlib

import pytest
import torch
from bridge.analysis.components import QUERY_KEY_VALUE, fused_projection
from llm_perturb.evaluation.model_sizes import attention_sizes
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

LLAMA_LIKE = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=20)
GPT = dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=4)
FALCON = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, alibi=False, bias=True)
MPT = dict(vocab_size=50, d_model=16, n_layers=1, n_heads=4, max_seq_len=16)
DBRX = dict(
    attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
    ffn_config=dict(ffn_hidden_size=20, moe_num_experts=2, moe_top_k=1),
)
EAGER = "eager_attention_forward"  # a function of the module, given query, key and value after the attention itself
# configuration, and where query, key and value are seen: a function, a method that gets or returns them, the products
FAMILIES = {
    "gpt2": ("gpt2", GPT, EAGER),
    "gpt_neox": ("gpt_neox", LLAMA_LIKE, EAGER),
    "phi3 grouped": ("phi3", LLAMA_LIKE | dict(num_key_value_heads=2, pad_token_id=0), EAGER),
    "persimmon": ("persimmon", LLAMA_LIKE, EAGER),
    "gpt_bigcode": ("gpt_bigcode", GPT | dict(multi_query=True), EAGER),
    "gpt_bigcode all heads": ("gpt_bigcode", GPT | dict(multi_query=False), EAGER),
    "dbrx grouped": ("dbrx", MPT | DBRX, EAGER),
    "falcon all heads": ("falcon", FALCON | dict(multi_query=False), "FalconAttention._split_heads"),
    "falcon one key": ("falcon", FALCON | dict(multi_query=True), "FalconAttention._split_heads"),
    "falcon grouped": (
        "falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2), "FalconAttention._split_heads"
    ),
    "bloom": ("bloom", dict(vocab_size=50, hidden_size=16, n_layer=1, n_head=4), "BloomAttention._reshape"),
    "codegen": ("codegen", GPT | dict(rotary_dim=4, n_ctx=16), "CodeGenAttention._attn"),
    "gpt_neox_japanese": ("gpt_neox_japanese", LLAMA_LIKE, "GPTNeoXJapaneseAttention._attn"),
    "openai-gpt": ("openai-gpt", GPT, "Attention._attn"),
    "mpt": ("mpt", MPT, "products"),
}  # fmt: skip


class Products(TorchFunctionMode):
    """Notes the factors of torch.matmul: of MPT's attention, query and key, then the weights and value."""

    def __init__(self):
        self.factors = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.matmul:
            self.factors += [factor.clone() for factor in args]
        return func(*args, **(kwargs or {}))


def states(model, seen_in, monkeypatch):
    """Query, key and value of the only layer."""
    ids = torch.arange(7)[None]
    if seen_in == "products":
        with Products() as products:
            model(input_ids=ids, use_cache=False)
        query, key, _, value = products.factors
        return query, key, value
    module = importlib.import_module(type(model).__module__)
    *owner, name = seen_in.split(".")
    owner = getattr(module, owner[0]) if owner else module
    plain = getattr(owner, name)
    seen = []

    def spy(attention, *arguments, **options):
        outputs = plain(attention, *arguments, **options)
        split = outputs if name in ("_split_heads", "_reshape") else arguments
        seen.extend(state.clone() for state in split[:3])
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, spy)
        model(input_ids=ids, use_cache=False)
    assert len(seen) == 3
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_perturbing_one_part_changes_that_part_alone(family, monkeypatch):
    model_type, sizes, seen_in = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes), dtype=torch.float64)
    model.eval().requires_grad_(False).set_attn_implementation("eager")
    fused = {
        name: fused_projection(name, parameter.numel(), attention_sizes(model))
        for name, parameter in model.named_parameters()
    }
    fused = {name: projection for name, projection in fused.items() if projection}
    assert fused, "no parameter is taken apart"
    before = states(model, seen_in, monkeypatch)
    for name, projection in fused.items():
        parameter = model.get_parameter(name)
        indices = range(parameter.shape[projection.axis])
        parts = [projection.component(index, index) for index in indices]
        for number, part in enumerate(QUERY_KEY_VALUE):
            saved = parameter.clone()
            chosen = torch.tensor([index for index in indices if parts[index] == part])
            parameter.index_add_(
                projection.axis, chosen, torch.ones_like(parameter).index_select(projection.axis, chosen)
            )
            after = states(model, seen_in, monkeypatch)
            changed = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
            assert changed == [at == number for at in range(3)], (name, part)
            parameter.copy_(saved)
