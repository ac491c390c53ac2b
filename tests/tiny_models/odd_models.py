"""Models with what no common family has, for the checks that refuse a model or a way to run it."""

import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from tiny_models.common_families import build


class _Product(torch.autograd.Function):
    """x Wᵀ as a fused kernel computes it: the weight is handed to it straight, and no torch function sees that."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        at_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad @ weight, at_weight


class FusedLinear(nn.Linear):
    """A linear map by a kernel of its own."""

    def forward(self, x):
        return _Product.apply(x, self.weight)


class Counting(nn.Module):
    """A layer whose result depends on how many have run since the embedding, which no argument of it says."""

    def __init__(self, layer, counter):
        super().__init__()
        self.layer, self.counter = layer, counter

    def forward(self, *args, **kwargs):
        self.counter.append(None)
        return self.layer(*args, **kwargs) * (1 + 0.1 * len(self.counter))


class Noisy(nn.Module):
    """A layer that computes something else each time."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs) * (1 + 0.1 * torch.rand(()))


def fused():
    """One of the maps is computed by a kernel of its own."""
    model = build("llama")
    model.model.layers[1].mlp.up_proj.__class__ = FusedLinear
    return model


def counting():
    """The layers cannot be run in another order than that of the model."""
    model, counter = build("llama"), []
    model.model.embed_tokens.register_forward_hook(lambda *_: counter.clear())
    model.model.layers = nn.ModuleList([Counting(layer, counter) for layer in model.model.layers])
    return model


def noisy():
    """Nothing is computed twice."""
    model = build("llama")
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp)
    return model


def shared_layer():
    """Two layers share a part."""
    model = build("gpt2")
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    return model


def repeated_layer():
    """A layer is called twice."""
    model = build("gpt2")
    model.transformer.h[1] = model.transformer.h[0]
    model.config.use_cache = False  # it would be the same layer's cache both times
    return model


def bert(is_decoder=False, vocabulary=50):
    """BERT with a head for masked language modelling: its tokens see later ones, but for ``is_decoder``."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=64, is_decoder=is_decoder,
    )  # fmt: skip
    model = BertLMHeadModel(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model
