"""Killed runs, and runs in several processes."""

import json
import shutil
import signal
import socket
import time

import msgspec
import pandas as pd
import pytest
from bridge.exchange.tables import MEASUREMENTS, read_table
from llm_perturb import perturbation_run
from llm_perturb.evaluation import models
from llm_perturb.measurements_table import record_form
from perturbation_commands import DENSE, UP, call, common_flags, manifest_of, run_of, start

pytestmark = pytest.mark.usefixtures("quiet_surroundings")


MANY = {"target_layer": [UP, DENSE], "k": [1, 5], "seeds": list(range(25)), "selection": ["top", "random"]}


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """The folder of a run that was killed in the middle, its last record cut in half."""
    output = tmp_path_factory.mktemp("killed")
    flags = common_flags(inputs, output) | {"per_weight": str(inputs / "single.csv")}
    process = start(flags | MANY)
    log = output / "perturb_x/progress-0.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    text = log.read_bytes()
    log.write_bytes(text + text.splitlines()[0][:50])
    return output / "perturb_x"


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """The table of the same request, measured without a break under two processes of accelerate."""
    output = tmp_path_factory.mktemp("two")
    flags = common_flags(inputs, output) | {"per_weight": str(inputs / "single.csv")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_config.yaml"]
    process = start(flags | MANY, [*launcher, "--num_processes", "2", "--main_process_port", str(port)])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return output / "perturb_x"


def copied(killed, flags, identifier):
    target = run_of(flags, identifier)
    shutil.copytree(killed, target)
    return target


@pytest.mark.slow
def test_a_killed_run_is_unfinished_and_shows_no_table(killed):
    assert manifest_of(killed)["status"] == "running"
    assert not (killed / "measurements.csv").exists()


@pytest.mark.slow
def test_a_record_lacks_nothing(killed):
    line = (killed / "progress-0.jsonl").read_bytes().splitlines()[0]
    record, form = json.loads(line.partition(b" ")[2]), record_form(12)
    msgspec.convert(record, form)
    lacking = [{key: value for key, value in record.items() if key != left_out} for left_out in record]
    for left_out in record["row"]:
        row = {key: value for key, value in record["row"].items() if key != left_out}
        lacking.append(record | {"row": row})
    lacking.append(record | {"losses": record["losses"][1:]})
    for seed in (2**63 - 1, -(2**63)):
        msgspec.convert(record | {"row": record["row"] | {"seed": seed}}, form)
    lacking += [record | {"row": record["row"] | {"seed": seed}} for seed in (2**63, -(2**63) - 1)]
    for each in lacking:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(each, form)


@pytest.mark.slow
@pytest.mark.parametrize("identifier", ["x", None], ids=["by its id", "without an id"])
def test_a_killed_run_goes_on_to_the_same_table(killed, uninterrupted, flags, capfd, inputs, monkeypatch, identifier):
    folder = copied(killed, flags, identifier or "20200101_000000")
    flags |= {"per_weight": str(inputs / "single.csv")}
    n_finished = (folder / "progress-0.jsonl").read_bytes().count(b"\n")
    measured, real = [], perturbation_run.sweep
    monkeypatch.setattr(perturbation_run, "sweep", lambda *a, **k: (measured.append(1) or o for o in real(*a, **k)))
    code, _, complaints = call(capfd, flags | MANY | {"experiment_id": identifier})
    assert (code, complaints) == (0, [])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert manifest_of(folder)["status"] == "complete"
    table = folder / "measurements.csv"
    assert table.read_bytes() == (uninterrupted / "measurements.csv").read_bytes()
    assert len(measured) + n_finished == len(read_table(table, MEASUREMENTS)) == 2 * 2 * (1 + 25) + 6
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "sequence_losses.parquet"), pd.read_parquet(uninterrupted / "sequence_losses.parquet")
    )


@pytest.mark.slow
def test_a_killed_run_is_not_resumed_with_other_weights(killed, flags, capfd, inputs, monkeypatch):
    """The files are the same, what is read from them is not."""
    folder, load = copied(killed, flags, "x"), models.load

    def load_changed(*arguments, **options):
        loaded = load(*arguments, **options)
        loaded.model.get_parameter(f"{DENSE}.weight")[1, 1] *= -1
        return loaded

    monkeypatch.setattr(models, "load", load_changed)
    code, _, complaints = call(capfd, flags | MANY | {"per_weight": str(inputs / "single.csv")})
    assert (code, len(complaints)) == (2, 1)
    assert f"begun with another fingerprint (the models differ in {DENSE}.weight)" in complaints[0]
    assert manifest_of(folder)["status"] == "running"


@pytest.mark.slow
def test_a_killed_run_is_not_resumed_with_other_flags(killed, flags, capfd, inputs):
    folder = copied(killed, flags, "x")
    flags |= {"per_weight": str(inputs / "single.csv")}
    code, _, complaints = call(capfd, flags | MANY | {"max_length": 23})
    assert code == 2
    assert len(complaints) == 1
    assert "was begun with another" in complaints[0]
    assert "max_length" in complaints[0]
    assert not (folder / "measurements.csv").exists()


@pytest.mark.slow
def test_two_processes_shared_the_work(uninterrupted):
    manifest = manifest_of(uninterrupted)
    assert (manifest["status"], manifest["world_size"]) == ("complete", 2)
