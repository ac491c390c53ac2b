"""A pickle or a script that lies where a command looks for its files never runs, whatever the command says of it."""

import json
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from bridge.exchange.errors import RequestError
from finished_runs import (
    CONDITIONS,
    DISCOVERY,
    PER_LAYER,
    RANKING,
    SUMMARY,
    VALIDATE,
    VALIDATION,
    plant,
    run,
    setup,
    surroundings,
    unfinished,
)
from llm_perturb.evaluation import models
from llm_perturb.evaluation.corpus import CorpusOptions, read_texts


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    surroundings(monkeypatch)


@pytest.fixture
def out(finished, tmp_path):
    """A copy of the runs, to be spoilt."""
    return Path(shutil.copytree(finished / "out", tmp_path / "out"))


@pytest.fixture
def marker(tmp_path):
    """What a planted pickle would make."""
    return tmp_path / "marker"


@pytest.mark.parametrize("form", ["text", "torch"])
def test_the_pickles_are_alive(tmp_path, marker, form):
    """Or that none runs would show nothing."""
    plant(tmp_path / "planted", marker, form)
    if form == "torch":
        with zipfile.ZipFile(tmp_path / "planted") as archive:
            content = archive.read("planted/data.pkl")
        (tmp_path / "planted").write_bytes(content)
    subprocess.run([sys.executable, "-m", "pickle", tmp_path / "planted"], capture_output=True)
    assert marker.exists()


@pytest.mark.parametrize("form", ["text", "torch"])
def test_discovery_goes_on_past_planted_states(finished, out, marker, form, capfd):
    folder = out / DISCOVERY
    expected = (folder / RANKING).read_bytes()
    unfinished(folder)
    states = ["resume-0-1.pt", "resume-0-9.pt", "resume-0-1.safetensors", "resume-0-2.safetensors.damaged"]
    for name in [*states, "progress-0.jsonl", "baseline.json", "analysis.log", RANKING, ".hidden-x/0-0"]:
        plant(folder / name, marker, form)
    words = ["--output", out, "--experiment-id", "x", "--topk", 3, "--no-save-plots"]
    assert run("phase1", *setup(finished), *words) == 0
    assert not marker.exists()
    assert (folder / RANKING).read_bytes() == expected
    assert f"WARNING: {folder}/resume-0-1.safetensors cannot be used" in capfd.readouterr().err
    assert not list(folder.glob("resume-*"))


@pytest.mark.parametrize("form", ["text", "torch"])
@pytest.mark.parametrize(
    ("command", "flag"),
    [
        *(("phase1", flag) for flag in ("--baseline", "--config", "--data-file")),
        *(("baseline", flag) for flag in ("--config", "--data-file")),
        *(("perturb", flag) for flag in ("--weights-csv", "--per-weight")),
        ("validate", "--baseline"),
    ],
)
def test_files_that_flags_name(finished, tmp_path, marker, capfd, command, flag, form):
    plant(tmp_path / "planted", marker, form)
    words = [*setup(finished), "--output", tmp_path / "out"]
    words = [word for at, word in enumerate(words) if flag not in words[max(0, at - 1) : at + 1]]
    words += {"phase1": ["--topk", 3, "--no-save-plots"], "perturb": CONDITIONS}.get(command, [])
    if command == "validate":
        words = ["--from", finished / "out", *VALIDATE]
    code = run(command, *words, flag, tmp_path / "planted")
    assert not marker.exists()
    assert code == (0 if (flag, form) == ("--data-file", "text") else 2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"]
)
def test_tags_of_a_config(finished, tmp_path, marker, tag):
    (tmp_path / "flags.yaml").write_text(f"max-length: {tag} ['touch {marker}']\n")
    assert run("baseline", "--model", finished / "model", "--config", tmp_path / "flags.yaml") == 2
    assert not marker.exists()


@pytest.mark.parametrize("form", ["text", "torch"])
@pytest.mark.parametrize(
    ("command", "file"),
    [
        *(("targets", f"{DISCOVERY}/{name}") for name in ("manifest.json", RANKING, SUMMARY)),
        *(("validate", f"{DISCOVERY}/{name}") for name in ("baseline.json", PER_LAYER, "sampled_weights.csv")),
        *(("validate", f"{VALIDATION}/{name}") for name in ("manifest.json", "perturb_measure/manifest.json")),
        ("validate", f"{VALIDATION}/perturb_measure/measurements.csv"),
        *(("correlate", f"{VALIDATION}/{name}") for name in ("measurements.csv", "targets.csv", "sampled_weights.csv")),
        *(("report", f"{VALIDATION}/{name}") for name in ("correlations.csv", "manifest.json")),
        *(("compare", f"{DISCOVERY}/{name}") for name in ("sampled_weights.csv", RANKING)),
        ("compare", f"{VALIDATION}/measurements.csv"),
    ],
)
def test_files_of_the_runs_that_the_bridge_reads(out, tmp_path, marker, capfd, command, file, form):
    words = {"validate": VALIDATE, "compare": ["--output", tmp_path / "compared"]}.get(command, [])
    place = [out / VALIDATION] if command in {"correlate", "report"} else [out]
    if command == "validate":
        unfinished(out / VALIDATION)
    if command == "compare":
        other = Path(shutil.copytree(out / DISCOVERY, tmp_path / "other" / DISCOVERY))
        manifest = (other / "manifest.json").read_text()
        (other / "manifest.json").write_text(manifest.replace('"revision": "local-', '"revision": "local-0'))
        place.append(other)
    plant(out / file, marker, form)
    code = run(command, "--from", *place, *words)
    assert not marker.exists()
    out, err = capfd.readouterr()
    assert code in {1, 2} and "Traceback" not in err, (code, err)


