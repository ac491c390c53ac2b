"""Every shipped config fits the command it is for."""

import importlib.util

import pytest
import yaml
from bridge import cli
from bridge.exchange.command_line import flags
from bridge.exchange.command_line.flag_table import flags_of
from conftest import PACKAGES, ROOT

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml"))


def script(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def command_of(config):
    scripts = PACKAGES / "llm_perturb" / "scripts"
    if config.name.startswith("phase1_runner_"):
        return script(PACKAGES / "critical_weight_analysis" / "phase1_runner.py").phase1
    if config.name.startswith("run_baseline_"):
        return script(scripts / "run_baseline.py").baseline
    if config.name.startswith("run_topk_perturb_"):
        return script(scripts / "run_topk_perturb.py").perturb
    if config.name.startswith("bridge_validate_"):
        return cli.validate
    return None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_fits_its_command(config):
    content = yaml.safe_load(config.read_text())
    command = command_of(config)
    if command is None:
        assert config.name == "models.yaml" or {"distributed_type", "num_processes"} <= content.keys()
        return
    needed = ["--from", "somewhere"] if "from_" in flags_of(command) else []
    values = flags.parse(command, ["--config", str(config), *needed])
    assert len(values) == len(content) + bool(needed)
