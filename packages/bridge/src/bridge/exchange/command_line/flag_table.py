"""The flags that a command takes, read from its signature and its docstrings.

A command is a function of keyword-only parameters. A parameter is either one flag, or a frozen dataclass of
keyword-only fields, each of which is a flag: options that several commands share are declared once, in such a class.
The help text of a flag stands in the docstring: under ``Args:`` of the function, under ``Attributes:`` of the class.
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeGuard

from bridge.exchange.command_line.verbosity import Verbosity

Command = Callable[..., None]
FilePath = typing.NewType("FilePath", str)  # in a list flag: a comma is part of the path and separates nothing

_SECTION = re.compile(r"^(Args|Attributes):\s*$", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): ?(.*)$")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One flag of a command.

    Attributes:
        key: its name in Python, such as ``data_file`` or ``from_``.
        annotation: its type.
        default: its value when it is left out; ``MISSING`` where it is required.
        help: what its docstring says.
        group: the heading that it stands under on the help page.
    """

    key: str
    annotation: object
    default: object
    help: str
    group: str

    @property
    def name(self) -> str:
        """As it is typed: ``--data-file``, ``--from``."""
        return spelled(self.key)

    @property
    def required(self) -> bool:
        """Whether the command needs it."""
        return self.default is MISSING

    @property
    def kind(self) -> object:
        """Its type without ``| None``; of a list the whole ``list[...]``."""
        return _without_none(self.annotation)

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return typing.get_origin(self.kind) is list

    @property
    def item(self) -> object:
        """The type of its values."""
        return typing.get_args(self.kind)[0] if self.is_list else self.kind

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values that it takes; empty where any will do."""
        return typing.get_args(self.item) if typing.get_origin(self.item) is typing.Literal else ()


def spelled(key: str) -> str:
    """A key as it is typed: ``data_file`` -> ``--data-file``."""
    return "--" + key.rstrip("_").replace("_", "-")


def flags_of(command: Command) -> dict[str, Flag]:
    """The flags of a command by key, in the order of its parameters and of their classes' fields."""
    own_help = described(command)
    table: dict[str, Flag] = {}
    for key, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if _is_group(parameter.annotation):
            members = _fields(parameter.annotation)
        else:
            default = MISSING if parameter.default is inspect.Parameter.empty else parameter.default
            flag = Flag(
                key=key, annotation=parameter.annotation, default=default, help=own_help.get(key, ""), group="Flags"
            )
            members = [flag]
        for flag in members:
            assert flag.key not in table, f"{command.__name__} declares --{flag.key} twice"
            table[flag.key] = flag
    return table


def arguments_of(command: Command, values: Mapping[str, object]) -> dict[str, object]:
    """The keyword arguments of a command: the values of its flags, gathered in its dataclasses."""
    arguments: dict[str, object] = {}
    for key, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if _is_group(parameter.annotation):
            names = [field.name for field in fields(parameter.annotation)]
            arguments[key] = parameter.annotation(**{name: values[name] for name in names if name in values})
        elif key in values:
            arguments[key] = values[key]
    return arguments


def described(thing: object) -> dict[str, str]:
    """The entries under ``Args:`` or ``Attributes:`` of a docstring, each as one line; a class has its bases'."""
    text = inspect.getdoc(thing) or ""
    heading = _SECTION.search(text)
    bases = thing.__bases__ if isinstance(thing, type) else ()
    entries = {name: words for base in bases for name, words in described(base).items()}
    key = None
    for line in text[heading.end() :].split("\n") if heading else ():
        entry = _ENTRY.match(line)
        if entry:
            key = entry[1]
            entries[key] = entry[2]
        elif line.startswith("        ") and key:
            entries[key] += " " + line.strip()
        elif line.strip():
            break  # the next section
    return entries


def _is_group(annotation: object) -> TypeGuard[type[Any]]:
    """Whether a parameter's type is a dataclass of flags."""
    return isinstance(annotation, type) and is_dataclass(annotation)


def _fields(group: type[Any]) -> list[Flag]:
    help_texts, hints = described(group), typing.get_type_hints(group)
    title = (inspect.getdoc(group) or group.__name__).partition("\n")[0].rstrip(".")
    flags = []
    for field in fields(group):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        help_text = help_texts.get(field.name, "")
        flags.append(Flag(key=field.name, annotation=hints[field.name], default=default, help=help_text, group=title))
    return flags


def _without_none(annotation: object) -> object:
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


EVERY_COMMAND = {flag.key: flag for flag in _fields(Verbosity)}  # beside --config, --version and --help
