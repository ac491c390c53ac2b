"""The instrument's command line for a plan: the discovery's model and corpus, and what is to be measured."""

from pathlib import Path

from bridge import instrument
from bridge.discovery import Discovery
from bridge.errors import RequestError

CONFIG = Path(__file__).resolve().parents[4] / "configs" / "accelerate_config.yaml"


def launcher(python: Path, num_processes: int) -> list[str]:
    """What stands before the script's flags: the script itself, or the launcher of several processes of it.

    The workers run the script through ``bridge.worker``, so that none outlives a launcher that was killed.

    Raises:
        RequestError: fewer than one process, or the launcher's configuration is not where it should be.
    """
    if num_processes < 1:
        raise RequestError(f"--num-processes must be at least 1, not {num_processes}")
    if num_processes == 1:
        return [str(python), str(instrument.SCRIPT)]
    if not CONFIG.is_file():
        raise RequestError(f"{CONFIG} is missing: --num-processes {num_processes} starts the processes with it")
    launch = [str(python), "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    return [*launch, "--num_processes", str(num_processes), "-m", "bridge.worker", str(instrument.SCRIPT)]


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
    flags += _flags(attn_implementation=wanted.get("attn_implementation"))
    return flags + ["--trust-remote-code"] * trust_remote_code


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
