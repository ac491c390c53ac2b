"""Read a command line by a command's declarations before python-fire sees it.

Fire guesses types, assigns the second word of ``--metric a b`` to another parameter and reports an unknown flag only
after the command has run. Here every flag is read by its declaration first (``flag_table``); fire then receives
nothing but ``--name=<literal>`` and calls the command.

Understood types: ``str``, ``int``, ``float``, ``bool``, ``Literal[...]``, ``list[T]`` of the former, and each of these
``| None``; in a ``list[FilePath]`` a comma is part of the path.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import fire

from bridge.exchange.command_line.exit_codes import one_line_errors
from bridge.exchange.command_line.flag_table import (
    EVERY_COMMAND,
    Command,
    FilePath,
    Flag,
    arguments_of,
    flags_of,
    spelled,
)
from bridge.exchange.command_line.help_page import page_of_command, page_of_commands
from bridge.exchange.command_line.verbosity import Verbosity
from bridge.exchange.errors import RequestError, did_you_mean
from bridge.exchange.file_content import read_bytes
from bridge.exchange.printable import escaped_logs, say
from bridge.exchange.yaml_file import parse_yaml

__all__ = ["Command", "FilePath", "parse", "run"]

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_RENAMED = {"from": "from_"}  # a keyword of the language cannot name a parameter
_HELP = {"-h", "--help"}
_DISTRIBUTION = "critical-weights-bridge"  # all packages have one version
_NEGATIVE_NUMBER = re.compile(r"-\.?\d|-inf$")


def run(command: Command | Mapping[str, Command], name: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run ``command`` (or the one that the first word names) on ``argv`` and exit as a shell expects.

    Exit code 0 when it returned; see ``exit_codes`` for the others.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = name or Path(sys.argv[0]).name
    with one_line_errors(name):
        if "--version" in words:
            say(f"{name} {metadata.version(_DISTRIBUTION)}")
            return
        if isinstance(command, Mapping):
            if not words or words[0] in _HELP:
                say(*page_of_commands(command, name).split("\n"))
                return
            word = words.pop(0)
            command, name = _choose(command, word), f"{name} {word}"
        with one_line_errors(name):
            _run(command, name, words)


def _run(command: Command, name: str, words: Sequence[str]) -> None:
    if _HELP.intersection(words):
        say(*page_of_command(command, name).split("\n"))
        return
    values = parse(command, words)
    Verbosity(**{key: bool(values.pop(key)) for key in EVERY_COMMAND if key in values}).apply()
    with escaped_logs():
        fire.Fire(_flat(command), command=[f"--{key}={value!r}" for key, value in values.items()], name=name)


def _flat(command: Command) -> Callable[..., None]:
    """The command as a function whose keyword parameters are its flags, which is what fire can call."""

    def call(**values: object) -> None:
        command(**arguments_of(command, values))

    parameters = [
        inspect.Parameter(
            key, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if flag.required else None
        )
        for key, flag in flags_of(command).items()
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _choose(commands: Mapping[str, Command], word: str) -> Command:
    if word not in commands:
        raise RequestError(f"no command '{word}'{did_you_mean(word, commands)}; there are: {', '.join(commands)}")
    return commands[word]


def parse(command: Command, words: Sequence[str]) -> dict[str, object]:
    """The values that ``words`` give to the flags of ``command``, by key, each of its declared type.

    ``--config FILE`` reads further flags from a flat YAML file; those on the command line win.

    Raises:
        RequestError: an unknown or repeated flag, a stray word, a missing value, a wrong type, a
            required flag left out.
    """
    table = flags_of(command) | EVERY_COMMAND
    config = Flag(key="config", annotation=str | None, default=None, help="", group="")
    tokens = _gather(table, words)
    if "config" in tokens:
        tokens = _gather_config(table, str(_convert(config, tokens.pop("config")))) | tokens
    values = {key: _convert(table[key], texts) for key, texts in tokens.items()}
    missing = [flag.name for key, flag in table.items() if flag.required and key not in values]
    if missing:
        raise RequestError(f"missing {', '.join(missing)}; --help lists the flags")
    return values


def _gather_config(table: Mapping[str, Flag], file: str) -> dict[str, list[str]]:
    try:
        tokens = _gather(table, _config_words(Path(file)))
    except RequestError as error:
        raise RequestError(f"--config {file}: {error}") from None
    if "config" in tokens:
        raise RequestError(f"--config {file}: a file of flags cannot name another")
    return tokens


def _config_words(path: Path) -> list[str]:
    """The file's lines as flags. Every value stays the text that is written there; ``null`` leaves a flag out."""
    try:
        table = parse_yaml(read_bytes(path)) or {}
    except FileNotFoundError:
        raise RequestError("no such file") from None
    except ValueError as error:
        raise RequestError(f"cannot be read as flags: {error}") from None
    if not isinstance(table, dict):
        raise RequestError("expected lines of the form 'flag: value'")
    words = []
    for key, value in table.items():
        values = (value if isinstance(value, list) else [value]) or [""]
        if not all(isinstance(v, str) for v in values):
            raise RequestError(f"expected one value or a flat list for '{key}'")
        words += [f"--{key}={v}" for v in values if v not in {"null", "~"}]
    return words


