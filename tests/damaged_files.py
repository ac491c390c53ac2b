"""Generic damage to a file: to its bytes, to its place in the folder, and to what its format holds.

``damages(path)`` draws a ``Damage``; applied, it replaces the file. Nothing here knows what a file is for.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finished_runs import plant
from hypothesis import strategies as st

Field = tuple[str | int, ...]
_MARK = "what stands here is replaced"
VALUES = [  # instead of a value of JSON or YAML, as text
    *("null", "true", "0", "-1", "1.5", '""', '"x"', "[]", "{}", "[[0]]", '[""]', '{"a": null}', '{"": 0}'),
    *("9" * 40, "-9223372036854775809", "9223372036854775807", "1e999", "NaN", "-Infinity", "1" * 5000),
    *('"\\u0000"', '"\\u001b[2J"', '"\\u202e"', '"\\ud800"', '"a\\nb"', '"../../x"', '"/"', '"' + "é" * 5000 + '"'),
    *("[" * 2000 + "]" * 2000, '{"a":' * 2000 + "0" + "}" * 2000, "[" * 100_000, "&a [*a]", "!!python/name:os.system"),
]
CELLS = [
    *("", "0", "-1", "1.5", "x", "nan", "inf", "-inf", "1e999", "9" * 40, "9223372036854775807", "1e18", "5e-324"),
    *('"a,b"', '"a\nb"', '"', "\0", "\x1b[2J", "\u202e", "é" * 5000, "1_0", "٣", "NA", "True", " ", "0x1", "ALL"),
]
PLACES = ["missing", "directory", "loop", "dangling", "text pickle", "torch pickle"]


@dataclass(frozen=True)
class Damage:
    """One damage.

    Attributes:
        how: what is done; a name of ``_CHANGES`` or of ``PLACES``.
        where: in the file, a share of its length; of its fields or rows, a share of their number; or a field's path.
        what: that is put there.
    """

    how: str
    where: float | Field = 0.0
    what: str | bytes = ""

    def apply(self, path: Path, marker: Path) -> None:
        """Replace the file.

        Args:
            path: of the file.
            marker: what a planted pickle would make.
        """
        content = path.read_bytes()
        if self.how not in PLACES:
            path.write_bytes(_changed(path, content, self))
            return
        path.unlink()
        if self.how == "directory":
            path.mkdir()
        elif self.how in {"loop", "dangling"}:
            path.symlink_to(path.name if self.how == "loop" else f"{path.name}.none")
        elif self.how.endswith("pickle"):
            plant(path, marker, self.how.split()[0])


def damages(path: Path) -> st.SearchStrategy[Damage]:
    """Damage to a file of this name."""
    share = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
    noise = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 64, b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b'"'])
    every = [
        st.builds(Damage, st.sampled_from(PLACES)),
        st.just(Damage("empty")),
        st.builds(Damage, st.just("cut"), share),
        st.builds(Damage, st.sampled_from(["insert", "overwrite", "append"]), share, noise),
        st.builds(Damage, st.sampled_from(["remove bytes", "repeat bytes"]), share),
    ]
    suffix = path.suffixes[0] if path.suffix == ".gz" else path.suffix
    if suffix in {".json", ".jsonl", ".safetensors"}:
        every += [st.builds(Damage, st.sampled_from(["field", "new field"]), share, st.sampled_from(VALUES))] * 4
        every += [st.builds(Damage, st.sampled_from(["remove field", "field twice"]), share)] * 2
    if suffix in {".yaml"}:
        every += [st.builds(Damage, st.sampled_from(["line value", "line key"]), share, st.sampled_from(VALUES))] * 4
        every += [st.builds(Damage, st.sampled_from(["remove line", "line twice"]), share)]
    if suffix in {".csv", ".tsv"}:
        every += [st.builds(Damage, st.just("cell"), share, st.sampled_from(CELLS))] * 4
        every += [st.builds(Damage, st.sampled_from(["column", "rename column"]), share, st.sampled_from(CELLS))] * 2
        table = ["remove column", "column twice", "remove row", "row twice", "no rows", "remove cell", "shuffle rows"]
        every += [st.builds(Damage, st.sampled_from(table), share)] * 2
    return st.one_of(every)


def _changed(path: Path, content: bytes, damage: Damage) -> bytes:
    """The content of a file with the damage done to what its format holds."""
    if damage.how in _BYTES:
        return _BYTES[damage.how](content, int(damage.where * len(content)), damage.what)
    if path.suffix == ".gz":
        return gzip.compress(_changed(path.with_suffix(""), gzip.decompress(content), damage))
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = _json(content[8 : 8 + length], damage)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    if path.suffix == ".jsonl":
        lines = content.splitlines()
        at = _at(lines, damage.where)
        lines[at] = _line(lines[at], damage)
        return b"\n".join(lines) + b"\n"
    if path.suffix == ".json":
        return _json(content, damage)
    if path.suffix == ".yaml":
        return _yaml(content, damage)
    return _table(content, damage, "\t" if path.suffix == ".tsv" else ",")


_BYTES: dict[str, Callable[[bytes, int, Any], bytes]] = {
    "empty": lambda content, at, what: b"",
    "cut": lambda content, at, what: content[:at],
    "insert": lambda content, at, what: content[:at] + what + content[at:],
    "overwrite": lambda content, at, what: content[:at] + what + content[at + len(what) :],
    "append": lambda content, at, what: content + what,
    "remove bytes": lambda content, at, what: content[:at] + content[at + 7 :],
    "repeat bytes": lambda content, at, what: content[: at + 20] + content[at:],
}


def _at(items: list[Any], where: float) -> int:
    return min(int(where * len(items)), len(items) - 1)


def _line(line: bytes, damage: Damage) -> bytes:
    """A line of JSON; after a checksum or not, which is made right again."""
    checksum, _, text = line.partition(b" {")
    if not re.fullmatch(rb"\w{8}", checksum):
        return _json(line, damage)
    changed = _json(b"{" + text, damage)
    return b"%08x %s" % (zlib.crc32(changed), changed)


def _json(content: bytes, damage: Damage) -> bytes:
    """Damage to a field, at any depth: its value becomes a mark, and in the text the mark becomes the damage."""
    tree = {"root": json.loads(content)}
    fields = list(_fields(tree["root"], ("root",)))
    field = ("root", *damage.where) if isinstance(damage.where, tuple) else fields[_at(fields, damage.where)]
    parent: Any = tree
    for key in field[:-1]:
        parent = parent[key]
    key, value = field[-1], parent[field[-1]]
    written = str(damage.what)
    if damage.how == "remove field":
        del parent[key]
    elif damage.how == "new field" and isinstance(value, dict):
        value["new field"] = _MARK
    else:
        parent[key] = _MARK
    if damage.how == "field twice":
        written = json.dumps(value)
        if isinstance(key, str):
            written += f", {json.dumps(key)}: {written}"
    return json.dumps(tree.get("root")).replace(json.dumps(_MARK), written).encode("utf-8", "surrogatepass")


def _fields(value: object, path: Field) -> Iterator[Field]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _fields(child, (*path, key))


def _yaml(content: bytes, damage: Damage) -> bytes:
    lines = content.decode().splitlines()
    at = _at(lines, damage.where)
    key, _, value = lines[at].partition(":")
    lines[at : at + 1] = {
        "line value": [f"{key}: {damage.what}"],
        "line key": [f"{damage.what}: {value}"],
        "remove line": [],
        "line twice": [lines[at], lines[at]],
    }[damage.how]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _table(content: bytes, damage: Damage, delimiter: str) -> bytes:
    header, *rows = csv.reader(io.StringIO(content.decode(), newline=""), delimiter=delimiter)
    at = _at(rows, damage.where)
    column = int(damage.where * len(rows) * len(header)) % len(header)
    what = str(damage.what)
    if damage.how == "cell":
        rows[at][column] = what
    elif damage.how == "column":
        for row in rows:
            row[column] = what
    elif damage.how == "rename column":
        header[column] = what
    elif damage.how in {"remove column", "column twice"}:
        for row in [header, *rows]:
            row[column : column + 1] = [row[column]] * (2 if damage.how == "column twice" else 0)
    elif damage.how in {"remove row", "row twice"}:
        rows[at : at + 1] = [rows[at]] * (2 if damage.how == "row twice" else 0)
    elif damage.how == "no rows":
        rows = []
    elif damage.how == "remove cell":
        del rows[at][column]
    else:
        rows = rows[at:] + rows[:at]
    quoted = [[cell if cell[:1] == '"' else _quoted(cell, delimiter) for cell in row] for row in [header, *rows]]
    return "".join(f"{delimiter.join(row)}\n" for row in quoted).encode()


def _quoted(cell: str, delimiter: str) -> str:
    return f'"{cell}"' if delimiter in cell or "\n" in cell else cell
