import subprocess

import numpy as np
import pandas as pd
import pytest
from bridge import cli
from bridge.analysis.targets import choose_targets, is_restricted, render, target_names
from bridge.exchange.discovery_run import choose_discovery
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import TARGETS
from discovery_folder import make_discovery, parameters


def summary(scores, suffixes=None) -> pd.DataFrame:
    layers = [f"h.{i}" for i in range(len(scores))]
    return pd.DataFrame(
        {"layer": layers, "parameter": [f"{layer}.weight" for layer in layers], "n_weights": 9, "score_sum": scores}
    )


def top(counts: dict[int, int]) -> pd.DataFrame:
    return pd.DataFrame({"parameter": [f"h.{i}.weight" for i, count in counts.items() for _ in range(count)]})


def names(frame, role) -> list[str]:
    return frame.loc[frame["role"] == role, "target_layer"].tolist()


def test_by_count_with_ties_broken_by_score_then_model_order():
    chosen = choose_targets(top({4: 3, 1: 2, 2: 2, 3: 2}), summary([9.0, 1.0, 2.0, 1.0, 0.5, 0.1]), 5, 0)
    assert names(chosen, "top") == ["h.4", "h.2", "h.1", "h.3", "h.0"]
    assert chosen["n_top"].tolist() == [3, 2, 2, 2, 0]
    assert chosen["score_rank"].tolist() == [5, 2, 3, 4, 1]
    assert choose_targets(top({4: 3}), summary([9.0, 1.0, 2.0]), 1, 2).index.tolist() == [0, 1, 2]
    assert list(chosen.columns) == list(TARGETS.columns)


def test_by_score():
    chosen = choose_targets(top({4: 3}), summary([1.0, 5.0, 5.0, 2.0, 0.5]), 3, 0, "score")
    assert names(chosen, "top") == ["h.1", "h.2", "h.3"]
    assert chosen["score_sum"].tolist() == [5.0, 5.0, 2.0]


def test_top_layers_are_certain_and_the_others_share_one_probability():
    scores = [float(100 - i) for i in range(100)]
    chosen = choose_targets(top({0: 5, 1: 4}), summary(scores), 2, 7)
    assert names(chosen, "top") == ["h.0", "h.1"]
    assert chosen["inclusion"].tolist() == [1.0] * 2 + [7 / 98] * 7
    assert set(names(chosen, "control")).isdisjoint({"h.0", "h.1"})
    ranks = chosen.loc[chosen["role"] == "control", "score_rank"]
    assert np.diff(ranks).tolist() == [14] * 6  # every 14th of the 98 others, best first


def test_the_draw_depends_on_the_seed_alone():
    table = summary([float(i % 7) for i in range(50)])
    draws = [tuple(choose_targets(top({}), table, 0, 4, seed=seed)["target_layer"]) for seed in [0, 0, 1, 2, 3]]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 2


def test_a_single_control_is_any_of_the_others():
    """Of one kind: the start, a share of the 19 layers below the top, counts from the lowest score upwards."""
    table = summary([float(20 - i) for i in range(20)])
    ranks = [choose_targets(top({0: 1}), table, 1, 1, seed=seed)["score_rank"].tolist() for seed in range(60)]
    starts = [np.random.default_rng([seed, *b"layers"]).uniform() for seed in range(60)]
    assert ranks == [[1, 20 - int(19 * start)] for start in starts]
    assert len({rank for _, rank in ranks}) > 12


def test_kinds_are_met_in_proportion():
    table = summary([float(i) for i in range(40)])
    kinds = ["mlp.down_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj"]
    table["layer"] = [f"model.layers.{i // 4}.{kinds[i % 4]}" for i in range(40)]
    table["parameter"] = table["layer"] + ".weight"
    chosen = choose_targets(top({}), table, 0, 8, seed=3)
    assert chosen["target_layer"].str.rpartition(".")[2].value_counts().to_dict() == dict.fromkeys(
        ["down_proj", "up_proj", "q_proj", "k_proj"], 2
    )
    assert (chosen["inclusion"] == 0.2).all()
    beside_a_top = choose_targets(
        pd.DataFrame({"parameter": [table["parameter"][0]] * 3}), table.iloc[[0, 2, 6, 10, 3, 7, 11]], 1, 2
    )  # 3 queries, 3 keys are left
    assert beside_a_top["target_layer"].str.rpartition(".")[2].tolist()[0] == "down_proj"
    assert set(beside_a_top["target_layer"].str.rpartition(".")[2][1:]) == {"q_proj", "k_proj"}


