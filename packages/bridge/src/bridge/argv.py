"""Check a command line against a function's annotations before python-fire sees it.

Fire guesses types, gives the second word of ``--metric a b`` to another parameter and reports an
unknown flag only after the command has run. Here every flag is read by its annotation first; fire then
receives nothing but ``--name=<literal>`` and keeps what it is good at: help pages and the call.

Understood annotations: ``str``, ``int``, ``float``, ``bool``, ``Literal[...]``, ``list[T]`` of the
former, and each of these ``| None``.
"""

import difflib
import inspect
import math
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import fire
import yaml
from fire import helptext, trace

from bridge.errors import RequestError, RunError
from bridge.printable import escaped_logs, say

Command = Callable[..., None]
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_RENAMED = {"from": "from_"}  # a keyword of the language cannot name a parameter
_HELP = {"-h", "--help"}
_NEGATIVE_NUMBER = re.compile(r"-\.?\d|-inf$")


def run(command: Command | dict[str, Command], name: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run ``command`` (or the one that the first word names) on ``argv`` and exit as a shell expects.

    Exit code 0 when it returned, 2 for a wrong request, 1 for a failed run, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = name or Path(sys.argv[0]).name
    try:
        if isinstance(command, dict):
            if not words or words[0] in _HELP:
                _show_help(command, name)
                return
            word = words.pop(0)
            command, name = _choose(command, word), f"{name} {word}"
        if _HELP.intersection(words):
            _show_help(command, name)
            return
        values = parse(command, words)
        with escaped_logs():
            fire.Fire(command, command=[f"--{key}={value!r}" for key, value in values.items()], name=name)
    except RequestError as error:
        raise SystemExit(_complain(name, error, 2)) from None
    except RunError as error:
        raise SystemExit(_complain(name, error, 1)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output, such as head, has gone; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _show_help(command: Command | dict[str, Command], name: str) -> None:
    """Fire's help page on stdout, with the flags spelt as they are read here and without one-letter forms."""
    page = helptext.HelpText(command, trace=trace.FireTrace(command, name=name)).replace(shlex.quote(name), name)
    flag = re.compile(r"^(\W*)(?:-\w, )?--(\w+)=(\w+)", re.MULTILINE)
    say(*flag.sub(lambda found: f"{found[1]}{_flag(found[2])}={found[3].rstrip('_')}", page).split("\n"))


def _complain(name: str, error: Exception, code: int) -> int:
    say(f"{name}: error: {' '.join(str(error).split())}", stream=sys.stderr)
    return code


def _choose(commands: dict[str, Command], word: str) -> Command:
    if word not in commands:
        raise RequestError(f"no command '{word}'{did_you_mean(word, commands)}; there are: {', '.join(commands)}")
    return commands[word]


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def parse(command: Command, words: Sequence[str]) -> dict[str, object]:
    """The keyword arguments that ``words`` give to ``command``, each of its annotated type.

    ``--config FILE`` reads further flags from a flat YAML file; those on the command line win.

    Raises:
        RequestError: an unknown or repeated flag, a stray word, a missing value, a wrong type, a
            required flag left out.
    """
    parameters = inspect.signature(command, eval_str=True).parameters
    given = _gather(parameters, words)
    if "config" in given:
        given = _gather_config(parameters, str(_convert("config", given.pop("config"), str))) | given
    values = {key: _convert(key, tokens, parameters[key].annotation) for key, tokens in given.items()}
    missing = [k for k, p in parameters.items() if p.default is inspect.Parameter.empty and k not in values]
    if missing:
        raise RequestError(f"missing {', '.join(_flag(key) for key in missing)}; --help lists the flags")
    return values


def _flag(key: str) -> str:
    return "--" + key.rstrip("_").replace("_", "-")


def _gather_config(parameters: typing.Mapping[str, inspect.Parameter], file: str) -> dict[str, list[str]]:
    try:
        given = _gather(parameters, _config_words(Path(file)))
    except RequestError as error:
        raise RequestError(f"--config {file}: {error}") from None
    if "config" in given:
        raise RequestError(f"--config {file}: a file of flags cannot name another")
    return given


def _config_words(path: Path) -> list[str]:
    """The file's lines as flags. Every value stays the text that is written there; ``null`` leaves a flag out."""
    if not path.is_file():
        raise RequestError("no such file")
    try:
        # BaseLoader guesses no types: SafeLoader would read the revision 2024_01_01 as a number
        table = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"cannot be read as YAML: {error}") from None
    if not isinstance(table, dict):
        raise RequestError("expected lines of the form 'flag: value'")
    words = []
    for key, value in table.items():
        values = (value if isinstance(value, list) else [value]) or [""]
        if not isinstance(key, str) or not all(isinstance(v, str) for v in values):
            raise RequestError(f"expected one value or a flat list for '{key}'")
        words += [f"--{key}={v}" for v in values if v not in {"null", "~"}]
    return words


def _gather(parameters: typing.Mapping[str, inspect.Parameter], words: Sequence[str]) -> dict[str, list[str]]:
    """Flag by flag, the words that belong to it."""
    given: dict[str, list[str]] = {}
    key = None
    for word in words:
        if word.startswith("-") and word != "-" and not _NEGATIVE_NUMBER.match(word):
            key, value = _read_flag(parameters, word)
            if key in given and not _is_list(parameters, key):
                raise RequestError(f"{_flag(key)} is given twice")
            given.setdefault(key, []).extend(value)
        elif key is None:
            raise RequestError(f"stray word '{word}': every argument is a flag, like --model gpt2")
        elif given[key] and not _is_list(parameters, key):
            raise RequestError(f"stray word '{word}' after {_flag(key)} {given[key][0]}, which takes one value")
        else:
            given[key].append(word)
    return given


def _is_list(parameters: typing.Mapping[str, inspect.Parameter], key: str) -> bool:
    return key in parameters and typing.get_origin(_without_none(parameters[key].annotation)) is list


def _read_flag(parameters: typing.Mapping[str, inspect.Parameter], word: str) -> tuple[str, list[str]]:
    """The parameter that ``word`` names, and the value that it carries (``--k=3``, ``--no-save-plots``)."""
    body, equals, value = word.lstrip("-").partition("=")
    key = body.replace("-", "_")
    key = _RENAMED.get(key, key)
    if word.startswith("--") and (key in parameters or key == "config"):
        return key, [value] if equals else []
    positive = key.removeprefix("no_")
    is_switch = positive in parameters and _without_none(parameters[positive].annotation) is bool
    if word.startswith("--") and is_switch and not equals:
        return positive, ["false"]
    known = [*(_flag(k) for k in parameters), "--config", "--help"]
    raise RequestError(f"unknown flag '{word.partition('=')[0]}'{did_you_mean(word.partition('=')[0], known)}")


def _without_none(annotation: object) -> object:
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def _convert(key: str, tokens: list[str], annotation: object) -> object:
    kind = _without_none(annotation)
    if typing.get_origin(kind) is list:
        tokens = [part for token in tokens for part in token.split(",") if part]
        if not tokens:
            raise RequestError(f"{_flag(key)} needs at least one value")
        return [_scalar(key, token, typing.get_args(kind)[0]) for token in tokens]
    if not tokens and kind is bool:
        return True
    if not tokens or tokens[0] == "":
        raise RequestError(f"{_flag(key)} needs a value")
    return _scalar(key, tokens[0], kind)


def _scalar(key: str, token: str, kind: object) -> object:
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        if token not in choices:
            hint = did_you_mean(token, choices)
            raise RequestError(f"{_flag(key)} '{token}' is unknown{hint}; choose from: {', '.join(choices)}")
        return token
    if kind is bool:
        if token.lower() not in _TRUTH:
            raise RequestError(f"{_flag(key)} takes no value or true/false, not '{token}'")
        return _TRUTH[token.lower()]
    if kind is int:
        if not re.fullmatch(r"[+-]?\d{1,18}", token):
            raise RequestError(f"{_flag(key)} takes a whole number, not '{token}'")
        return int(token)
    if kind is float:
        try:
            number = float(token)
        except ValueError:
            raise RequestError(f"{_flag(key)} takes a number, not '{token}'") from None
        if not math.isfinite(number):
            raise RequestError(f"{_flag(key)} takes a finite number, not '{token}'")
        return number
    return token
