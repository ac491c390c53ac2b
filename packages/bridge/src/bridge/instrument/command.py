"""The instrument's command line for a plan: the discovery's model and corpus, and what is to be measured."""

import os
import subprocess
from pathlib import Path

from bridge.exchange.discovery_run import Discovery
from bridge.exchange.errors import RequestError
from bridge.instrument import process

CONFIG = Path(__file__).resolve().parents[5] / "configs" / "accelerate_config.yaml"


def launcher(python: Path, num_processes: int, device: str) -> list[str]:
    """What stands before the script's flags: Python and the script, or the launcher of several processes of it.

    The launcher starts its processes, too, through ``bridge.instrument.worker``, so that none outlives it. It is given no folder
    for logs: it would make a temporary one, which nobody reads, and leave it behind.

    Raises:
        RequestError: fewer than one process, more than the machine has GPUs or cores for, no torch to ask for the
            GPUs, or the launcher's configuration is not where it should be.
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
    n, unit = (0 if device == "cpu" else _count_gpus(python)), "GPUs"
    if n == 0:
        n, unit = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, "cores"
    if num_processes > n:
        raise RequestError(f"--num-processes {num_processes} is more than this machine has {unit}; give at most {n}")


def _count_gpus(python: Path) -> int:
    """How many GPUs torch finds in the instrument's environment; to ask takes seconds."""
    command, environment = process.tied([str(python), "-m", "bridge.instrument.count_gpus"])
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    number = (done.stdout.split() or [""])[-1]
    if done.returncode != 0 or not number.isdecimal():
        complaint = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RequestError(f"{python} cannot say how many GPUs there are for --num-processes: {complaint}")
    return int(number)


def model_flags(discovery: Discovery, device: str, batch_size: int | None, trust_remote_code: bool) -> list[str]:
    """The model as the discovery had it, its branch pinned to the commit of then.

    Raises:
        RequestError: a local model that is not here, or code of a model that is not trusted here.
    """
    wanted, model = discovery.options, discovery.model
    name, revision = model["id"], wanted.get("revision")
    if str(model.get("revision")).startswith("local-"):
        name = str(_existing(name, "model", discovery))
    elif revision is None and _is_commit(model.get("revision")):
        revision = model["revision"]  # the branch may have moved on since
    if wanted.get("trust_remote_code") and not trust_remote_code:
        raise RequestError(
            f"'{name}' was discovered with --trust-remote-code; give it here too if you still do trust it"
        )
    flags = _flags(model=name, revision=revision, dtype=model["dtype"], device=device, batch_size=batch_size)
    flags += ["--trust-remote-code"] * trust_remote_code
    patterns = wanted.get("allow_unused_weights")
    return [*flags, "--allow-unused-weights", *patterns] if patterns else flags


def corpus_flags(discovery: Discovery) -> list[str]:
    """The texts of the discovery.

    Raises:
        RequestError: a local file that is not here.
    """
    names = ("dataset_config", "split", "text_column", "packing", "max_length", "eval_limit")
    chosen = {name: discovery.options.get(name) for name in names}
    data_file, dataset = discovery.options.get("data_file"), discovery.options.get("dataset")
    if data_file:
        data_file = str(_existing(data_file, "data file", discovery))
    if dataset and Path(dataset).exists():
        dataset = str(Path(dataset).absolute())
    return _flags(data_file=data_file, dataset=dataset, **chosen)


def measurement_flags(chosen: dict) -> list[str]:
    """The conditions, as the manifest has them under ``options``, but for the targets."""
    words = ["--perturbation", *chosen["perturbations"], "--seeds", *map(str, chosen["seeds"])]
    words += _flags(**chosen["numbers"])
    if chosen["target_layers"]:
        words += ["--k", *map(str, chosen["k"]), "--selection", *chosen["selection"]]
        words += ["--metric", *chosen["metrics"]] * ("bottom" in chosen["selection"])
    return words


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]


def _existing(name: str, what: str, discovery: Discovery) -> Path:
    path = Path(name).absolute()
    if not path.exists():
        raise RequestError(
            f"the {what} '{name}' of {discovery.folder.name} is not here; "
            "start this command in the folder where the discovery was started"
        )
    return path


def _is_commit(revision: object) -> bool:
    return isinstance(revision, str) and len(revision) == 40 and set(revision) <= set("0123456789abcdef")
