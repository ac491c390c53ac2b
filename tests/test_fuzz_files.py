"""Whatever stands in a file that a command reads, the command keeps its promise; the damage is made by hypothesis.

``nox -s fuzz`` tries hundreds of times as many examples, and others each time.
"""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from command_contract import kept
from conftest import examples
from damaged_files import PLACES, damages
from finished_runs import (
    CONDITIONS,
    DISCOVERY,
    PER_LAYER,
    RANKING,
    SUMMARY,
    VALIDATE,
    VALIDATION,
    run,
    setup,
    surroundings,
)
from hypothesis import given
from hypothesis import strategies as st
from llm_perturb.evaluation import model_names
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow
TEXTS = [{"text": f"text number {n}", "id": n} for n in range(4)]


@pytest.fixture(scope="module", autouse=True)
def offline():
    """No network, and figures of one byte."""
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch)
        patch.setattr("matplotlib.figure.Figure.savefig", save_nothing)
        yield


def save_nothing(figure, path, **options):
    """Stand in for a method that takes a second."""
    Path(path).write_bytes(b"\x89PNG")


def prepare(finished: Path, folder: Path) -> None:
    """Copy the runs, the model and the texts, and add what else a command can read."""
    shutil.copytree(finished, folder, symlinks=True)
    lines = "".join(f"{json.dumps(text)}\n" for text in TEXTS)
    table = "id,text\n" + "".join(f"{text['id']},{text['text']}\n" for text in TEXTS)
    contents = {"texts.jsonl": lines, "texts.json": json.dumps(TEXTS, indent=1), "texts.csv": table}
    contents |= {"texts.tsv": table.replace(",", "\t")}
    for name, content in contents.items():
        (folder / name).write_text(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    (folder / "texts.txt.gz").write_bytes(gzip.compress((folder / "texts.txt").read_bytes()))
    flags = {"model": folder / "model", "data-file": folder / "texts.txt", "max-length": 32, "device": "cpu"}
    (folder / "flags.yaml").write_text("".join(f"{flag}: {value}\n" for flag, value in flags.items()))
    split_model(folder / "model", folder / "split")


def split_model(folder: Path, parts: Path) -> None:
    """A copy of a model, its weights in two files and an index."""
    shutil.copytree(folder, parts)
    tensors = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(tensors)}
    for file in set(names.values()):
        own = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        save_file(own, parts / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_as_another_model(discovery: Path, copy: Path) -> None:
    """A copy of a discovery, as if it were of another model, to compare both."""
    shutil.copytree(discovery, copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"revision": "local-', '"revision": "local-0'))


@pytest.fixture(scope="module")
def spoilt(finished, tmp_path_factory):
    """Makes a fresh copy of everything, in the same folder each time."""
    original = tmp_path_factory.mktemp("original") / "original"
    prepare(finished, original)
    folder = tmp_path_factory.mktemp("fuzz") / "spoilt"

    def copy() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder, symlinks=True)
        return folder

    return copy


def check(folder, file, damage, written, command, *words):
    """Damage a file, run a command, and see that it keeps its promise; its exit code and stderr."""
    marker = folder.parent / "marker"
    marker.unlink(missing_ok=True)
    damage.apply(folder / file, marker)
    return kept(lambda: run(command, *words), folder, written, marker)


def any_damage(*files):
    """One of the files, and damage to it."""
    return st.sampled_from(files).flatmap(lambda file: st.tuples(st.just(file), damages(Path(file))))


DISCOVERED = [f"out/{DISCOVERY}/{name}" for name in ("manifest.json", RANKING, SUMMARY)]
TABLES = ["measurements.csv", "targets.csv", "sampled_weights.csv", "single_weights.csv", "comparisons.csv"]
VALIDATED = [f"out/{VALIDATION}/{name}" for name in ("manifest.json", *TABLES)]
REPORTED = [*VALIDATED, f"out/{VALIDATION}/correlations.csv", *DISCOVERED, f"out/{DISCOVERY}/baseline.json"]
SEPARATE = ["out/baseline_x/baseline.json", "out/baseline_x/fingerprint.json"]
PLANNED = [*DISCOVERED, *(f"out/{DISCOVERY}/{name}" for name in (PER_LAYER, "sampled_weights.csv"))]
PLANNED += [f"out/{DISCOVERY}/{name}" for name in ("baseline.json", "fingerprint.json")]
PLANNED += [*SEPARATE, f"out/{VALIDATION}/manifest.json"]
SHARDS = [
    f"out/shard_x_{n}_of_2/{name}"
    for n in (1, 2)
    for name in ("manifest.json", "measurements.csv", "sequence_losses.parquet", "baseline.json", "fingerprint.json")
]
MODEL = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
WHOLE = [f"model/{name}" for name in (*MODEL, "model.safetensors")]
SPLIT = [f"split/model{name}.safetensors" for name in ("-00001-of-00002", "-00002-of-00002")]
SPLIT += ["split/model.safetensors.index.json"] * 3
KINDS = [f"texts.{kind}{end}" for kind in ("txt", "csv", "tsv", "json", "jsonl") for end in ("", ".gz")]
RESUMED = ["manifest.json", "progress-0.jsonl", "fingerprint.json", "baseline.json"]


@examples(40)
@given(any_damage(*DISCOVERED))
def test_targets(spoilt, case):
    folder = spoilt()
    check(folder, *case, "nothing", "targets", "--from", folder / "out")


@examples(30)
@given(any_damage(*VALIDATED, *DISCOVERED))
def test_correlate(spoilt, case):
    folder = spoilt()
    check(folder, *case, f"out/{VALIDATION}/correlations.csv", "correlate", "--from", folder / "out" / VALIDATION)


@examples(15)
@given(any_damage(*REPORTED))
def test_report(spoilt, case):
    folder = spoilt()
    check(folder, *case, f"out/{VALIDATION}/(report|plots/)", "report", "--from", folder / "out" / VALIDATION)


@examples(15)
@given(any_damage(*PLANNED[:-1], f"out/{VALIDATION}/measurements.csv"))
def test_compare(spoilt, case):
    folder = spoilt()
    copy_as_another_model(folder / "out" / DISCOVERY, folder / "other" / DISCOVERY)
    words = ["--from", folder / "out", folder / "other", "--output", folder / "compared"]
    check(folder, *case, "compared", "compare", *words)


@examples(30)
@given(any_damage(*PLANNED))
def test_plan_of_a_validation(spoilt, case):
    """The validation is complete already, so that a plan without a complaint starts no measurement."""
    folder = spoilt()
    words = ["--from", folder / "out", *VALIDATE, "--baseline", folder / SEPARATE[0]]
    check(folder, *case, "nothing", "validate", *words)


@examples(20)
@given(any_damage(*SHARDS))
def test_merge(spoilt, case):
    folder = spoilt()
    check(folder, *case, "merged", "merge", "--from", folder / "out", "--output", folder / "merged")


@examples(40)
@given(any_damage("flags.yaml"))
def test_config(spoilt, case):
    folder = spoilt()
    words = ["--config", folder / "flags.yaml", *setup(folder), "--output", folder / "new", "--experiment-id", "n"]
    check(folder, *case, "new", "baseline", *words)


@examples(20)
@given(any_damage("models.yaml").filter(lambda case: case[1].how not in PLACES))  # it is a part of the package
def test_table_of_models(spoilt, case):
    folder = spoilt()
    shutil.copy(model_names.MODEL_TABLE, folder)
    with pytest.MonkeyPatch.context() as patch:
        model_names.model_table.cache_clear()
        patch.setattr(model_names, "MODEL_TABLE", folder / "models.yaml")
        check(folder, *case, "new", "baseline", *setup(folder), "--output", folder / "new")
    model_names.model_table.cache_clear()


@examples(40)
@given(any_damage(*WHOLE, *SPLIT))
def test_model(spoilt, case):
    folder = spoilt()
    words = setup(folder)
    words[1] = folder / case[0].split("/")[0]
    check(folder, *case, "new", "baseline", *words, "--output", folder / "new")


@examples(20)
@given(any_damage(*WHOLE, *SPLIT))
def test_streamed_model(spoilt, case):
    folder = spoilt()
    words = [*setup(folder), "--weights", "streamed", "--topk", 3, "--no-save-plots", "--output", folder / "new"]
    words[1] = folder / case[0].split("/")[0]
    check(folder, *case, "new", "phase1", *words)


@examples(40)
@given(any_damage(*KINDS))
def test_texts(spoilt, case):
    folder = spoilt()
    words = setup(folder)
    words[2:4] = ["--data-file" if case[0].startswith("texts.txt") else "--dataset", folder / case[0]]
    check(folder, *case, "new", "baseline", *words, "--output", folder / "new")


@examples(20)
@given(any_damage(f"out/{DISCOVERY}/{RANKING}", f"out/{DISCOVERY}/fingerprint.json"))
def test_list_of_weights(spoilt, case):
    folder = spoilt()
    words = [*CONDITIONS, "--weights-csv", folder / "out" / DISCOVERY / RANKING, "--output", folder / "new"]
    check(folder, *case, "new", "perturb", *setup(folder), *words)


@pytest.fixture(scope="module")
def killed(finished, tmp_path_factory):
    """Makes a fresh copy of a model, texts, a measurement and a discovery that were killed, in the same folder."""
    original = tmp_path_factory.mktemp("original") / "original"
    folder = tmp_path_factory.mktemp("fuzz") / "killed"

    def copy() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder, symlinks=True)
        return folder

    shutil.copytree(finished, folder, ignore=lambda parent, names: ["out"])
    kill_runs(folder)
    shutil.copytree(folder, original)
    return copy


