import json

import pandas as pd
import pytest
import synthetic
from bridge.compare import compare_folders
from bridge.exchange.errors import RequestError
from bridge.exchange.existing_runs import read_manifest
from discovery_folder import make_discovery

METRIC = "grad_x_weight"
BASELINE = {"model": "tiny", "revision": None, "dtype": "float32", "corpus_sha256": "c" * 64}
BASELINE |= {"nll": 3.0, "ppl": 20.1, "n_tokens": 5}


def write_run(parent, name, metrics=(METRIC,), **changes):
    folder = parent / f"critical_analysis_{name}"
    folder.mkdir(parents=True)
    manifest = synthetic.manifest(model=f"org/{name}") | changes
    manifest["identity"]["options"]["metric"] = list(metrics)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "baseline.json").write_text(json.dumps(BASELINE))
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
    header = (folder / "comparison.csv").read_text().splitlines()[0]
    assert header.startswith("metric,model,run,baseline_ppl,model_id,")
    pairs = (folder / "comparison_pairs.csv").read_text().splitlines()
    assert pairs[0] == "metric,first,second,top_k_cosine,score_spearman,n_cells"
    assert pairs[1].startswith(f"{METRIC},small,large,")
    before = (folder / "comparison.csv").read_bytes()
    with pytest.raises(RequestError, match="is already complete"):
        compare_folders([tmp_path / "one", second], None, tmp_path / "out", "x")
    assert (folder / "comparison.csv").read_bytes() == before


def test_a_comparison_that_was_interrupted_is_made_again(tmp_path, blank_figures):
    write_run(tmp_path, "small"), write_run(tmp_path, "large")
    folder = compare_folders([tmp_path], None, tmp_path, "x")
    before = (folder / "comparison.csv").read_bytes()
    (folder / "comparison.csv").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    assert compare_folders([tmp_path], None, tmp_path, "x") == folder
    assert (folder / "comparison.csv").read_bytes() == before
    assert read_manifest(folder)["status"] == "complete"


def test_the_name_of_a_model_cannot_speak_to_the_terminal(tmp_path, capsys):
    folders = [make_discovery(tmp_path / name, model={"id": f"{name}\x1b[2J\nx"}) for name in "ab"]
    compare_folders(folders, None, tmp_path)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "a\\x1b[2J\\nx" in out


def test_different_texts_are_a_warning(tmp_path, capsys, blank_figures):
    write_run(tmp_path, "small")
    folder = write_run(tmp_path, "large")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["corpus"]["text_sha256"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    compared = compare_folders([tmp_path], METRIC, tmp_path)
    assert "WARNING: the runs were made on different texts" in capsys.readouterr().err
    assert len(read_manifest(compared)["warnings"]) == 1


def test_one_folder_may_hold_several_models(tmp_path, capsys, blank_figures):
    write_run(tmp_path, "small"), write_run(tmp_path, "large"), write_run(tmp_path, "third")
    folder = compare_folders([tmp_path], METRIC, tmp_path)
    assert pd.read_csv(folder / "comparison.csv")["model"].tolist() == ["large", "small", "third"]
    header, first = capsys.readouterr().out.splitlines()[:2]  # without the columns of a validation
    columns = "metric model k baseline_ppl top_k_score_share top_fraction_score_share gini_layers"
    assert header.split() == columns.split()
    assert first.split()[:4] == [METRIC, "large", "100", "20.1"]


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path, blank_figures):
    runs = [write_run(tmp_path / parent, "small") for parent in ("one", "two")]
    runs.append(write_run(tmp_path / "two", "large"))
    manifest = synthetic.manifest(model="another/small")
    manifest["identity"]["options"]["metric"] = [METRIC]
    (runs[1] / "manifest.json").write_text(json.dumps(manifest))
    compared = compare_folders(runs, METRIC, tmp_path)
    names = [f"small ({parent}/critical_analysis_small)" for parent in ("one", "two")]
    assert pd.read_csv(compared / "comparison.csv")["model"].tolist() == [*names, "large"]


def test_the_same_run_twice_is_no_comparison(tmp_path):
    folder = write_run(tmp_path, "small")
    with pytest.raises(RequestError, match="at least two discovery runs, --from names 1"):
        compare_folders([tmp_path, folder], None, tmp_path)


