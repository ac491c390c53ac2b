"""Draw mutants: ``draw.py PACKAGE FILE [N] [SEED]`` writes N places of the package's modules, each changed in one way.

A mutant is a JSON line of FILE: ``module``, ``line``, the text of that line ``before`` and ``after``, and the whole
``source``. The modules are those of ``mutants.toml``. The changes are cosmic-ray's (arithmetic, comparisons, numbers,
conditions, loops), and those of ``own_changes``. The same sources, N and seed give the same mutants; a larger N gives
more of them.
"""

import ast
import json
import random
import sys
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).with_name("mutants.toml")
INTERCHANGEABLE = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitAnd", "BitOr", "BitXor"},
    {"Is", "IsNot"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
]
# These change types or names, which any test that reaches the line notices.
LEFT_ASIDE = {"ExceptionReplacer", "RemoveDecorator", "VariableInserter", "VariableReplacer"}
LEFT_OUT = {"abs", "absolute", "cumsum", "exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "square"}
OPPOSITES = [("min", "max"), ("minimum", "maximum"), ("floor", "ceil"), ("any", "all"), ("sum", "mean")]
OPPOSITES += [("head", "tail"), ("argmin", "argmax"), ("idxmin", "idxmax"), ("amin", "amax")]
OPPOSITE = dict(OPPOSITES) | {second: first for first, second in OPPOSITES}

Position = tuple[int, int]  # line, counted from 1, and column
Change = tuple[Position, Callable[[], str | None]]  # where, and what makes the source with that change


def cosmic_ray_changes(source: str) -> Iterator[Change]:
    """What cosmic-ray changes, each operator for another of its kind only."""
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(operator_names()):
        if not _is_wanted(name.removeprefix("core/")):
            continue
        operator = get_operator(name)()
        positions = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, start in enumerate(positions):
            yield start, partial(mutate_code, source, operator, occurrence)


def _is_wanted(operator: str) -> bool:
    kind, _, words = operator.partition("_")
    if kind == "ReplaceUnaryOperator":
        return words.startswith("Delete")
    return kind not in LEFT_ASIDE and (not words or any(set(words.split("_")) <= kinds for kinds in INTERCHANGEABLE))


def own_changes(source: str) -> Iterator[Change]:
    """exp(x) to x, min to max, a number halved, two neighbours of the same form exchanged (a, b to b, a)."""
    code = source.encode()
    starts = [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.AST) -> str:
        return code[slice(*span(node))].decode()

    def replaced(*changes: tuple[ast.AST, str]) -> str:
        result = code
        for node, new in sorted(changes, key=lambda change: span(change[0]), reverse=True):
            start, end = span(node)
            result = result[:start] + new.encode() + result[end:]
        return result.decode()

    def changes(node: ast.AST) -> Iterator[list[tuple[ast.AST, str]]]:
        if isinstance(node, ast.Constant) and type(node.value) is float:
            yield [(node, repr(node.value / 2))]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if name in OPPOSITE:
                yield [(node.func, text(node.func).removesuffix(name) + OPPOSITE[name])]
            if name in LEFT_OUT and len(node.args) == 1:
                yield [(node, f"({text(node.args[0])})")]
            if name in LEFT_OUT and not node.args and isinstance(node.func, ast.Attribute):
                yield [(node, text(node.func.value))]
            for first, second in pairwise(node.args):
                if type(first) is type(second) and name not in {"min", "max", "minimum", "maximum"}:
                    yield [(first, text(second)), (second, text(first))]
        if isinstance(node, ast.Tuple | ast.List) and isinstance(node.ctx, ast.Load):
            for first, second in pairwise(node.elts):
                if type(first) is type(second):
                    yield [(first, text(second)), (second, text(first))]

    for node in ast.walk(ast.parse(source)):
        for change in changes(node):
            yield (node.lineno, node.col_offset), partial(replaced, *change)


def without_effect(source: str) -> list[tuple[Position, Position]]:
    """Where a change alters no number: annotations and types, decorators, errors, assertions, ``strict=`` of zip."""
    parts: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(source)):
        parts += [
            getattr(node, "annotation", None),
            getattr(node, "returns", None),
            *getattr(node, "decorator_list", []),
        ]
        if isinstance(node, ast.Raise | ast.Assert) or (isinstance(node, ast.keyword) and node.arg == "strict"):
            parts.append(node)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
            parts.append(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cast":
            parts.append(node.args[0])
    return [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p is not None]


def places(source: str) -> dict[Position, list[Callable[[], str | None]]]:
    """Every place of a source that can be changed, and its changes."""
    skipped = without_effect(source)
    result = defaultdict(list)
    for position, change in [*cosmic_ray_changes(source), *own_changes(source)]:
        if not any(start <= position < end for start, end in skipped):
            result[position].append(change)
    return result


def mutant(module: str, source: str, changed: str | None) -> dict[str, str | int] | None:
    """The mutant as a row; None where the change is none, or is no Python."""
    try:
        if changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except (SyntaxError, ValueError):
        return None
    old, new = source.splitlines(), changed.splitlines()
    i = next(i for i, lines in enumerate(zip(old, new, strict=False)) if lines[0] != lines[1])
    return {"module": module, "line": i + 1, "before": old[i].strip(), "after": new[i].strip(), "source": changed}


def main(package: str, file: Path, n: int = 60, seed: int = 0) -> None:
    """Draw the mutants and write them."""
    folder = ROOT / "packages" / package / "src" / package
    sources = {module: (folder / f"{module}.py").read_text() for module in tomllib.loads(SETTINGS.read_text())[package]}
    drawn = [(module, changes) for module, source in sources.items() for changes in places(source).values()]
    generator = random.Random(seed)
    generator.shuffle(drawn)
    mutants = (mutant(module, sources[module], generator.choice(changes)()) for module, changes in drawn)
    chosen = islice((row for row in mutants if row is not None), n)
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
