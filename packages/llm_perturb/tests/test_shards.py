import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from bridge.exchange.command_line import flags
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import read_fingerprint, write_fingerprint
from bridge.exchange.run_folder import RunOptions
from llm_perturb.shards import merge

SCRIPT = Path(__file__).parents[1] / "scripts" / "merge_shards.py"
COMPLETE = ("measurements.csv", "comparisons.csv", "sequence_losses.parquet", "baseline.json")


@pytest.fixture(scope="module")
def split(tiny_command, tmp_path_factory):
    """The same request whole and in three shards."""
    folder = tmp_path_factory.mktemp("split")
    whole = tiny_command(output=folder / "whole", experiment_id="x")
    for number in (1, 2, 3):
        tiny_command(output=folder / "parts", experiment_id="x", shard=f"{number}/3")
    return whole / "perturb_x", folder / "parts"


@pytest.fixture
def parts(split, tmp_path):
    shutil.copytree(split[1], tmp_path / "parts")
    return tmp_path / "parts"


@pytest.mark.slow
def test_the_shards_make_the_table_of_the_whole_byte_for_byte(split, parts, tmp_path):
    whole, _ = split
    folder = merge([str(parts)], RunOptions(output=str(tmp_path / "merged"), experiment_id="y"))
    assert folder.name == "perturb_y"
    assert len(pd.read_csv(whole / "measurements.csv")) > 20
    for name in COMPLETE:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (folder, whole)]
    assert manifests[0]["identity"] == manifests[1]["identity"]
    assert manifests[0]["status"] == "complete"
    assert read_fingerprint(folder) == read_fingerprint(whole)
    assert manifests[0]["identity"]["fingerprint"] == read_fingerprint(parts / "shard_x_1_of_3").totals


def test_each_shard_measured_its_part_alone(split):
    whole, parts = split
    folders = sorted(parts.iterdir())
    assert [folder.name for folder in folders] == [f"shard_x_{n}_of_3" for n in (1, 2, 3)]
    sizes = [len(pd.read_csv(folder / "measurements.csv")) for folder in folders]
    assert sum(sizes) == len(pd.read_csv(whole / "measurements.csv"))
    assert min(sizes) > 0
    assert not any((folder / "comparisons.csv").exists() for folder in folders)


def test_shards_may_be_named_one_by_one_in_any_order(split, parts, tmp_path):
    names = [str(parts / f"shard_x_{n}_of_3") for n in (3, 1, 2)]
    folder = merge(names, RunOptions(output=str(tmp_path / "merged"), experiment_id="y"))
    assert (folder / "measurements.csv").read_bytes() == (split[0] / "measurements.csv").read_bytes()


def change_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(parts, tmp_path, match):
    with pytest.raises(RequestError, match=match):
        merge([str(parts)], RunOptions(output=str(tmp_path / "merged"), experiment_id="y"))
    assert list((tmp_path / "merged").iterdir()) == []


def test_a_missing_shard_is_refused(parts, tmp_path):
    shutil.rmtree(parts / "shard_x_2_of_3")
    refused(parts, tmp_path, "shard 2/3 is missing")


def test_a_shard_that_is_not_complete_is_refused(parts, tmp_path):
    change_manifest(parts / "shard_x_2_of_3", lambda m: m.update(status="running"))
    refused(parts, tmp_path, "shard 2/3 is missing, or not complete")


def test_a_shard_given_twice_is_refused(parts, tmp_path):
    shutil.copytree(parts / "shard_x_2_of_3", parts / "shard_y_2_of_3")
    refused(parts, tmp_path, "shard 2/3 is given twice")


def test_shards_of_another_request_are_refused(parts, tmp_path):
    change_manifest(parts / "shard_x_2_of_3", lambda m: m["identity"]["options"].update(max_length=7))
    refused(parts, tmp_path, "are shards of different requests")


def test_shards_of_another_model_are_refused_and_the_parameter_is_named(parts, tmp_path):
    folder = parts / "shard_x_2_of_3"
    own = read_fingerprint(folder)
    changed = replace(own, parameters_xxh3="0f", digests=own.digests | {"embed_out.weight": "1e"})
    write_fingerprint(folder, changed)
    change_manifest(folder, lambda m: m["identity"].update(fingerprint=changed.totals))
    refused(parts, tmp_path, r"are shards of different requests \(the models differ in embed_out\.weight\)")


def test_shards_of_an_earlier_version_are_merged_with_a_warning(parts, tmp_path):
    for folder in parts.iterdir():
        (folder / "fingerprint.json").unlink()
        change_manifest(folder, lambda m: m["identity"].pop("fingerprint"))
    folder = merge([str(parts)], RunOptions(output=str(tmp_path / "merged"), experiment_id="y"))
    (warning,) = (w for w in json.loads((folder / "manifest.json").read_text())["warnings"] if "fingerprint" in w)
    assert "shard_x_1_of_3 has no fingerprint" in warning
    assert not (folder / "fingerprint.json").exists()


def test_tables_of_other_columns_are_refused_and_the_difference_is_named(parts, tmp_path):
    path = parts / "shard_x_2_of_3/measurements.csv"
    pd.read_csv(path).rename(columns={"seed": "draw"}).to_csv(path, index=False)
    refused(parts, tmp_path, r"measurements\.csv has other columns .*\(it alone has draw, it lacks seed\)")


def test_losses_in_another_order_of_columns_are_refused(parts, tmp_path):
    path = parts / "shard_x_2_of_3/sequence_losses.parquet"
    losses = pd.read_parquet(path)
    losses[losses.columns[::-1]].to_parquet(path)
    refused(parts, tmp_path, r"sequence_losses\.parquet has other columns .*\(they are in another order\)")


def test_another_baseline_is_refused(parts, tmp_path):
    path = parts / "shard_x_2_of_3/baseline.json"
    path.write_text(path.read_text().replace('"nll": ', '"nll": 1'))
    refused(parts, tmp_path, "different baselines")


def test_overlapping_rows_are_refused(parts, tmp_path):
    change_manifest(parts / "shard_x_2_of_3", lambda m: m["rows"].__setitem__(0, 0))
    refused(parts, tmp_path, "overlap or leave rows out")


def test_a_table_that_lost_a_row_is_refused(parts, tmp_path):
    path = parts / "shard_x_2_of_3/measurements.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(RequestError, match="and its manifest lists"):
        merge([str(parts)], RunOptions(output=str(tmp_path / "merged"), experiment_id="y"))
    assert not (tmp_path / "merged/perturb_y/measurements.csv").exists()


def test_more_shards_than_work_is_refused(tiny_command, tmp_path):
    with pytest.raises(RequestError, match="--shard 500/500 has nothing to do"):
        tiny_command(output=tmp_path / "out", experiment_id="x", shard="500/500")
    assert not any(tmp_path.joinpath("out").glob("*"))


def test_the_command_says_where_the_table_is(split, parts, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("merge_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    words = ["--from", str(parts), "--output", str(tmp_path / "merged"), "--experiment-id", "y"]
    flags.run(module.merge, "merge_shards.py", words)
    path = tmp_path / "merged/perturb_y/measurements.csv"
    assert f"merged into {path}" in capsys.readouterr().out
    assert path.read_bytes() == (split[0] / "measurements.csv").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        flags.run(module.merge, "merge_shards.py", words)
    assert "is already complete" in capsys.readouterr().err
