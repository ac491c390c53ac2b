"""Whether a model's logits are its output head's linear map of the last hidden state and nothing else: a probe."""

from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_perturb.evaluation.decoder import Decoder

_runners: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


class HeadProbe:
    """Watches one forward pass of a model (``with probe:``).

    Args:
        model: a causal language model.
        head: its output head.
        decoder: the walk through its layers, if it has any.

    Attributes:
        calls: the head's input (B, T, H) and output (B, T, V), for each call.
        ids_by_keyword: whether the module without the head is called with ``input_ids=``.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Linear, decoder: Decoder | None) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._head = head
        # the module without the head, and the one that holds the layers: some models call the inner one directly
        modules = [model.base_model]
        if decoder is not None:
            modules.append(model.get_submodule(decoder.path.rpartition(".")[0]))
        self._bases = list(dict.fromkeys(modules))
        self._takes_ids: set[nn.Module] = set()
        self._last_hidden: dict[nn.Module, object] = {}
        self.ids_by_keyword = False
        self._hooks = ExitStack()

    def __enter__(self) -> "HeadProbe":
        self._hooks.callback(self._head.register_forward_hook(self._after_head).remove)
        for base in self._bases:
            self._hooks.callback(base.register_forward_pre_hook(self._before_base, with_kwargs=True).remove)
            self._hooks.callback(base.register_forward_hook(self._after_base).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def runner(self, logits: Tensor) -> nn.Module | None:
        """The module that makes the last hidden state of ids, if the head makes the logits of that alone.

        Args:
            logits: (B, T, V), of the pass that was watched.
        """
        if len(self.calls) != 1:
            return None
        received, output = self.calls[0]
        if not _equal(output, logits):
            return None
        for base in self._bases:
            if base in self._takes_ids and _equal(self._last_hidden.get(base), received):
                return base
        return None

    def _after_head(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.calls.append((args[0].detach(), output.detach().clone()))

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            self._takes_ids.add(module)
        self.ids_by_keyword = kwargs.get("input_ids") is not None

    def _after_base(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._last_hidden[module] = getattr(output, "last_hidden_state", None)


def runner_without_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the last hidden state, where the logits are the head's linear map of it; else None.

    A forward pass of a few tokens shows it once for each model.
    """
    if model not in _runners:
        _runners[model] = _probe(model)
    return _runners[model]


def is_plain(model: PreTrainedModel) -> bool:
    """Whether the logits are the head's linear map of the last hidden state and nothing more, as a probe shows."""
    return runner_without_head(model) is not None


@torch.no_grad()
def _probe(model: PreTrainedModel) -> nn.Module | None:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    ids = torch.arange(min(8, head.weight.shape[0]), device=model.device)[None]  # (1, T)
    with HeadProbe(model, head, Decoder.of(model)) as probe:
        logits = model(input_ids=ids, use_cache=False).logits
    return probe.runner(logits)


def _equal(one: object, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