STATES = ["resume-0-1.safetensors", "resume-0-2.safetensors"]
MEASURE = [*CONDITIONS, "--experiment-id", "k"]
DISCOVER = ["--topk", 3, "--no-save-plots", "--experiment-id", "k"]


def kill_runs(folder: Path) -> None:
    """Leave a measurement with its log, and a discovery with the states of its pass, as a kill would."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = ["--output", folder / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm_perturb.perturbation_run.write_records", stop)
        assert run("perturb", *setup(folder), *MEASURE, *out) == 130
        patch.setattr("critical_weight_analysis.layerwise.backward_checkpoints._SHARE", 1e9)
        patch.setattr("critical_weight_analysis.layerwise.backward_checkpoints.Resume.clear", stop)
        assert run("phase1", *setup(folder), *DISCOVER, *out) == 130


@examples(20)
@given(any_damage(*(f"out/perturb_k/{name}" for name in RESUMED)))
def test_killed_measurement(killed, case):
    folder = killed()
    check(folder, *case, "out/perturb_k", "perturb", *setup(folder), *MEASURE, "--output", folder / "out")


@examples(10)
@given(any_damage(*(f"out/critical_analysis_k/{name}" for name in (*STATES, "manifest.json"))))
def test_killed_discovery(killed, case):
    folder = killed()
    check(folder, *case, "out/critical_analysis_k", "phase1", *setup(folder), *DISCOVER, "--output", folder / "out")
