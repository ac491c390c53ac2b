import importlib.util
import inspect
import typing
from pathlib import Path

import pytest
import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import MEASUREMENTS
from llm_perturb import perturbation, target_scores
from safetensors.torch import load_file, save_file
from tiny_models import save_checkpoint

PACKAGE = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, PACKAGE / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BASELINE, PERTURB = load("run_baseline").baseline, load("run_topk_perturb").perturb


def flags(command):
    return inspect.signature(command, eval_str=True).parameters


def choices(command, flag):
    kind = flags(command)[flag].annotation
    return typing.get_args(typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind)


def test_what_the_scripts_share_means_the_same():
    """Or a baseline could be of another corpus than the measurements that it goes with."""
    shared = flags(BASELINE).keys() & flags(PERTURB).keys()
    assert shared == flags(BASELINE).keys()
    for flag in shared:
        assert flags(BASELINE)[flag].annotation == flags(PERTURB)[flag].annotation
        assert flags(BASELINE)[flag].default == flags(PERTURB)[flag].default


@pytest.mark.parametrize("command", [BASELINE, PERTURB])
def test_every_flag_is_a_keyword_with_a_default_and_a_line_of_help(command):
    described = command.__doc__.partition("Args:")[2]
    for name, parameter in flags(command).items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert f"\n        {name}: " in described


def test_the_choices_are_those_of_the_library():
    metrics = ("grad_x_weight", "grad_squared", "obd", "taylor2", "magnitude")
    kinds = ("zero", "sign_flip", "scale", "gaussian_noise", "bit_flip", "quantize")
    assert choices(PERTURB, "metric") == typing.get_args(target_scores.Metric) == metrics
    assert choices(PERTURB, "perturbation") == typing.get_args(perturbation.Kind) == kinds
    assert choices(PERTURB, "packing") == ("documents", "windows")
    assert choices(PERTURB, "dtype") == ("float32", "bfloat16", "float16", "float64")


def test_the_defaults_lie_among_the_choices():
    for flag in ("metric", "perturbation", "selection"):
        assert set(flags(PERTURB)[flag].default) <= set(choices(PERTURB, flag))


def test_both_scripts_leave_weights_out_only_when_told(tmp_path, capsys):
    save_checkpoint(tmp_path, "neox", n_layers=1)
    tensors = load_file(tmp_path / "model.safetensors") | {"score.weight": torch.zeros(2, 16)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "texts.txt").write_text("one text\nanother text\n")
    baseline = {"data_file": str(tmp_path / "texts.txt"), "output": str(tmp_path / "out")}
    for script, options in ((BASELINE, baseline), (PERTURB, {"list_layers": True})):
        with pytest.raises(RequestError, match=r"no place for \(1\): score\.weight"):
            script(model=str(tmp_path), device="cpu", **options)
        script(model=str(tmp_path), device="cpu", allow_unused_weights=["score.*"], **options)
        assert "UNUSED WEIGHTS: score.weight (--allow-unused-weights)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run_baseline", "run_topk_perturb"])
def test_a_script_is_short_and_speaks_no_argparse(name):
    source = (PACKAGE / "scripts" / f"{name}.py").read_text()
    assert "argparse" not in source
    assert len(source.splitlines()) < 150


def test_a_shape_of_the_table_others_rely_on():
    assert list(MEASUREMENTS.columns)[:7] == [
        "target_layer", "parameter", "selection", "perturbation", "k", "seed", "n_weights"
    ]  # fmt: skip
