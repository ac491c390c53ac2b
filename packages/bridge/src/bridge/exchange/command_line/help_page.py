"""Help pages: what a command does, then its flags by group, with their choices and defaults."""

import inspect
import textwrap
from collections.abc import Mapping

from bridge.exchange.command_line.flag_table import EVERY_COMMAND, Command, FilePath, Flag, flags_of

_WIDTH = 100
_TYPE_NAMES: dict[object, str] = {int: "N", float: "X", str: "TEXT", FilePath: "PATH"}
_CONFIG = "--config FILE"
_CONFIG_HELP = "a flat YAML file of further flags; those on the command line win"


def page_of_commands(commands: Mapping[str, Command], name: str) -> str:
    """The commands that the first word may name, a line each."""
    width = max(map(len, commands))
    lines = [f"    {word:{width}}  {_first_line(command)}" for word, command in commands.items()]
    return "\n".join([f"usage: {name} COMMAND [flags]", "", *lines, "", f"{name} COMMAND --help lists its flags"])


def page_of_command(command: Command, name: str) -> str:
    """A command's description and its flags."""
    table = flags_of(command)
    required = "".join(f" {flag.name} {_value_name(flag)}" for flag in table.values() if flag.required)
    lines = [f"{name} - {_first_line(command)}", "", f"usage: {name}{required} [flags]"]
    description = _description(command)
    if description:
        lines += ["", description]
    for group in dict.fromkeys(flag.group for flag in table.values()):
        lines += ["", f"{group}:"]
        for flag in table.values():
            if flag.group == group:
                lines += _entry(f"{flag.name} {_value_name(flag)}".rstrip(), _help_text(flag))
    lines += ["", "Every command:", *_entry(_CONFIG, _CONFIG_HELP)]
    for flag in EVERY_COMMAND.values():
        lines += _entry(flag.name, flag.help)
    lines += [*_entry("--version", "the version"), *_entry("--help", "this page")]
    return "\n".join(lines)


def _entry(heading: str, text: str) -> list[str]:
    return [f"  {heading}", *textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _value_name(flag: Flag) -> str:
    """What stands for the value: its choices, or its type in capitals; nothing for a switch."""
    if flag.kind is bool:
        return ""
    value = _TYPE_NAMES.get(flag.item, "TEXT")
    if flag.choices:
        value = "{" + ",".join(flag.choices) + "}"
    return f"{value} ..." if flag.is_list else value


def _help_text(flag: Flag) -> str:
    if flag.kind is bool:
        negated = f"--no-{flag.name.removeprefix('--')}"
        return f"{flag.help} Default: {'on' if flag.default else 'off'}; {negated} switches it off."
    if flag.required:
        return f"{flag.help} Required."
    if flag.default is None or flag.default == [] or flag.default == ():
        return flag.help
    values = flag.default if isinstance(flag.default, list | tuple) else [flag.default]
    return f"{flag.help} Default: {' '.join(map(str, values))}."


def _first_line(command: Command) -> str:
    return (inspect.getdoc(command) or "").partition("\n")[0]


def _description(command: Command) -> str:
    """The docstring between its first line and its first section."""
    rest = (inspect.getdoc(command) or "").partition("\n")[2]
    return rest.partition("\nArgs:")[0].partition("\nRaises:")[0].strip()
