"""The parts of a fused projection, as the bridge reads them from a weight's position, are those of the real modules."""

import pytest
import torch
from bridge.analysis.components import QUERY_KEY_VALUE, fused_projection
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
    fused = fused_projection(name, parameter.numel(), _heads(model))
    before = states(model, module, monkeypatch)
    for number, part in enumerate(QUERY_KEY_VALUE):
        saved = parameter.clone()
        for row in range(parameter.shape[0]):
            for col in range(parameter.shape[1]) if parameter.ndim == 2 else [None]:
                if fused.component(row, col) == part:
                    parameter[row if col is None else (row, col)] += 1.0
        assert (parameter != saved).sum() == parameter.numel() / 3
        after = states(model, module, monkeypatch)
        changed = [not torch.equal(one, two) for one, two in zip(before, after, strict=True)]
        assert changed == [at == number for at in range(3)]
        assert (before[number] != after[number]).any(dim=(0, 2, 3)).all()  # of every head
        parameter.copy_(saved)
