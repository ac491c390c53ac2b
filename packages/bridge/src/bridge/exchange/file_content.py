"""Files read whole, and their content checked against declared types: whatever is wrong is one sentence."""

from pathlib import Path
from typing import TypeVar, cast

import msgspec

from bridge.exchange.errors import RequestError

Content = TypeVar("Content")


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file; a pipe or a device, which may never end, is not read.

    Raises:
        FileNotFoundError: there is no such file.
        RequestError: it cannot be read: a folder, a loop of links, no permission.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise RequestError(f"{path} cannot be read: it is no regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a path that no file system has
        raise RequestError(f"{path} cannot be read: {error}") from None


def checked(content: object, expected: type[Content], path: Path, remedy: str = "") -> Content:
    """``content`` itself, once it has the entries and types that ``expected`` names.

    Args:
        content: what a JSON or YAML file holds.
        expected: a type, such as one of the module ``manifest``; entries that it does not name are tolerated.
        path: the file, for the message.
        remedy: what to do about a damaged file, for the message.

    Raises:
        RequestError: an entry is missing or of another type; the message names the file, the entry and what was
            expected there.

    >>> checked({"status": 1}, dict[str, str], Path("run/manifest.json"))
    Traceback (most recent call last):
    bridge.exchange.errors.RequestError: run/manifest.json is damaged: Expected `str`, got `int` - at `$[...]`
    """
    try:
        msgspec.convert(content, expected)
    except msgspec.ValidationError as error:
        raise RequestError(damaged(path, error, remedy)) from None
    return cast(Content, content)


def damaged(path: Path, error: Exception, remedy: str = "") -> str:
    """The message for a file whose content is not what it should be."""
    return f"{path} is damaged: {error}" + (f"; {remedy}" if remedy else "")
