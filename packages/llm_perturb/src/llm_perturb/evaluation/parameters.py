"""The parameters of a model: their names, which ones a TARGET_LAYER means, tied tensors, orientation."""

import difflib
import fnmatch
from collections.abc import Sequence

from bridge.exchange.errors import RequestError
from bridge.exchange.printable import check_printable
from torch import nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

ALL = "ALL"  # as a TARGET_LAYER: every weight matrix of the model


def named_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Every parameter tensor once, in model order; a tied tensor under its first name."""
    return dict(model.named_parameters())


def all_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, also those of tied tensors, to the name that stands for it."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def check_names(model: nn.Module) -> None:
    """See that every name of every parameter can be printed, written to a table and given as a TARGET_LAYER.

    Raises:
        RequestError: a name has a character that is not printable.
    """
    for name in all_names(model):
        check_printable(name, "the model's parameter")


def tied_groups(model: nn.Module) -> list[list[str]]:
    """The names of each tensor that has several, the one that stands for it first."""
    groups: dict[str, list[str]] = {}
    for name, first in all_names(model).items():
        groups.setdefault(first, []).append(name)
    return [sorted(group, key=lambda name: name != first) for first, group in groups.items() if len(group) > 1]


def layer_of(parameter_name: str) -> str:
    """The path of the module that owns a parameter: ``a.b.weight`` -> ``a.b``."""
    return parameter_name.rpartition(".")[0]


def in_scope(
    model: nn.Module, scope: str = "matrices", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Parameter]:
    """The parameters to be scored: ``matrices`` (two or more dimensions) or ``all``, then by name patterns.

    Args:
        model: the model.
        scope: ``matrices`` or ``all``.
        include: shell-style patterns, of which a name must match one; none means every name.
        exclude: shell-style patterns, of which a name must match none.

    Raises:
        RequestError: nothing is left.
    """
    chosen = {
        name: parameter
        for name, parameter in named_parameters(model).items()
        if (scope == "all" or parameter.ndim >= 2)
        and (not include or _matches(name, include))
        and not _matches(name, exclude)
    }
    if not chosen:
        raise RequestError(
            f"--scope {scope} with --include {list(include)} --exclude {list(exclude)} leaves no parameter"
        )
    return chosen


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(layer_of(name), p) for p in patterns)


def match(model: nn.Module, target_layer: str) -> list[str]:
    """The parameters that a TARGET_LAYER means, in model order.

    ``ALL`` is every matrix; a parameter name or the path of a module that owns a ``weight`` is that one
    tensor (a tied one by any of its names); a path above such modules, or a shell-style pattern, is every
    matrix below it.

    Raises:
        RequestError: it names no parameter; the message has the closest names.
    """
    names, parameters = all_names(model), named_parameters(model)
    for exact in (target_layer, f"{target_layer}.weight"):
        if exact in names:
            return [names[exact]]
    matrices = [name for name, parameter in parameters.items() if parameter.ndim >= 2]
    if target_layer == ALL:
        return matrices
    found = [n for n in matrices if n.startswith(f"{target_layer}.") or _matches(n, [target_layer])]
    if not found:
        candidates = {layer_of(name) for name in names} | names.keys()
        close = difflib.get_close_matches(target_layer, sorted(candidates), n=3, cutoff=0.5)
        hint = f" (closest: {', '.join(repr(name) for name in close)})" if close else ""
        raise RequestError(
            f"TARGET_LAYER '{target_layer}' names no parameter of this {type(model).__name__}{hint}; "
            "see them with --list-layers"
        )
    return found


def stored_transposed(model: nn.Module, parameter_name: str) -> bool:
    """Whether a matrix is stored (in, out), as GPT-2's Conv1D does, rather than (out, in)."""
    return isinstance(model.get_submodule(layer_of(parameter_name)), Conv1D)


def table(model: nn.Module) -> str:
    """What there is to perturb: layer, shape, number of weights, and the other names of a tied tensor."""
    others = {group[0]: f"  (also {', '.join(group[1:])})" for group in tied_groups(model)}
    lines = [
        f"{name:60s} {' x '.join(map(str, parameter.shape)):>16s} {parameter.numel():>14,d}{others.get(name, '')}"
        for name, parameter in named_parameters(model).items()
    ]
    return "\n".join([f"{'parameter':60s} {'shape as stored':>16s} {'weights':>14s}", *lines])
