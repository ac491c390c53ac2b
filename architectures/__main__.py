"""Examine model types and write docs/architectures.md: every causal model type of transformers, or those named.

    nox -s architectures
    nox -s architectures -- gpt2 llama

Each type is examined in a process of its own, within a time limit; what came of it is a file in outputs/architectures.
A type that has one of the same versions is not examined again, so that a run that was stopped goes on where it was. The
page is written when every type has its file.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from architectures.configurations import MODEL_TYPES
from architectures.examine import Result, examine
from architectures.table import write_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "outputs" / "architectures"
PAGE = ROOT / "docs" / "architectures.md"
SECONDS = 180  # for one type
BYTES = 12 * 2**30  # of memory for one type


def main(*model_types: str) -> None:
    """Examine the types that have no result yet, say what is wrong, and write the page if all have one."""
    unknown = set(model_types) - set(MODEL_TYPES)
    if unknown:
        sys.exit(f"no causal model type of transformers: {', '.join(sorted(unknown))}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    version = _version()
    chosen = model_types or MODEL_TYPES
    for model_type in tqdm(chosen, desc="architectures"):
        if model_types or _read(model_type, version) is None:
            _in_process(model_type, version)
    results = [_read(model_type, version) for model_type in MODEL_TYPES]
    finished = [result for result in results if result]
    wrong = [result for result in finished if result.problems and result.model_type in chosen]
    for result in wrong:
        print(*(f"{result.model_type}: {problem}" for problem in result.problems[:3]), sep="\n")
    if len(finished) == len(MODEL_TYPES):
        write_page(PAGE, finished, {name: importlib.metadata.version(name) for name in ("torch", "transformers")})
    if wrong:
        sys.exit(f"{len(wrong)} of {len(chosen)} model types are wrong")


def _version() -> str:
    """A hash of the code and of the libraries that a result depends on."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    sources = [*Path(__file__).parent.glob("*.py"), *ROOT.glob("packages/*/src/**/*.py")]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read(model_type: str, version: str) -> Result | None:
    path = RESULTS / f"{model_type}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return Result(**content["result"]) if content.get("version") == version else None


def _in_process(model_type: str, version: str) -> None:
    """Examine a type in a child of this process, which has the libraries loaded."""
    process = multiprocessing.get_context("fork").Process(target=_write, args=(model_type, version))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        _save(Result(model_type, problems=[f"no result within {SECONDS} s"]), version)
    elif process.exitcode:
        _save(Result(model_type, problems=[f"the process ended with exit code {process.exitcode}"]), version)


def _write(model_type: str, version: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stderr.fileno())
        _save(examine(model_type), version)


def _save(result: Result, version: str) -> None:
    path = RESULTS / f"{result.model_type}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"version": version, "result": dataclasses.asdict(result)}, indent=1))
    part.replace(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    main(*sys.argv[1:])
