import json
import re
from pathlib import Path

import pytest
from bridge.exchange.discovery_run import open_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.file_content import checked
from bridge.exchange.manifest import Manifest
from discovery_folder import make_discovery


def change(folder, *keys, value=None):
    """Set an entry of a manifest, or remove it."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    entries = content
    for key in keys[:-1]:
        entries = entries[key]
    if value is None:
        del entries[keys[-1]]
    else:
        entries[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["identity", "model", "id"], 7, r"Expected `str`, got `int` - at `\$\.identity\.model\.id`"),
        (["identity", "model", "id"], None, r"missing required field `id` - at `\$\.identity\.model`"),
        (["identity", "options", "metric"], "obd", r"Expected `array`, got `str` - at `\$\.identity\.options\.metric`"),
        (["identity", "corpus"], None, r"missing required field `corpus` - at `\$\.identity`"),
        (["identity", "corpus", "n_tokens"], "90", r"Expected `int`, got `str` - at `\$\.identity\.corpus\.n_tokens`"),
        (["metrics"], {"obd": 1}, r"Expected `object`, got `int` - at `\$\.metrics\[\.\.\.\]`"),
        (
            ["metrics"],
            {"obd": {"baseline": "yes"}},
            r"Expected `bool`, got `str` - at `\$\.metrics\[\.\.\.\]\.baseline`",
        ),
    ],
)
def test_wrong_entry_of_a_discovery_is_named_with_its_file(tmp_path, keys, value, message):
    folder = make_discovery(tmp_path)
    change(folder, *keys, value=value)
    with pytest.raises(RequestError, match=rf"critical_analysis_1/manifest\.json is damaged: .*{message}"):
        open_discovery(folder)


@pytest.mark.parametrize(("key", "value"), [("status", 1), ("warnings", "odd"), ("ended", 3), ("kind", [])])
def test_wrong_entry_of_any_run_is_refused(tmp_path, key, value, capsys):
    folder = make_discovery(tmp_path)
    change(folder, key, value=value)
    message = rf"manifest\.json is damaged: Expected `.*`, got `.*` - at `\$\.{key}`"
    with pytest.raises(RequestError, match=message):
        read_manifest(folder)
    with pytest.raises(RequestError, match="holds no complete critical_analysis_"):
        find_runs(tmp_path, "critical_analysis")
    assert re.search(rf"WARNING: .*{message}; {folder.name} is passed over", capsys.readouterr().err)


def test_manifest_is_an_object():
    with pytest.raises(RequestError, match=r"^m\.json is damaged: Expected `object`, got `array`$"):
        checked([], Manifest, Path("m.json"))


def test_entries_of_later_versions_are_kept_and_newer_ones_may_be_missing(tmp_path):
    folder = make_discovery(tmp_path)
    change(folder, "identity", "model", "architecture", value="gpt2")
    change(folder, "identity", "model", "dtype")
    discovery = open_discovery(folder)
    assert discovery.model["architecture"] == "gpt2"
    assert "dtype" not in discovery.model
    assert "metrics" not in discovery.manifest


def test_definitions_and_baseline_of_the_metrics_are_the_manifests(tmp_path):
    folder = make_discovery(tmp_path)
    old = open_discovery(folder)
    assert old.baseline_metric == "magnitude"
    assert old.metric_definitions["grad_x_weight"].formula == "see the discovery's manifest"
    size = {"formula": "|w|", "unit": "1", "source": "folklore", "baseline": True}
    change(folder, "metrics", value={"size": size, "grad_x_weight": {"formula": "|g w|"}})
    new = open_discovery(folder)
    assert new.baseline_metric == "size"
    assert new.metric_definitions["size"].text == "|w| (folklore); unit: 1"
    assert new.metric_definitions["grad_x_weight"].text == "|g w|"
