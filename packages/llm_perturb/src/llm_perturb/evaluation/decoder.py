"""The walk through a decoder: the embedding, layer by layer, the output head.

The loss, the suffix forward and the layer-by-layer engine all go this way. Each part is run by the model's own forward
pass, in which some layers return what they are told instead of computing. Whether the weights are in memory or
are read from their files when they are needed is a property of the walk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm_perturb.evaluation.checkpoint import Checkpoint

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments of a layer
LayerOutput = Tensor | tuple[Any, ...] | list[Any]
OtherOutputs = tuple[Tensor | None, ...] | list[Tensor | None] | None  # beside the hidden state


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """The forward pass has come as far as it was wanted."""


def layer_input(call: Call) -> Tensor:
    """The hidden state among the arguments of a decoder layer, (B, T, H)."""
    args, kwargs = call
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_layer_input(hidden: Tensor, call: Call) -> Call:
    """The same arguments with another hidden state."""
    args, kwargs = call
    if args:
        return (hidden, *args[1:]), kwargs
    return (), kwargs | {"hidden_states": hidden}


def layer_output(output: LayerOutput) -> Tensor:
    """The hidden state among the results of a decoder layer, (B, T, H)."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


@dataclass(frozen=True)
class Decoder:
    """A causal language model as a walk: embedding, decoder layers, output head.

    Attributes:
        model: the whole model.
        path: the name of the list of decoder layers.
        layers: the decoder layers by name, in the order of the list.
        runner: the module that is called with ids for a walk: all but the output head, or the whole model.
        checkpoint: where the weights are read from when they are needed; None where the model holds them.
        other_outputs: what a layer returns beside the hidden state, as a tuple or list of None, for nothing uses it;
            None, or no entry, where it returns the hidden state alone.
    """

    model: nn.Module
    path: str
    layers: dict[str, nn.Module]
    runner: nn.Module
    checkpoint: Checkpoint | None = None
    other_outputs: Mapping[str, OtherOutputs] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, checkpoint: Checkpoint | None = None) -> "Decoder | None":
        """The walk through a model; None where it has no list of layers.

        The list is one with as many modules as the configuration says; among several, the one with the most parameters.
        """
        config = getattr(model, "config", None)
        n_layers = getattr(config.get_text_config(), "num_hidden_layers", None) if config is not None else None
        lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module}
        if not lists:
            return None

        def fit(path: str) -> tuple[bool, int]:
            return len(lists[path]) == n_layers, sum(parameter.numel() for parameter in lists[path].parameters())

        path = max(lists, key=fit)
        layers = {f"{path}.{number}": layer for number, layer in enumerate(lists[path])}
        return cls(model=model, path=path, layers=layers, runner=model, checkpoint=checkpoint)

    def present(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """The weights of these parameters are in memory while this is open."""
        return self.checkpoint.present(names) if self.checkpoint else nullcontext()

    def parameters_by_layer(self) -> dict[str, list[str]]:
        """The parameter names that belong to each layer; those of everything else under the empty name."""
        owner = {id(parameter): name for name, layer in self.layers.items() for parameter in layer.parameters()}
        names: dict[str, list[str]] = {layer: [] for layer in ["", *self.layers]}
        for name, parameter in self.model.named_parameters():
            names[owner.get(id(parameter), "")].append(name)
        return names

    def embed(self, ids: Tensor, **padding: Tensor) -> dict[str, Call]:
        """Run what comes before the layers, with ids (B, T).

        Returns:
            What each layer is called with; the hidden state is right for the first layer alone.
        """
        calls: dict[str, Call] = {}

        def record(name: str, call: Call) -> Tensor:
            calls[name] = call
            if len(calls) == len(self.layers):
                raise StopForward
            return layer_input(call)

        with self._replaced(record), suppress(StopForward):
            self.runner(input_ids=ids, use_cache=False, **padding)
        return calls

    def embed_only(self, ids: Tensor) -> Tensor:
        """Run what comes before the layers, with ids (B, T); the hidden state at the first layer, (B, T, H)."""
        reached: list[Tensor] = []

        def stop(name: str, call: Call) -> Tensor:
            reached.append(layer_input(call))
            raise StopForward

        with self._replaced(stop), suppress(StopForward):
            self.runner(input_ids=ids, use_cache=False)
        return reached[0]

    def run_layer(self, name: str, hidden: Tensor, call: Call) -> Tensor:
        """Run one layer: the hidden state (B, T, H) at its output.

        Args:
            name: of the layer.
            hidden: (B, T, H), at its input.
            call: what it is called with besides, from ``embed``.
        """
        args, kwargs = with_layer_input(hidden, call)
        return layer_output(self.layers[name](*args, **kwargs))

    def leave(self, ids: Tensor, hidden: Tensor, on_layer: Callable[[bool], None]) -> Any:  # noqa: ANN401 - a model's own record
        """Run what comes after the layers, with ids (B, T).

        Args:
            ids: of the same sequences as ``hidden``.
            hidden: (B, T, H), at the output of the last layer.
            on_layer: called at each layer with whether it is the last one.

        Returns:
            What the runner returns.
        """
        last = list(self.layers)[-1]

        def jump(name: str, call: Call) -> Tensor:
            on_layer(name == last)
            return hidden if name == last else layer_input(call)

        with self._replaced(jump):
            return self.runner(input_ids=ids, use_cache=False)

    def _replaced(self, compute: Callable[[str, Call], Tensor]) -> AbstractContextManager[None]:
        """All layers return what ``compute`` makes of their name and arguments, in the form in which they return it."""

        def forward_of(name: str) -> Callable[..., LayerOutput]:
            def forward(*args: Any, **kwargs: Any) -> LayerOutput:  # noqa: ANN401 - as the layer's own
                hidden = compute(name, (args, kwargs))
                others = self.other_outputs.get(name)
                return hidden if others is None else type(others)([hidden, *others])

            return forward

        return replaced_forwards({layer: forward_of(name) for name, layer in self.layers.items()})

    @contextmanager
    def starting_at(self, number: int, output: object) -> Iterator[None]:
        """While this is open, the layers before this one compute nothing and return ``output``."""
        skipped = list(self.layers.values())[:number]
        with replaced_forwards(dict.fromkeys(skipped, lambda *args, **kwargs: output)):
            yield

    def outputs_of(self, number: int, passes: Iterable[Callable[[], object]]) -> list[object]:
        """What a layer returns in each of several forward passes, which end there.

        Args:
            number: of the layer.
            passes: each runs the model once.

        Raises:
            RuntimeError: the layer is not called after those before it in the list, each once.
        """
        layers = list(self.layers.values())
        outputs: list[object] = []
        called: list[nn.Module] = []

        def stop(module: nn.Module, inputs: object, output: object) -> None:
            outputs.append(output)
            raise StopForward

        hooks = [layer.register_forward_pre_hook(lambda module, inputs: called.append(module)) for layer in layers]
        hooks.append(layers[number].register_forward_hook(stop))
        try:
            for run in passes:
                called.clear()
                with suppress(StopForward):
                    run()
                if called != layers[: number + 1]:
                    raise RuntimeError("the layers are not called in the order of their list, each once")
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @torch.no_grad()
    def parameters_after_layers(self) -> set[str]:
        """The parameters that are used after the last layer alone, as a forward pass of a few tokens shows."""
        calls: list[nn.Module | None] = []  # modules as they are called, None where the last layer ends
        owners = [module for module in self.model.modules() if next(module.parameters(recurse=False), None) is not None]
        hooks = [module.register_forward_pre_hook(lambda module, inputs: calls.append(module)) for module in owners]
        last = list(self.layers.values())[-1]
        hooks.append(last.register_forward_hook(lambda module, inputs, output: calls.append(None)))
        first = next(self.model.parameters())
        n_words = self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        ids = torch.arange(min(8, n_words), device=first.device)[None]  # (1, T)
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        end = calls.index(None)
        after = set(calls[end:]) - set(calls[:end])
        elsewhere = {id(p) for module in owners if module not in after for p in module.parameters(recurse=False)}
        return {name for name, parameter in self.model.named_parameters() if id(parameter) not in elsewhere}


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """While this is open, each of the modules runs another function in place of its own ``forward``."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
