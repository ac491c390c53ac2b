"""JSON files, read in one way: whatever is wrong with a file is one sentence that names it.

The decoder of the standard library accepts what no file of these packages holds: a key twice (the last one wins), and
integers of any length. Here both are refused, as are files that are no text, directories, and loops of links.
"""

import json
from pathlib import Path

from bridge.exchange.errors import RequestError

_INT64 = 2**63


def read_json(path: Path, remedy: str = "") -> object:
    """What a JSON file holds.

    Args:
        path: of the file.
        remedy: what to do about a damaged file, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        RequestError: it cannot be read, or is not JSON.
    """
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RequestError(f"{path} is damaged: {error}{_then(remedy)}") from None


def parse_json(text: bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: it is not UTF-8 or not JSON, is nested too deeply, or has a key twice or an integer beyond 64 bits.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content: dict[str, object] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"it has the key {key[:80]!a} twice")
        content[key] = value
    return content


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -_INT64 <= int(digits) < _INT64:
        raise ValueError(f"expected an integer of 64 bits, not {digits[:30]}")
    return int(digits)


def _then(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""