def _gather(table: Mapping[str, Flag], words: Sequence[str]) -> dict[str, list[str]]:
    """Flag by flag, the words that belong to it."""
    tokens: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("-") and word != "-" and not _NEGATIVE_NUMBER.match(word):
            key, value = _read_flag(table, word)
            if key in tokens and not _is_list(table, key):
                raise RequestError(f"{spelled(key)} is given twice")
            tokens.setdefault(key, []).extend(value)
        elif key is None:
            raise RequestError(f"stray word '{word}': every argument is a flag, like --model gpt2")
        elif tokens[key] and not _is_list(table, key):
            raise RequestError(f"stray word '{word}' after {spelled(key)} {tokens[key][0]}, which takes one value")
        else:
            tokens[key].append(word)
    return tokens


def _is_list(table: Mapping[str, Flag], key: str) -> bool:
    return key in table and table[key].is_list


def _read_flag(table: Mapping[str, Flag], word: str) -> tuple[str, list[str]]:
    """The flag that ``word`` names, and the value that it carries (``--k=3``, ``--no-save-plots``)."""
    body, equals, value = word.lstrip("-").partition("=")
    key = body.replace("-", "_")
    key = _RENAMED.get(key, key)
    if word.startswith("--") and (key in table or key == "config"):
        return key, [value] if equals else []
    positive = key.removeprefix("no_")
    is_switch = positive in table and table[positive].kind is bool
    if word.startswith("--") and is_switch and not equals:
        return positive, ["false"]
    known = [*(flag.name for flag in table.values()), "--config", "--help", "--version"]
    raise RequestError(f"unknown flag '{word.partition('=')[0]}'{did_you_mean(word.partition('=')[0], known)}")


def _convert(flag: Flag, texts: list[str]) -> object:
    if flag.is_list:
        if flag.item is not FilePath:
            texts = [part for text in texts for part in text.split(",")]
        texts = [text for text in texts if text]
        if not texts:
            raise RequestError(f"{flag.name} needs at least one value")
        return [_scalar(flag, text) for text in texts]
    if not texts and flag.kind is bool:
        return True
    if not texts or texts[0] == "":
        raise RequestError(f"{flag.name} needs a value")
    return _scalar(flag, texts[0])


def _scalar(flag: Flag, text: str) -> object:
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise RequestError(f"{flag.name} takes text in UTF-8, not '{text}'")
    if flag.choices:
        if text not in flag.choices:
            hint = did_you_mean(text, flag.choices)
            raise RequestError(f"{flag.name} '{text}' is unknown{hint}; choose from: {', '.join(flag.choices)}")
        return text
    if flag.item is bool:
        if text.lower() not in _TRUTH:
            raise RequestError(f"{flag.name} takes no value or true/false, not '{text}'")
        return _TRUTH[text.lower()]
    if flag.item is int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text):
            raise RequestError(f"{flag.name} takes a whole number, not '{text}'")
        return int(text)
    if flag.item is float:
        return _number(flag, text)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _number(flag: Flag, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise RequestError(f"{flag.name} takes a number, not '{text}'") from None
    if not math.isfinite(number):
        raise RequestError(f"{flag.name} takes a finite number, not '{text}'")
    return number
