"""JSON files, read in one way: whatever is wrong with a file is one sentence that names it.

The decoder of the standard library accepts what no file of these packages holds: a key twice (the last one wins), and
integers of any length. Here both are refused, as are files that are no text, directories, and loops of links.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import damaged, read_bytes

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
        value: object = parse_json(read_bytes(path))
        json.dumps(value, ensure_ascii=False).encode()  # raises where text cannot be written again
        return value
    except UnicodeEncodeError:
        raise RequestError(damaged(path, ValueError("it has half of a surrogate pair"), remedy)) from None
    except ValueError as error:
        raise RequestError(damaged(path, error, remedy)) from None


def int64(digits: str) -> int:
    """An integer that fits into 64 bits.

    Raises:
        ValueError: it does not.
    """
    if len(digits) > 20 or not -_INT64 <= int(digits) < _INT64:
        raise ValueError(f"expected an integer of 64 bits, not {digits[:30]}")
    return int(digits)


def parse_json(
    text: bytes | str, *, integer: Callable[[str], object] = int64, fraction: Callable[[str], object] = float
) -> Any:  # noqa: ANN401 - any JSON value
    """The value of a JSON text.

    Args:
        text: UTF-8 if bytes.
        integer: what becomes of the digits of an integer.
        fraction: what becomes of the digits of any other number.

    Raises:
        ValueError: it is not UTF-8 or not JSON, is nested too deeply, or has a key twice; or ``integer`` raises it.
    """
    decoded = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        return json.loads(decoded, object_pairs_hook=_object, parse_int=integer, parse_float=fraction)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content: dict[str, object] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"it has the key {key[:80]!a} twice")
        content[key] = value
    return content
