import importlib.util
import os
import socket
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from bridge.exchange.command_line.flag_table import flags_of
from bridge.exchange.command_line.flags import parse, run
from bridge.exchange.command_line.perturbation_numbers import PERTURBATION_OF
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import MEASUREMENTS
from llm_perturb import commands, perturbation, target_scores
from llm_perturb.perturbation_options import PerturbationOptions
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint

PACKAGE = Path(__file__).parents[1]
COMMANDS = Path(commands.__file__).parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BASELINE, PERTURB = load("run_baseline").baseline, load("run_topk_perturb").perturb


def test_what_the_scripts_share_means_the_same():
    """Or a baseline could be of another corpus than the measurements that it goes with."""
    assert flags_of(BASELINE).keys() <= flags_of(PERTURB).keys()
    for key, flag in flags_of(BASELINE).items():
        assert flags_of(PERTURB)[key] == flag


@pytest.mark.parametrize("command", [BASELINE, PERTURB])
def test_every_flag_has_a_default_and_a_line_of_help(command):
    for flag in flags_of(command).values():
        assert not flag.required
        assert flag.help


def test_the_choices_are_those_of_the_library():
    metrics = ("grad_x_weight", "grad_squared", "obd", "taylor2", "magnitude")
    kinds = ("zero", "sign_flip", "scale", "gaussian_noise", "bit_flip", "quantize")
    table = flags_of(PERTURB)
    assert table["metric"].choices == typing.get_args(target_scores.Metric) == metrics
    assert table["perturbation"].choices == typing.get_args(perturbation.Kind) == kinds
    assert table["selection"].choices == ("top", "random", "bottom", "matched")
    assert table["packing"].choices == ("documents", "windows")
    assert table["dtype"].choices == ("float32", "bfloat16", "float16", "float64")


def test_the_flags_of_a_measurement_and_their_defaults():
    assert {key: flag.default for key, flag in flags_of(PERTURB).items()} == {
        "target_layer": [], "k": [100], "selection": ["top", "random", "bottom"], "metric": ["grad_x_weight"],
        "weights_csv": [], "per_weight": None, "rows": [], "cols": [], "perturbation": ["zero"], "factor": None,
        "sigma": None, "bit": None, "n_bits": None, "seeds": [0, 1, 2], "kl": False, "shard": None,
        "list_layers": False, "parse_special_tokens": False, "window_bos": "auto",
        "model": None, "revision": None, "dtype": "float32", "device": "auto", "trust_remote_code": False,
        "allow_unused_weights": [], "data_file": None, "dataset": None, "dataset_config": None, "split": None,
        "attn_implementation": None,
        "text_column": "text", "packing": "documents",
        "max_length": None, "eval_limit": None, "batch_size": 1,
        "output": "outputs/", "experiment_id": None,
    }  # fmt: skip


def test_a_number_belongs_to_its_perturbation():
    kinds = typing.get_args(perturbation.Kind)
    for key, kind in PERTURBATION_OF.items():
        assert kind in kinds
        other = PerturbationOptions(perturbation=[k for k in kinds if k != kind], **{key: 3})
        with pytest.raises(RequestError, match=f"--{key.replace('_', '-')} is for --perturbation {kind}, which is not"):
            other.check(1)
        PerturbationOptions(perturbation=["zero", kind], **{key: 3}).check(1)


def test_unset_numbers_are_recorded_as_their_defaults():
    options = PerturbationOptions(perturbation=["scale", "gaussian_noise", "quantize"], sigma=2.0)
    assert options.identity()["perturbations"] == ["scale(0.5)", "gaussian_noise(2.0)", "quantize(4)"]


def test_a_negative_seed_is_refused():
    with pytest.raises(RequestError, match="--seeds must be at least 0, not -2"):
        PerturbationOptions(seeds=[0, -2]).check(1)


def test_the_defaults_lie_among_the_choices():
    for key in ("metric", "perturbation", "selection"):
        assert set(flags_of(PERTURB)[key].default) <= set(flags_of(PERTURB)[key].choices)


def test_a_comma_belongs_to_the_name_of_a_file_of_weights():
    assert parse(PERTURB, ["--weights-csv", "a,b.csv", "c.csv"])["weights_csv"] == ["a,b.csv", "c.csv"]


def test_both_scripts_leave_weights_out_only_when_told(tmp_path, capsys):
    save_checkpoint(tmp_path, "neox", n_layers=1)
    tensors = load_file(tmp_path / "model.safetensors") | {"score.weight": torch.zeros(2, 16)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "texts.txt").write_text("one text\nanother text\n")
    options = {"model": str(tmp_path), "data_file": str(tmp_path / "texts.txt"), "output": str(tmp_path / "out")}
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
    for script, more in ((BASELINE, []), (PERTURB, ["--list-layers"])):
        with pytest.raises(SystemExit, match="2"):
            run(script, "script", [*words, *more, "--device", "cpu"])
        assert "no place for (1): score.weight" in capsys.readouterr().err
        run(script, "script", [*words, *more, "--device", "cpu", "--allow-unused-weights", "score.*"])
        assert "UNUSED WEIGHTS: score.weight (--allow-unused-weights)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run_baseline", "run_topk_perturb", "merge_shards"])
def test_a_script_is_short_and_speaks_no_argparse(name):
    for file in (PACKAGE / "scripts" / f"{name}.py", COMMANDS / f"{name}.py"):
        source = file.read_text()
        assert "argparse" not in source
        assert len(source.splitlines()) < 80


def test_a_shape_of_the_table_others_rely_on():
    assert list(MEASUREMENTS.columns)[:7] == [
        "target_layer", "parameter", "selection", "perturbation", "k", "seed", "n_weights"
    ]  # fmt: skip


@pytest.mark.slow
def test_through_the_worker_a_wrong_request_under_the_launcher_is_one_line_too(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["accelerate.commands.launch", "--config_file", "configs/accelerate_config.yaml"]
    launch += ["--main_process_port", str(port), "scripts/run_topk_perturb.py", "--unknown", "1"]
    words = [sys.executable, "-m", "bridge.instrument.worker", "-m", *launch]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # for the launcher's folder of logs
    done = subprocess.run(words, cwd=PACKAGE, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("run_topk_perturb.py: error: unknown flag '--unknown'")