def test_the_common_metrics_are_in_the_order_of_the_first_run(tmp_path, blank_figures):
    first = write_run(tmp_path / "one", "small", metrics=["wanda", METRIC, "obd"])
    second = write_run(tmp_path / "two", "large", metrics=["obd", METRIC, "wanda"])
    folder = compare_folders([first, second], None, tmp_path, "x")
    assert pd.read_csv(folder / "comparison_pairs.csv")["metric"].tolist() == ["wanda", METRIC, "obd"]


def test_runs_without_a_common_metric_are_refused(tmp_path):
    write_run(tmp_path, "small"), write_run(tmp_path, "large", metrics=["obd"])
    with pytest.raises(RequestError, match=r"share no metric .*small: grad_x_weight"):
        compare_folders([tmp_path], None, tmp_path)
    with pytest.raises(RequestError, match="has no metric 'obd'"):
        compare_folders([tmp_path], "obd", tmp_path)


def write_validation(discovery, name, **changes):
    folder = discovery.parent / f"validation_{name}"
    folder.mkdir()
    manifest = synthetic.manifest("validation") | {"discovery_folder": str(discovery)} | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    table = synthetic.measurements(n=2, metrics=(METRIC,))
    table.to_csv(folder / "measurements.csv", index=False)
    return folder, table


def test_a_run_without_a_validation_beside_it_hides_no_other(tmp_path, blank_figures):
    runs = [write_run(tmp_path / name, name) for name in ("small", "large")]
    validation, _ = write_validation(runs[1], "1")
    for other in ("critical_analysis_a", "critical_analysis_z"):  # of runs that are not compared
        write_validation(runs[1], other, discovery_folder=str(runs[1].parent / other), ended="2027")
    compared = compare_folders(runs, METRIC, tmp_path)
    assert read_manifest(compared)["identity"]["validations"] == {"large": str(validation)}
    assert pd.read_csv(compared / "comparison.csv")["ppl_ratio"].notna().tolist() == [False, True]


def test_the_columns_that_are_printed(tmp_path, capsys, blank_figures):
    for name in ("small", "large"):
        write_validation(write_run(tmp_path / name, name), name)
    compare_folders([tmp_path / "small", tmp_path / "large"], METRIC, tmp_path)
    header, *rows, pairs, pair, where = capsys.readouterr().out.splitlines()
    assert pairs.split() == ["metric", "first", "second", "top_k_cosine", "score_spearman", "n_cells"]
    assert pair.split() == [METRIC, "small", "large", "1.000", "1.000", "26"]
    assert where == f"comparison: {next(tmp_path.glob('comparison_*'))}/comparison.csv"
    columns = "metric model k baseline_ppl top_k_score_share top_fraction_score_share gini_layers ppl_ratio"
    assert header.split() == [*columns.split(), "equal_fraction", "ppl_ratio_at_equal_fraction"]
    assert rows[0].split()[:4] == [METRIC, "small", "100", "20.1"]


def test_the_largest_list_of_weights_is_compared(tmp_path, blank_figures):
    for name in ("small", "large"):
        synthetic.top_weights(k=10).to_csv(write_run(tmp_path, name) / f"top_10_weights_{METRIC}.csv", index=False)
    assert pd.read_csv(compare_folders([tmp_path], METRIC, tmp_path) / "comparison.csv")["k"].tolist() == [100, 100]


def test_the_newest_run_of_a_model_and_its_newest_validation_are_compared(tmp_path, blank_figures):
    other = write_run(tmp_path / "other", "large")
    runs = [write_run(tmp_path / "one", f"small{number}") for number in range(3)]
    for folder, ended in zip(runs, ("02", "03", "01"), strict=True):
        manifest = synthetic.manifest(model="org/small") | {"ended": f"2026-01-{ended}T10:00:00+0000"}
        manifest["identity"]["options"]["metric"] = [METRIC]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    validations = [
        write_validation(runs[1], number, ended=f"2026-02-{ended}T10:00:00+0000")[0]
        for number, ended in enumerate(("02", "03", "01"))
    ]
    compared = compare_folders([tmp_path / "one", other], METRIC, tmp_path)
    identity = read_manifest(compared)["identity"]
    assert identity["runs"]["small"]["folder"] == str(runs[1])
    assert identity["validations"] == {"small": str(validations[1])}
