"""A run that was stopped anywhere goes on to the table of a run that was not, single weights in groups included."""

import json

import pytest
from llm_perturb import perturbation_run


@pytest.fixture(scope="module")
def whole(tiny_command, tmp_path_factory):
    return tiny_command(output=tmp_path_factory.mktemp("whole"), experiment_id="x") / "perturb_x"


@pytest.fixture(scope="module")
def n_rows(whole):
    return len((whole / "measurements.csv").read_text().splitlines()) - 1


@pytest.mark.slow
@pytest.mark.parametrize("share_done", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_bytes(
    tiny_command, whole, n_rows, tmp_path, monkeypatch, share_done
):
    n_done, real = round(share_done * n_rows), perturbation_run.sweep

    def stopped(*arguments):
        for number, outcome in enumerate(real(*arguments)):
            if number == n_done:
                raise KeyboardInterrupt
            yield outcome
        raise KeyboardInterrupt

    monkeypatch.setattr(perturbation_run, "sweep", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny_command(output=tmp_path, experiment_id="x")
    folder = tmp_path / "perturb_x"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    assert not (folder / "measurements.csv").exists()
    measured = []
    monkeypatch.setattr(perturbation_run, "sweep", lambda *a: (measured.append(1) or outcome for outcome in real(*a)))
    tiny_command(output=tmp_path, experiment_id="x")
    for name in ("measurements.csv", "comparisons.csv", "sequence_losses.parquet", "baseline.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert n_rows - n_done <= len(measured) < n_rows - n_done + 6  # of a group cut through, all is measured again
