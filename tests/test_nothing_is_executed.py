"""No source file has a way to execute what it reads: no pickle in any guise, no eval, no shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICKLES = {"pickle", "_pickle", "pickletools", "cloudpickle", "dill", "jsonpickle", "joblib", "shelve", "marshal"}
BANNED = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("torch.load", "torch.serialization.load", "torch.jit.load", "torch.hub.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
}
SAFE_LOADERS = {f"yaml.{name}" for name in ("SafeLoader", "CSafeLoader", "BaseLoader", "CBaseLoader")}


def sources() -> list[Path]:
    """Every Python file of the repository, tests included."""
    found = [path for place in ("packages", "tests", "benchmarks") for path in (ROOT / place).rglob("*.py")]
    return [path for path in [*found, ROOT / "noxfile.py"] if not {".venv", "build"} & set(path.parts)]


class Reader(ast.NodeVisitor):
    """Collects in ``complaints`` what a module does that may execute what is read."""

    def __init__(self, source: str) -> None:
        self.complaints: list[str] = []
        self._names: dict[str, str] = {}  # ``np`` to ``numpy``, ``load`` to ``torch.load``
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._read_import(node)
        self.visit(tree)

    def _read_import(self, node: ast.Import | ast.ImportFrom) -> None:
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names:
            full = prefix + alias.name
            if full.split(".")[0] in PICKLES:
                self.complaints.append(f"import of {full}")
            if prefix or alias.asname:
                self._names[alias.asname or alias.name] = full

    def _full(self, node: ast.AST | None) -> str:
        """The dotted name that an expression stands for; empty for anything else."""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self._full(node.value)}.{node.attr}"
        return ""

    def visit_Name(self, node: ast.Name) -> None:
        self._check(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._check(node)
        self.generic_visit(node)

    def _check(self, node: ast.AST) -> None:
        if self._full(node) in BANNED:
            self.complaints.append(self._full(node))

    def visit_Call(self, node: ast.Call) -> None:
        name, said = self._full(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        constants = {key: getattr(value, "value", "unknown") for key, value in said.items()}
        loader = self._full(said.get("Loader") or (node.args[1] if len(node.args) > 1 else None))
        checked = name.startswith("torch.") and constants.get("weights_only") is True
        checked |= name in {"yaml.load", "yaml.load_all"} and loader in SAFE_LOADERS
        if not checked:
            self.visit(node.func)
        for key in ("shell", "allow_pickle"):
            if constants.get(key, False) is not False:
                self.complaints.append(f"{name} with {key}")
        if name.endswith(".eval") and (node.args or node.keywords):  # of a table; that of a model takes nothing
            self.complaints.append(name)
        for argument in [*node.args, *said.values()]:
            self.visit(argument)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_execute_what_it_reads(path):
    assert Reader(path.read_text(encoding="utf-8")).complaints == []


def test_all_sources_are_looked_at():
    names = {str(path.relative_to(ROOT)) for path in sources()}
    assert len(names) > 150
    assert {"noxfile.py", "packages/critical_weight_analysis/phase1_runner.py"} < names


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=trusted)",
        "import torch as t; list(map(t.load, paths))",
        "from torch import load as read; read(path)",
        "from torch.serialization import load; load(path)",
        "import torch; torch.hub.load(name)",
        "import pickle",
        "def f():\n    from pickle import loads",
        "import marshal, os",
        "import dill as p",
        "from joblib import load",
        "import shelve",
        "import pandas as pd; pd.read_pickle(path)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import numpy as np; np.load(path, allow_pickle=flag)",
        "import yaml; yaml.load(text)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import yaml; yaml.load(text, yaml.FullLoader)",
        "from yaml import load, UnsafeLoader; load(text, UnsafeLoader)",
        "import yaml; yaml.full_load(text)",
        "eval(text)",
        "list(map(eval, texts))",
        "exec(text)",
        "import builtins; frame.eval(text)",
        "__import__(name)",
        "import os; os.system(line)",
        "import subprocess; subprocess.run(line, shell=True)",
        "from subprocess import getoutput; getoutput(line)",
    ],
)
def test_the_reader_complains_of(source):
    assert Reader(source).complaints


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path, weights_only=True)",
        "import yaml; yaml.load(text, Loader=yaml.BaseLoader)",
        "from yaml import load, SafeLoader; load(text, SafeLoader)",
        "import yaml; yaml.safe_load(text)",
        "import numpy as np; np.load(path); np.load(path, allow_pickle=False)",
        "model.eval()",
        "import re; re.compile(text)",
        "import ast; ast.literal_eval(text)",
        "import subprocess; subprocess.run(words)",
    ],
)
def test_the_reader_has_no_complaint_of(source):
    assert Reader(source).complaints == []
