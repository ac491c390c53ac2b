"""The command line of the measuring instrument: the discovery's model and corpus, and what is to be measured."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.exchange.discovery_run import Discovery
from bridge.exchange.errors import RequestError
from bridge.instrument import process
from bridge.instrument.texts import corpus_options, existing

CONFIG = Path(__file__).parent / "accelerate_config.yaml"


def launcher(python: Path, num_processes: int, device: str) -> list[str]:
    """The words before the script's flags: Python and the script, or accelerate's launcher of several processes.

    The launcher starts its processes through ``bridge.instrument.worker`` as well, so that none outlives it. Its
    folder for logs is the null device, because it would leave a temporary one behind.

    Raises:
        RequestError: fewer than one process, more than the machine has GPUs or cores for, no torch that could count
            the GPUs, or the launcher's configuration is missing.
    """
    if num_processes < 1:
        raise RequestError(f"--num-processes must be at least 1, not {num_processes}")
    if num_processes == 1:
        return [str(python), str(process.SCRIPT)]
    if not CONFIG.is_file():
        raise RequestError(f"{CONFIG} is missing: --num-processes {num_processes} starts the processes with it")
    _check_fits(python, num_processes, device)
    launch = [str(python), "-m", "accelerate.commands.launch", "--config_file", str(CONFIG), "--log_dir", os.devnull]
    return [*launch, "--num_processes", str(num_processes), "-m", "bridge.instrument.worker", str(process.SCRIPT)]


def _check_fits(python: Path, num_processes: int, device: str) -> None:
    """Refuse more processes than there are GPUs, each takes one; without GPUs, more than there are cores."""
    most, unit = 0, "GPUs"
    if device != "cpu":
        most = _count_gpus(python)
    if most == 0:
        most, unit = _count_cores(), "cores"
    if num_processes > most:
        raise RequestError(f"--num-processes {num_processes} is more than this machine has {unit}; give at most {most}")


def _count_cores() -> int:
    """The cores that this process may use, or all of the machine's where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count_gpus(python: Path) -> int:
    """How many GPUs torch can use in the instrument's environment; takes seconds."""
    command, environment = process.tied([str(python), "-m", "bridge.instrument.count_gpus"])
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    number = done.stdout.split()[-1] if done.stdout.split() else ""
    if done.returncode != 0 or not number.isdecimal():
        messages = done.stderr.strip().splitlines()
        complaint = messages[-1] if messages else "it said nothing"
        raise RequestError(f"{python} cannot say how many GPUs there are for --num-processes: {complaint}")
    return int(number)


def model_flags(discovery: Discovery, device: str, batch_size: int | None, trust_remote_code: bool) -> list[str]:
    """The model as the discovery loaded it; a branch is pinned to the commit that it was at then.

    Raises:
        RequestError: a local model that does not exist here, or code of a model that is not trusted here.
    """
    model = discovery.model
    name, loaded_revision = model["id"], model.get("revision")
    revision = discovery.options.get("revision")
    if str(loaded_revision).startswith("local-"):
        name = str(existing(name, "model", discovery))
    elif revision is None and _is_commit(loaded_revision):
        revision = loaded_revision  # the branch may have moved on since
    if discovery.options.get("trust_remote_code") and not trust_remote_code:
        raise RequestError(
            f"'{name}' was discovered with --trust-remote-code; give it here too if you still do trust it"
        )
    flags = _flags(model=name, revision=revision, dtype=model.get("dtype"), device=device, batch_size=batch_size)
    if trust_remote_code:
        flags.append("--trust-remote-code")
    flags += _flags(attn_implementation=discovery.options.get("attn_implementation"))
    patterns = discovery.options.get("allow_unused_weights")
    if patterns:
        flags += ["--allow-unused-weights", *patterns]
    return flags


def corpus_flags(discovery: Discovery, other_texts: Mapping[str, Any]) -> list[str]:
    """The texts of the discovery, or the others; see ``corpus_options``."""
    options = corpus_options(discovery, other_texts)
    parse_special_tokens = options.pop("parse_special_tokens")
    return _flags(**options) + (["--parse-special-tokens"] if parse_special_tokens else [])


def measurement_flags(chosen: Mapping[str, Any]) -> list[str]:
    """The selections and perturbations, from the options in the validation's manifest; without the targets."""
    words = ["--perturbation", *chosen["perturbations"], "--seeds", *map(str, chosen["seeds"])]
    words += _flags(**chosen["numbers"])
    if chosen["target_layers"]:
        words += ["--k", *map(str, chosen["k"]), "--selection", *chosen["selection"]]
    if chosen["target_layers"] and "bottom" in chosen["selection"]:
        words += ["--metric", *chosen["metrics"]]
    return words


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
