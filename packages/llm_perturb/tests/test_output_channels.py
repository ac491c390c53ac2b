"""Which axis of a stored tensor is the output channel: seen from what a change of one weight does to the output."""

import numpy as np
import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.parameters import named_parameters
from llm_perturb.measurement_condition import values_under
from llm_perturb.output_channels import axes_under, channel_axes, check_channels
from llm_perturb.perturbation import Perturbation
from tiny_models import build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZE = dict(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
EXPERTS = {
    "mixtral": dict(intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    "llama4_text": dict(intermediate_size=12, intermediate_size_mlp=12, num_local_experts=4, num_experts_per_tok=2),
}
AXES = {"mixtral": (0, 1), "gpt_oss": (0, 2), "llama4_text": (0, 2)}


def experts_model(kind, implementation=None):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZE, **EXPERTS[kind], pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    if implementation:
        model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def fused(model, ending):
    (name,) = [name for name in named_parameters(model) if name.endswith(ending)]
    return name


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [("mixtral", None), ("mixtral", "eager"), ("gpt_oss", None), ("gpt_oss", "eager"), ("llama4_text", None)],
)
def test_the_output_channels_of_fused_experts_are_those_that_their_products_compute(kind, implementation):
    model = experts_model(kind, implementation)
    for ending in ("experts.gate_up_proj", "experts.down_proj"):
        assert channel_axes(model, fused(model, ending)) == AXES[kind]


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_output_channel_of_an_expert_is_one_feature_of_its_output(kind):
    """Independent of the probe: zeroing everything but one output channel leaves one feature of the output."""
    model = experts_model(kind)
    down = model.get_parameter(fused(model, "experts.down_proj"))
    bias = getattr(model.model.layers[0].get_submodule("mlp" if kind != "llama4_text" else "feed_forward").experts,
                   "down_proj_bias", None)  # fmt: skip
    if bias is not None:
        bias.zero_()
    kept = down.clone()
    down.zero_()
    channel = (slice(None), 3) if AXES[kind] == (0, 1) else (slice(None), slice(None), 3)
    down[channel] = kept[channel]
    block = model.model.layers[0].get_submodule("feed_forward" if kind == "llama4_text" else "mlp").experts
    outputs = []
    hook = block.register_forward_hook(lambda module, inputs, output: outputs.append(output.reshape(-1, 8)))
    model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]))
    hook.remove()
    assert outputs[0].abs().amax(0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("kind", EXPERTS)
def test_quantize_takes_a_step_for_each_output_channel_of_each_expert(kind):
    model = experts_model(kind)
    name = fused(model, "experts.down_proj")
    weight = model.get_parameter(name)  # (E, O, I) or (E, I, O)
    weight[0, 3] *= 10
    every = torch.arange(weight.numel())
    quantized = values_under(Perturbation("quantize", n_bits=4), None, model)(name, weight.data, every).view_as(weight)
    expected = weight.numpy().astype(np.float64)
    for expert in expected:
        for channel in expert if AXES[kind] == (0, 1) else expert.T:
            step = np.abs(channel).max() / 7
            channel[:] = np.round(channel / step) * step
    np.testing.assert_allclose(quantized.numpy(), expected, rtol=1e-6)


def test_modules_of_torch_and_of_gpt2_have_one_convention_each():
    gpt2, llama = build("gpt2"), build("llama")
    assert channel_axes(gpt2, "transformer.h.0.attn.c_attn.weight") == (1,)
    assert channel_axes(gpt2, "transformer.h.0.attn.c_attn.bias") == ()
    assert channel_axes(gpt2, "transformer.wte.weight") == (0,)
    assert channel_axes(llama, "model.layers.0.mlp.down_proj.weight") == (0,)


class Plain(nn.Module):
    """Tensors of its own: matrices used as x W and as W x, in several ways, and one that no product sees."""

    def __init__(self):
        super().__init__()
        self.right = nn.Parameter(torch.randn(8, 8))
        self.left = nn.Parameter(torch.randn(8, 8))
        self.first = nn.Parameter(torch.randn(8, 8))
        self.added = nn.Parameter(torch.randn(8, 8))
        self.vector = nn.Parameter(torch.randn(8, 8))
        self.scale = nn.Parameter(torch.randn(2, 2, 2))
        self.both_ways = nn.Parameter(torch.randn(2, 4, 8))
        self.one_row, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 2, 4))
        self.number = nn.Parameter(torch.randn(1, 1))

    def forward(self, x):
        columns = x.reshape(-1, 8).T  # (H, B T)
        columns = torch.mm(self.first, columns)
        columns = torch.addmm(columns, self.added, columns)
        columns = columns + torch.mv(self.vector, columns[:, 0])[:, None]
        columns = columns + torch.mv(columns.T, self.one_row.view(8))
        columns = torch.mm(self.both_ways.view(8, 8), columns)
        columns = torch.mm(columns.T, self.both_ways.view(8, 8)).T
        x = columns.T.reshape(x.shape)
        return (self.left @ (x @ self.right).mT).mT * self.scale.view(-1)


def test_a_tensor_of_a_module_of_its_own_is_watched_in_a_forward_pass():
    model = build("llama", torch.float32)
    model.model.layers[0].mlp.act_fn = nn.SiLU()
    model.model.norm = Plain().requires_grad_(False)
    assert channel_axes(model, "model.norm.right") == (1,)
    for name in ("left", "first", "added", "vector"):
        assert channel_axes(model, f"model.norm.{name}") == (0,)
    assert channel_axes(model, "model.norm.one_row") == ()  # a vector, as it has one axis that is longer than 1
    assert channel_axes(model, "model.norm.number") == ()
    assert channel_axes(model, "model.norm.table") == (1,)
    with pytest.raises(
        RequestError, match=r"quantize: which axes of model.norm.scale \(2, 2, 2\) are its output channel"
    ):
        check_channels(model, ["model.norm.right", "model.norm.scale"])
    with pytest.raises(RequestError, match=r"which axes of model.norm.both_ways \(2, 4, 8\) are its output channel"):
        check_channels(model, ["model.norm.both_ways"])
    scale, index = model.model.norm.scale.data, torch.tensor([3, 0])
    for kind in ("zero", "sign_flip", "scale", "gaussian_noise", "bit_flip"):  # need no channel
        assert len(values_under(Perturbation(kind), 0, model)("model.norm.scale", scale, index)) == 2


def test_strides_tell_which_axes_a_view_runs_over():
    weight = torch.empty(5, 3, 4)
    assert axes_under(weight, *_last(weight[2])) == (2,)
    assert axes_under(weight, *_last(weight[2].T)) == (1,)
    assert axes_under(weight, *_last(weight.view(15, 4).T)) == (0, 1)
    assert axes_under(weight, *_last(weight.view(60))) == (0, 1, 2)
    assert axes_under(torch.empty(2, 1, 2), stride=1, size=4) == (0, 2)
    assert axes_under(weight, *_last(weight[:, :, :1])) == ()
    assert axes_under(torch.empty(5, 1, 4), *_last(weight[:, 0].reshape(20))) == (0, 2)
    assert axes_under(weight, *_last(weight.expand(2, 5, 3, 4)[..., None].expand(-1, -1, -1, -1, 6))) == ()


def _last(view):
    return view.stride(-1), view.shape[-1]
