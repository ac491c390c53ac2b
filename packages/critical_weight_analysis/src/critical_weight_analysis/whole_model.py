"""The whole-model engine: one ordinary backward pass per sequence, for any causal language model.

Every gradient is added to its sums the moment autograd has it, and freed: beside the sums, which are as
large as the parameters they belong to, only one parameter's gradient exists at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from bridge.exchange.errors import RunError
from llm_perturb.evaluation import progress
from llm_perturb.evaluation.corpus import count_tokens
from llm_perturb.evaluation.parameters import named_parameters
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from critical_weight_analysis.layerwise.pass_settings import Settings
from critical_weight_analysis.metrics import Sensitivity


@dataclass(frozen=True)
class WholeModelEngine:
    """Measures a model as a whole.

    Attributes:
        account: why this engine, in one line.
        together: whether sequences may be run as a batch; here they are always run one by one.
    """

    account: str = "as a whole"
    together: bool = True
    name: ClassVar[str] = "whole_model"
    gives: ClassVar[frozenset[str]] = frozenset({"grad", "fisher", "curvature"})

    def sensitivities(
        self,
        model: PreTrainedModel,
        sequences: list[Tensor],
        names: Sequence[str],
        needs: frozenset[str],
        settings: Settings = Settings(),  # noqa: B008 - frozen
    ) -> tuple[Tensor, Iterator[Sensitivity]]:
        """The loss of every sequence, and what the metrics need to know of every named parameter.

            grad = (1/N) Σ_i dS_i/dθ     fisher = (1/n) Σ_i (dS_i/dθ / T_i)²     curvature = (1/N) Σ_i (dS_i/dθ)²

        A tied tensor's gradient holds all its uses: autograd adds them before it hands them over.

        Args:
            model: a causal language model in eval mode.
            sequences: each (T_i + 1,) ids.
            names: parameters to be measured, each by its first name.
            needs: the fields of ``Sensitivity`` to be filled.
            settings: how it is done; a batch size is without effect here, where squares need each sequence's own
                gradient.

        Returns:
            S_i, float64 (n,) on the CPU; and the parameters in model order. Each is freed once the next is taken.

        Raises:
            RunError: a loss is not finite, or no gradient came back.
        """
        chosen = set(names)
        parameters = {name: p for name, p in named_parameters(model).items() if name in chosen}
        assert len(parameters) == len(chosen), f"unknown parameters: {chosen - parameters.keys()}"
        sums = {name: _GradientSums(parameter, needs) for name, parameter in parameters.items()}
        losses = torch.zeros(len(sequences), dtype=torch.float64)
        mine = settings.share(list(enumerate(sequences)))
        lengths = [len(sequence) - 1 for sequence in sequences]
        with Gradients(model, sums, lambda name, gradient: sums[name].add(gradient, lengths[i])) as gradients:
            for i, sequence in progress.over(mine, "gradients", settings.progress):
                loss = summed_loss(logits_of(model, sequence, with_graph=bool(needs)), sequence)
                losses[i] = loss.item()
                if not losses[i].isfinite():
                    raise RunError(f"the loss of sequence {i} is {losses[i].item()}, not finite; try --dtype float32")
                if needs:
                    gradients.backward(loss)
        settings.add_up(losses)
        for total in [total for one in sums.values() for total in one.sums.values()]:
            settings.add_up(total)
        return losses, _divided(parameters, sums, len(sequences), count_tokens(sequences))


def logits_of(model: PreTrainedModel, sequence: Tensor, with_graph: bool = False) -> Tensor:
    """What the model says of each token but the first of a sequence (T_i + 1,): (T_i, V)."""
    with torch.set_grad_enabled(with_graph):
        logits: Tensor = model(input_ids=sequence[None].to(model.device), use_cache=False).logits  # (1, T_i + 1, V)
        return logits[0, :-1]


def summed_loss(logits: Tensor, sequence: Tensor) -> Tensor:
    """S_i, in nats, a float64 scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = sequence[1:, None].to(logits.device)
    # Not F.cross_entropy: over 50,000 float32 logits its sum of exponentials is off by 2e-5, which falsified
    # gradients of a 30-layer model by up to 0.5 %; logsumexp adds pairwise
    return (logits.logsumexp(-1) - logits.gather(1, targets)[:, 0]).double().sum()


def _divided(
    parameters: Mapping[str, Parameter], sums: dict[str, "_GradientSums"], n_sequences: int, n_tokens: int
) -> Iterator[Sensitivity]:
    for name, parameter in parameters.items():
        yield sums.pop(name).sensitivity(name, parameter.detach(), n_sequences, n_tokens)


class _GradientSums:
    """The running sums over sequences of one parameter's gradients and their squares."""

    def __init__(self, parameter: Parameter, needs: frozenset[str]) -> None:
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        self.sums = {need: torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False) for need in needs}

    def add(self, gradient: Tensor, n_tokens: int) -> None:
        """Add one sequence's dS_i/dθ."""
        gradient = gradient.to(self.dtype)
        if "grad" in self.sums:
            self.sums["grad"].add_(gradient)
        if "fisher" in self.sums:
            self.sums["fisher"].addcmul_(gradient, gradient, value=1 / n_tokens**2)
        if "curvature" in self.sums:
            self.sums["curvature"].addcmul_(gradient, gradient)

    def sensitivity(self, name: str, weight: Tensor, n_sequences: int, n_tokens: int) -> Sensitivity:
        """The sums as means: over sequences for fisher, over tokens for the others."""
        counts = {"grad": n_tokens, "fisher": n_sequences, "curvature": n_tokens}
        return Sensitivity(name, weight, **{need: total.div_(counts[need]) for need, total in self.sums.items()})


class Gradients:
    """While open, the chosen parameters alone require gradients, and each gradient is handed on once it is whole.

    Args:
        model: a causal language model.
        names: of the chosen parameters, by their first names.
        hand_on: called with the name and the gradient of a parameter, which is freed afterwards.
    """

    def __init__(self, model: nn.Module, names: Collection[str], hand_on: Callable[[str, Tensor], None]) -> None:
        self.model, self.names, self.hand_on = model, names, hand_on
        self.n_gradients = 0

    def __enter__(self) -> "Gradients":
        parameters = named_parameters(self.model)
        self.flags = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.names)
            parameter.grad = None
        hooked = [(parameters[name], self._hook(name)) for name in self.names]
        self.handles = [parameter.register_post_accumulate_grad_hook(hook) for parameter, hook in hooked]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)

    def _hook(self, name: str) -> Callable[[Parameter], None]:
        def collect(parameter: Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None  # the hook is called once it is there
            self.n_gradients += 1
            self.hand_on(name, gradient)

        return collect

    def backward(self, loss: Tensor) -> None:
        """Run one sequence's backward pass; the hooks do the rest.

        Raises:
            RunError: no gradient came back.
        """
        before = self.n_gradients
        if loss.requires_grad:
            loss.backward()
        if self.n_gradients == before:
            raise RunError("no parameter in scope received a gradient; is the model offloaded to the CPU or the disk?")
