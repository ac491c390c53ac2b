"""YAML files, read in one way: texts, lists and objects; whatever is wrong with a file is one sentence that names it.

Every value stays the text that is written there: YAML's own guess would read the revision ``2024_01_01`` as a number.
Refused is what makes a small file a large one or gives a line two meanings: a key twice, a reference to another part of
the file, a tag, deep nesting, a character that is not printable.
"""

from pathlib import Path

import yaml

from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import damaged, read_bytes
from bridge.exchange.printable import is_printable

_DEPTH = 16  # of nesting

YamlValue = str | list["YamlValue"] | dict[str, "YamlValue"]


def read_yaml(path: Path, remedy: str = "") -> YamlValue:
    """What a YAML file holds; an empty text if it holds nothing.

    Args:
        path: of the file.
        remedy: what to do about a damaged file, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        RequestError: it cannot be read, or is not such a file.
    """
    try:
        return parse_yaml(read_bytes(path))
    except ValueError as error:
        raise RequestError(damaged(path, error, remedy)) from None


def parse_yaml(text: bytes) -> YamlValue:
    """The value of a YAML text.

    Raises:
        ValueError: it is not UTF-8, not YAML, or has what is refused here; the message names the line.
    """
    decoded = text.decode("utf-8-sig")
    try:
        node = yaml.compose(decoded, Loader=_Loader)
        return "" if node is None else _value(node)
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise _error(problem, error.problem_mark or error.context_mark) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except OverflowError:
        raise ValueError('an escape such as "\\UFFFFFFFF" is of no character') from None


class _Loader(yaml.BaseLoader):
    """Composes nodes and nothing else; what they must not have is refused before they are there."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _error("expected no reference to another part of the file (& or *)", event.start_mark)
        if getattr(event, "tag", None):
            raise _error(f"expected no tag, not {event.tag[:80]}", event.start_mark)
        self._depth += 1
        if self._depth > _DEPTH:
            raise _error(f"expected at most {_DEPTH} levels", event.start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        return node


def _value(node: yaml.Node) -> YamlValue:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _object(node)
    text = str(node.value)
    if not is_printable(text):
        raise _error(f"expected printable characters, not {text[:80]!a}", node.start_mark)
    return text


def _object(node: yaml.MappingNode) -> dict[str, YamlValue]:
    content: dict[str, YamlValue] = {}
    for key_node, value_node in node.value:
        key = _value(key_node)
        if not isinstance(key, str):
            raise _error("expected a text as key", key_node.start_mark)
        if key in content:
            raise _error(f"it has the key {key[:80]!a} twice", key_node.start_mark)
        content[key] = _value(value_node)
    return content


def _error(problem: str, mark: yaml.Mark | None) -> ValueError:
    return ValueError(f"line {mark.line + 1}: {problem}" if mark else problem)
