"""The parts of a fused projection, as the bridge reads them from a weight's place, are those of the real modules."""

import pytest
import torch
from bridge.analysis.components import QUERY_KEY_VALUE, component_of_weight, conv1d_qkv_shape, interleaved_head_dim
from llm_perturb.evaluation.models import _heads
from tiny_models import build
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neox import modeling_gpt_neox

MODULES = {
    "gpt2": (modeling_gpt2, "transformer.h.1.attn.c_attn"),
    "neox": (modeling_gpt_neox, "gpt_neox.layers.1.attention.query_key_value"),
}


def states(model, module, monkeypatch):
    """Query, key and value of the second layer, as the attention itself receives them."""
    seen = []
    plain = module.eager_attention_forward

    def spy(attention, query, key, value, *arguments, **options):
        seen.append([state.clone() for state in (query, key, value)])
        return plain(attention, query, key, value, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", spy)
        model(input_ids=torch.arange(7)[None], use_cache=False)
    return seen[1]


@pytest.mark.parametrize("tensor", ["weight", "bias"])
@pytest.mark.parametrize("family", list(MODULES))
def test_perturbing_one_part_changes_that_part_alone(family, tensor, monkeypatch):
    module, layer = MODULES[family]
    model = build(family)
    model.set_attn_implementation("eager")
    name = f"{layer}.{tensor}"
    parameter = dict(model.named_parameters())[name]
    shape = conv1d_qkv_shape(name, parameter.numel())
    head_dim = interleaved_head_dim(name, parameter.numel(), _heads(model))
    before = states(model, module, monkeypatch)
    for number, part in enumerate(QUERY_KEY_VALUE):
        saved = parameter.clone()
        for place in torch.cartesian_prod(*map(torch.arange, parameter.shape)).reshape(parameter.numel(), -1).tolist():
            if component_of_weight(name, *place, *[None] * (2 - len(place)), shape, head_dim) == part:
                parameter[tuple(place)] += 1.0
        assert (parameter != saved).sum() == parameter.numel() / 3
        after = states(model, module, monkeypatch)
        changed = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
        assert changed == [at == number for at in range(3)]
        assert (before[number] != after[number]).any(dim=(0, 2, 3)).all()  # of every head
        parameter.copy_(saved)
