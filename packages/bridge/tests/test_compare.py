import json

import pandas as pd
import pytest
import synthetic
from bridge.compare import compare_folders
from bridge.exchange.errors import RequestError
from bridge.exchange.run_folder import read_manifest
from discovery_folder import make_discovery

METRIC = "grad_x_weight"


def write_run(parent, name, metrics=(METRIC,), **changes):
    folder = parent / f"critical_analysis_{name}"
    folder.mkdir(parents=True)
    manifest = synthetic.manifest(model=f"org/{name}") | changes
    manifest["identity"]["options"]["metric"] = list(metrics)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "baseline.json").write_text(json.dumps({"nll": 3.0, "ppl": 20.1, "n_tokens": 5}))
    for metric in metrics:
        synthetic.top_weights().to_csv(folder / f"top_100_weights_{metric}.csv", index=False)
        synthetic.summary().to_csv(folder / f"layer_summary_{metric}.csv", index=False)
    return folder


def test_folders_are_compared_and_the_tables_written(tmp_path, capsys):
    first, second = write_run(tmp_path / "one", "small"), write_run(tmp_path / "two", "large")
    validation = tmp_path / "one" / "validation_1"
    validation.mkdir()
    manifest = synthetic.manifest("validation") | {"discovery_folder": str(first)}
    (validation / "manifest.json").write_text(json.dumps(manifest))
    synthetic.measurements(n=2).to_csv(validation / "measurements.csv", index=False)
    (tmp_path / "out").mkdir()
    folder = compare_folders([tmp_path / "one", second], None, tmp_path / "out", "x")
    assert folder == tmp_path / "out" / "comparison_x"
    table = pd.read_csv(folder / "comparison.csv")
    assert table["model"].tolist() == ["small", "large"]
    assert table["baseline_ppl"].tolist() == [20.1, 20.1]
    assert table["ppl_ratio"].notna().tolist() == [True, False]
    assert (folder / "plots" / f"comparison_{METRIC}.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv(folder / "comparison_pairs.csv")["top_k_cosine"].iloc[0] == pytest.approx(1)
    assert "gini_layers" in capsys.readouterr().out
    manifest = read_manifest(folder)
    assert (manifest["status"], manifest["kind"], manifest["warnings"]) == ("complete", "comparison", [])
    assert manifest["identity"]["runs"]["large"]["folder"] == str(second)
    assert manifest["identity"]["validations"] == {"small": str(validation)}
    before = (folder / "comparison.csv").read_bytes()
    with pytest.raises(RequestError, match="is already complete"):
        compare_folders([tmp_path / "one", second], None, tmp_path / "out", "x")
    assert (folder / "comparison.csv").read_bytes() == before


def test_the_name_of_a_model_cannot_speak_to_the_terminal(tmp_path, capsys):
    folders = [make_discovery(tmp_path / name, model={"id": f"{name}\x1b[2J\nx"}) for name in "ab"]
    compare_folders(folders, None, tmp_path)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "a\\x1b[2J\\nx" in out


def test_different_texts_are_a_warning(tmp_path, capsys):
    write_run(tmp_path, "small")
    folder = write_run(tmp_path, "large")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["corpus"]["text_sha256"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    compared = compare_folders([tmp_path], METRIC, tmp_path)
    assert "WARNING: the runs were made on different texts" in capsys.readouterr().err
    assert len(read_manifest(compared)["warnings"]) == 1


def test_one_folder_may_hold_several_models(tmp_path):
    write_run(tmp_path, "small"), write_run(tmp_path, "large")
    assert len(pd.read_csv(compare_folders([tmp_path], METRIC, tmp_path) / "comparison.csv")) == 2


def test_the_same_run_twice_is_no_comparison(tmp_path):
    folder = write_run(tmp_path, "small")
    with pytest.raises(RequestError, match="at least two discovery runs, --from names 1"):
        compare_folders([tmp_path, folder], None, tmp_path)


def test_runs_without_a_common_metric_are_refused(tmp_path):
    write_run(tmp_path, "small"), write_run(tmp_path, "large", metrics=["obd"])
    with pytest.raises(RequestError, match=r"share no metric .*small: grad_x_weight"):
        compare_folders([tmp_path], None, tmp_path)
    with pytest.raises(RequestError, match="has no metric 'obd'"):
        compare_folders([tmp_path], "obd", tmp_path)
