"""Why a model cannot be loaded, in one line: the innermost reason, and the file or the field that it comes from."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from bridge.exchange.errors import RequestError, innermost
from bridge.exchange.file_content import read_bytes
from bridge.exchange.json_file import parse_json

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_READ_BY_TRANSFORMERS = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def refuse_damaged(files: Iterable[str | Path]) -> None:
    """Stop at a weight file that holds no weights.

    Raises:
        RequestError: a file is empty, or a git-lfs pointer.
    """
    for file in files:
        damage = _damage(Path(file))
        if damage:
            raise RequestError(f"{file} {damage}")


def reason_of(error: BaseException, source: str) -> str:
    """Which files are damaged, what an exception says, and what is at the bottom of it.

    Args:
        error: raised by transformers while it loads a model.
        source: the folder or hub id of the model.
    """
    deepest = innermost(error)
    errors = [error] if " ".join(str(deepest).split()) in " ".join(str(error).split()) else [error, deepest]
    damages = [f"{file.name} {damage}" for file in _small_files(source) if (damage := _damage(file))]
    return "; ".join([*damages, *(_text(each, source)[:300] for each in errors)])


def _text(error: BaseException, source: str) -> str:
    """The message in one line; for a key that transformers does not know, where the configuration has it as a value."""
    if isinstance(error, KeyError) and error.args:
        key = error.args[0]
        fields = [f"{field} in {file.name}" for file in _small_files(source) for field in _fields_with(file, key)]
        if fields:
            return f"unknown value {key!r} of {' and '.join(fields)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _fields_with(file: Path, value: object) -> list[str]:
    """The fields of a configuration that have this value, such as ``rope_parameters.rope_type``."""
    if not file.name.endswith("config.json"):
        return []
    try:
        content = _parsed(file)
    except (OSError, RequestError, ValueError):
        return []
    return [".".join(path) for path, leaf in _leaves(content) if leaf == value and type(leaf) is type(value)]


def _leaves(content: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(content, dict | list):
        for key, inner in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield path, content


def _small_files(source: str) -> list[Path]:
    """The files beside the weights in a local folder; none of a model of the hub, whose files come whole."""
    folder = Path(source)
    return sorted(file for pattern in _READ_BY_TRANSFORMERS for file in folder.glob(pattern)) if folder.is_dir() else []


def _damage(file: Path) -> str | None:
    """What is wrong with a file at first sight."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not start:
        return "is empty"
    if start == LFS_POINTER:
        return "is a git-lfs pointer, not the file itself: fetch it with git lfs pull"
    if file.suffix == ".json":
        try:
            _parsed(file)
        except ValueError as error:
            return f"is no valid JSON: {error}"
    return None


def _parsed(file: Path) -> object:
    """What a JSON file of a model holds; integers there are of any size, such as a ``model_max_length`` of 10^30."""
    return parse_json(read_bytes(file), integer=int)