def test_more_than_there_are():
    chosen = choose_targets(top({0: 1}), summary([3.0, 2.0, 1.0]), 2, 9)
    assert names(chosen, "top") == ["h.0", "h.1"]
    assert names(chosen, "control") == ["h.2"]
    assert chosen["inclusion"].tolist() == [1.0, 1.0, 1.0]
    assert len(choose_targets(top({0: 1}), summary([3.0, 2.0]), 7, 7)) == 2
    assert choose_targets(top({0: 1}), summary([3.0, 2.0]), 0, 0).empty


def test_negative_number():
    with pytest.raises(RequestError, match="cannot be negative: -1"):
        choose_targets(top({0: 1}), summary([3.0]), -1, 0)
    with pytest.raises(RequestError, match="cannot be negative: -1"):
        choose_targets(top({0: 1}), summary([3.0]), 0, -1)


def test_name_means_one_parameter_and_no_other():
    table = pd.DataFrame(
        {
            "layer": ["wte", "h.attn", "h.attn", "h.norm", "h.experts"],
            "parameter": ["wte.weight", "h.attn.weight", "h.attn.bias", "h.norm.bias", "h.experts.gate_up_proj"],
        }
    )
    assert target_names(table).tolist() == [
        "wte",
        "h.attn.weight",
        "h.attn.bias",
        "h.norm.bias",
        "h.experts.gate_up_proj",
    ]


@pytest.mark.parametrize(
    ("roles", "n_layers", "restricted"),
    [
        (["top", "top"], 3, True),
        (["top", "top"], 2, False),
        (["top", "control"], 9, False),
        (["control", "control"], 9, False),
        (["top", "all"], 2, False),
        ([], [], False),
    ],
)
def test_the_range_is_restricted_where_only_the_highest_of_more_layers_were_chosen(roles, n_layers, restricted):
    assert is_restricted(pd.DataFrame({"role": roles, "n_layers": n_layers})) is restricted


def test_render():
    chosen = choose_targets(top({1: 2}), summary([3.0, 2.0]), 2, 0)
    assert render(chosen, "env") == 'TARGET_LAYER="h.1,h.0"'
    assert render(chosen, "list") == "h.1\nh.0"
    assert render(chosen, "csv").splitlines()[1] == "h.1,top,2,2.0,2,2,1.0"


HOSTILE = [
    "h.$(touch marker).mlp",
    "h.`touch marker`.mlp",
    "h.';touch marker;'.mlp",
    'h.";touch marker;".mlp',
    "h.; touch marker #.mlp",
    'h.\\"$(touch marker).mlp',
    "h.${IFS}&touch${IFS}marker|.mlp",
    "h.\u00fcn\u00ef *?[a] ~ !! <(touch marker) >marker.mlp",
    "-h --help=$((1)).mlp",
]


def with_names(folder, layers):
    """The folder's tables with other names for its first layers."""
    names = dict(zip([name.removesuffix(".weight") for name in parameters()], layers, strict=False))
    names |= {f"{layer}.weight": f"{other}.weight" for layer, other in names.items()}
    for path in folder.glob("*.csv"):
        pd.read_csv(path).replace(names).to_csv(path, index=False)
    return folder


def printed(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["bridge", "targets", *map(str, words)])
    cli.main()