@pytest.mark.parametrize("form", ["text", "torch"])
@pytest.mark.parametrize("file", ["progress-0.jsonl", "manifest.json", "sequence_losses.parquet", "baseline.json"])
def test_files_of_a_killed_measurement(finished, out, marker, file, form):
    unfinished(out / "perturb_x")
    plant(out / "perturb_x" / file, marker, form)
    code = run("perturb", *setup(finished), *CONDITIONS, "--output", out, "--experiment-id", "x")
    assert not marker.exists()
    assert code == (2 if file == "manifest.json" else 0)  # a damaged log is set aside, and measured again


@pytest.mark.parametrize("form", ["text", "torch"])
@pytest.mark.parametrize("file", ["measurements.csv", "sequence_losses.parquet", "baseline.json", "manifest.json"])
def test_files_of_shards(out, tmp_path, marker, file, form):
    (shard,) = out.glob("shard_*1_of_2")
    plant(shard / file, marker, form)
    assert run("merge", "--from", out, "--output", tmp_path / "merged") in {1, 2}
    assert not marker.exists()


@pytest.fixture
def model(finished, tmp_path):
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(finished / "model", tmp_path / "model"))


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("form", ["text", "torch"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors", "pytorch_model-00001-of-00001.bin"])
def test_weights_of_a_model(model, marker, file, form, weights):
    (model / "model.safetensors").unlink()
    plant(model / file, marker, form)
    if "-of-" in file:
        index = {"metadata": {"total_size": 8}, "weight_map": {"embed_out.weight": file}}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(Exception, match=r"(?i)weights|pytorch_model|cannot be loaded|safetensors"):
        models.load(str(model), device="cpu", weights=weights)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["text", "torch"])
def test_other_files_of_a_model(model, marker, form):
    beside = ["training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.bin", "adapter_model.bin"]
    for name in [*beside, "vocab.pkl", "tokenizer.model", "events.out.tfevents"]:
        plant(model / name, marker, form)
    plant(model / "chat_template.jinja", marker)
    models.load(str(model), device="cpu")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x", "r": 1}')
    with suppress(RequestError):
        models.load(str(model), device="cpu")
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_configs_of_a_model(model, marker, file):
    plant(model / file, marker)
    with suppress(RequestError):
        models.load(str(model), device="cpu")
    assert not marker.exists()


CODE = """
from pathlib import Path
from transformers import GPTNeoXConfig as Config, GPTNeoXForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
Path({marker!r}).touch()
class EvilConfig(Config):
    model_type = "evil"
class EvilModel(Model):
    config_class = EvilConfig
class EvilTokenizer(Tokenizer):
    pass
"""


def with_code(model, marker, model_type):
    """The model with code of its own beside it, which all its configs name."""
    (model / "evil.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    changes = {"config.json": {"auto_map": names, "model_type": model_type}}
    changes["tokenizer_config.json"] = {"auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    for file, change in changes.items():
        content = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(content | change))
    return str(model)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "evil"])
def test_code_of_a_model_runs_only_if_it_is_trusted(model, marker, tmp_path, monkeypatch, model_type, weights):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = with_code(model, marker, model_type)
    if model_type == "evil":
        with pytest.raises(RequestError, match="cannot be loaded.*contains custom code"):
            models.load(name, device="cpu", weights=weights)
    else:
        assert type(models.load(name, device="cpu", weights=weights).model).__name__ == "GPTNeoXForCausalLM"
    assert not marker.exists()
    with suppress(RequestError):
        models.load(name, device="cpu", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("form", ["text", "torch"])
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.csv", "texts.parquet", "texts/texts.py", "texts/data.pkl"])
def test_data_sets(tmp_path, marker, monkeypatch, name, form):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    plant(tmp_path / name, marker, form)
    if name.endswith(".py"):
        (tmp_path / name).write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with suppress(RequestError, RuntimeError):
        read_texts(CorpusOptions(dataset=str(tmp_path / name.split("/")[0])))
    assert not marker.exists()