@pytest.mark.parametrize("hostile", [*([name] for name in HOSTILE), HOSTILE])
def test_evaluated_in_a_shell_the_names_are_what_they_were_and_nothing_runs(tmp_path, monkeypatch, capsys, hostile):
    folder = with_names(make_discovery(tmp_path / "out"), hostile)
    printed(monkeypatch, "--from", folder, "--top", 12)
    assignment = capsys.readouterr().out.removesuffix("\n")
    place = tmp_path / "empty"
    place.mkdir()
    for shell in ("bash", "sh"):
        words = [shell, "-c", 'export TARGET_LAYER; eval "$1"; printenv TARGET_LAYER', shell, assignment]
        done = subprocess.run(words, cwd=place, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert set(hostile) < set(done.stdout.removesuffix("\n").split(","))
        assert len(done.stdout.split(",")) == 12
        assert list(place.iterdir()) == []


def test_plain_names_stay_between_double_quotes(tmp_path, monkeypatch, capsys):
    folder = with_names(make_discovery(tmp_path), ["gpt_neox.layers.5.mlp.dense_h_to_4h"])
    printed(monkeypatch, "--from", folder, "--top", 12)
    out = capsys.readouterr().out
    assert out.startswith('TARGET_LAYER="') and out.endswith('"\n') and out.count('"') == 2
    assert "gpt_neox.layers.5.mlp.dense_h_to_4h" in out


@pytest.mark.parametrize("file", ["top_5_weights_grad_x_weight.csv", "layer_summary_grad_x_weight.csv"])
@pytest.mark.parametrize("hidden", ["\x1b]0;title\x07", "\n", "\u202e"])
def test_names_that_a_terminal_would_obey_are_refused(tmp_path, monkeypatch, capsys, file, hidden):
    folder = make_discovery(tmp_path)
    table = pd.read_csv(folder / file)
    table.replace(table["layer"][0], f"model.{hidden}.mlp").to_csv(folder / file, index=False)
    with pytest.raises(SystemExit, match="2"):
        printed(monkeypatch, "--from", folder)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.removesuffix("\n").isprintable()
    assert f"column layer 'model.{hidden.encode('unicode_escape').decode()}.mlp' has a character that is not" in err


def test_the_count_is_that_of_pandas(tmp_path):
    folder = make_discovery(tmp_path)
    path = folder / "top_20_weights_grad_x_weight.csv"
    discovery = choose_discovery([str(tmp_path)])
    chosen = choose_targets(
        discovery.top_weights("grad_x_weight", 20), discovery.summary("grad_x_weight"), 3, 0
    ).set_index("target_layer")
    counts = pd.read_csv(path)["layer"].value_counts()
    assert chosen["n_top"].to_dict() == {layer: counts[layer] for layer in chosen.index}
    assert chosen["n_top"].tolist() == counts.head(3).tolist()


def test_newest_run_of_one_model_and_a_word_about_it(tmp_path, capsys):
    make_discovery(tmp_path, "z", ended="2026-01-01")
    newest = make_discovery(tmp_path, "a", ended="2026-02-01")
    assert choose_discovery([str(tmp_path)]).folder == newest
    assert capsys.readouterr().err == f"{tmp_path} holds 2 discovery runs; the newest is critical_analysis_a\n"


def test_runs_of_several_models_are_not_chosen_between(tmp_path):
    make_discovery(tmp_path, "a")
    second = make_discovery(tmp_path, "b", model={"id": "big"})
    message = r"several models \(critical_analysis_a of tiny, critical_analysis_b of big\); name one run's folder"
    with pytest.raises(RequestError, match=message):
        choose_discovery([str(tmp_path)])
    assert choose_discovery([str(second)]).folder == second


def test_one_folder_only(tmp_path):
    with pytest.raises(RequestError, match="--from takes one folder here, not 2: a, b"):
        choose_discovery(["a", "b"])


def rewrite(path, change):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(change(lines)))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("top_5_weights_magnitude.csv", lambda lines: lines[:-1], "expected the ranks 1 to 5, it has 4 rows"),
        ("top_5_weights_magnitude.csv", lambda lines: [*lines, lines[-1]], "a weight occurs twice"),
        ("top_5_per_layer_magnitude.csv", lambda lines: lines[:-1], "expected 5 weights of model.layers.9.mlp.weight"),
        ("layer_summary_magnitude.csv", lambda lines: [*lines, lines[1]], "a parameter occurs twice"),
        ("layer_summary_magnitude.csv", lambda lines: lines[:-1], "expected 0 weights of model.layers.11.mlp.weight"),
    ],
)
def test_damaged_tables(tmp_path, file, change, message):
    folder = make_discovery(tmp_path)
    rewrite(folder / file, change)
    discovery = choose_discovery([str(tmp_path)])
    with pytest.raises(RequestError, match=message):
        discovery.top_weights("magnitude", 5), discovery.top_per_layer("magnitude", 5)


def test_score_that_is_no_number(tmp_path):
    folder = make_discovery(tmp_path)
    path = folder / "top_5_weights_magnitude.csv"
    path.write_text(path.read_text().replace(path.read_text().splitlines()[1].split(",")[-2], "nan", 1))
    with pytest.raises(RequestError, match="not a finite number"):
        choose_discovery([str(tmp_path)]).top_weights("magnitude", 5)


def test_metric_that_was_not_run(tmp_path):
    make_discovery(tmp_path)
    discovery = choose_discovery([str(tmp_path)])
    with pytest.raises(RequestError, match=r"no metric 'magnitud' \(did you mean 'magnitude'\?\)"):
        discovery.metrics(["magnitud"])
    assert discovery.metrics(["magnitude", "magnitude"]) == ["magnitude"]
    assert discovery.ks("magnitude", "per_layer") == [5, 20]


def test_manifest_without_an_identity(tmp_path):
    folder = make_discovery(tmp_path)
    (folder / "manifest.json").write_text(
        '{"schema": 1, "kind": "critical_analysis", "status": "complete", "ended": "1"}'
    )
    with pytest.raises(RequestError, match=r"manifest\.json is damaged: Object missing required field `identity`"):
        choose_discovery([str(tmp_path)])
