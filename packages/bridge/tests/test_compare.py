import json

import numpy as np
import pandas as pd
import pytest
import reference
import synthetic
from bridge.analysis.profiles import cosine, gini, profiles_of, rank_agreement, score_profiles
from bridge.compare import compare, compare_folders, robustness
from bridge.exchange.errors import RequestError
from bridge.exchange.run_folder import read_manifest
from discovery_folder import make_discovery

METRIC = "grad_x_weight"


def run(name, n_layers=15, k=100, seed=1):
    summary, top = synthetic.summary(n_layers, seed=seed), synthetic.top_weights(n_layers, k, seed=seed)
    return name, synthetic.manifest(model=f"org/{name}"), {METRIC: summary}, {METRIC: top}


@pytest.fixture(scope="module")
def comparison():
    return compare(
        [run("small"), run("large", n_layers=30, k=40, seed=9)], validations={"small": synthetic.measurements(n=2)}
    )


def test_rankings_are_cut_to_the_smallest_k(comparison):
    assert comparison.models["k"].tolist() == [40, 40]
    first_forty = synthetic.top_weights(15, seed=1).head(40)
    down = first_forty["layer"].str.endswith("down_proj").mean()
    assert comparison.models["share mlp out"].iloc[0] == pytest.approx(down)


def test_shares_add_up_to_one(comparison):
    shares = comparison.models.filter(like="share ")
    assert shares.filter(regex="depth|outside").sum(axis=1).tolist() == pytest.approx([1, 1])
    assert shares.filter(regex="attention|mlp|norm|head|embedding|other").sum(axis=1).tolist() == pytest.approx([1, 1])


def test_depth_is_relative():
    top = pd.DataFrame({"rank": [1, 2], "parameter": ["model.layers.3.mlp.up_proj.weight"] * 2, "row": 0, "col": 0})
    shallow, deep = profiles_of([top, top], [synthetic.summary(4), synthetic.summary(40)])
    assert shallow.loc["mlp in", "depth 5 of 5"] == 1
    assert deep.loc["mlp in", "depth 1 of 5"] == 1


def test_fused_projections_make_one_component_for_all_models():
    llama = pd.DataFrame({"parameter": ["model.layers.0.self_attn.q_proj.weight"], "row": 0, "col": 0})
    neox = pd.DataFrame({"parameter": ["gpt_neox.layers.0.attention.query_key_value.weight"], "row": 0, "col": 0})
    summaries = [
        synthetic.summary(2),
        pd.DataFrame({"parameter": neox["parameter"], "n_weights": [12], "score_sum": [1.0]}),
    ]
    profiles = profiles_of([llama, neox], summaries)
    assert [profile.loc["attention query_key_value"].sum() for profile in profiles] == [1, 1]
    alone = profiles_of([llama, llama], [summaries[0]] * 2)[0]
    assert alone.loc["attention query"].sum() == 1


def test_neox_projections_are_told_apart_by_the_heads_of_the_manifest():
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    top = pd.DataFrame({"parameter": [name] * 4, "row": [0, 9, 47, 24], "col": 0})  # two heads of 8
    summary = pd.DataFrame({"parameter": [name], "n_weights": [48 * 16], "score_sum": [1.0]})
    facts = {"num_attention_heads": 2, "head_dim": 8}
    profile = profiles_of([top], [summary], [facts])[0].sum(axis=1)
    assert profile[["attention query", "attention key", "attention value"]].tolist() == [0.5, 0.25, 0.25]
    assert profiles_of([top], [summary])[0].loc["attention query_key_value"].sum() == 1


def test_gpt2_projections_are_told_apart_by_column():
    name = "transformer.h.0.attn.c_attn.weight"
    top = pd.DataFrame({"parameter": [name] * 4, "row": 0, "col": [0, 64, 128, 191]})
    summary = pd.DataFrame({"parameter": [name], "n_weights": [3 * 64 * 64], "score_sum": [1.0]})
    profile = profiles_of([top], [summary])[0].sum(axis=1)
    assert profile[["attention query", "attention key", "attention value"]].tolist() == [0.25, 0.25, 0.5]


@pytest.mark.parametrize("values", [[1, 1, 1], [0, 0, 5], [1, 2, 3, 10], [0.1, 7, 7, 0, 2]])
def test_gini_is_half_the_relative_mean_difference(values):
    assert gini(np.array(values)) == pytest.approx(reference.gini(values))


def test_gini_of_nothing_is_undefined():
    assert np.isnan(gini(np.zeros(3)))


def test_concentration_is_over_the_score_of_all_weights(comparison):
    row, summary = comparison.models.iloc[0], synthetic.summary(15, seed=1)
    assert row["top_k_score_share"] == pytest.approx(
        synthetic.top_weights(15, seed=1).head(40)["score"].sum() / summary["score_sum"].sum()
    )
    assert row["n_weights"] == summary["n_weights"].sum()
    assert row["largest_layer_share"] == pytest.approx(summary["score_sum"].max() / summary["score_sum"].sum())


def test_overlap_of_a_model_with_itself_is_whole():
    pair = compare([run("a"), run("b")]).pairs.iloc[0]
    assert (pair["first"], pair["second"]) == ("a", "b")
    assert [pair["top_k_cosine"], pair["score_spearman"]] == pytest.approx([1, 1])


def test_profiles_without_a_common_cell_have_cosine_zero():
    first, second = (pd.DataFrame(np.eye(2)), pd.DataFrame(1 - np.eye(2)))
    assert cosine(first, second) == 0


def test_rank_agreement_is_over_the_cells_that_both_have():
    first, second = score_profiles([synthetic.summary(15, seed=1), synthetic.summary(10, seed=2)])
    both = (first.notna() & second.notna()).to_numpy()
    rho, n_cells = rank_agreement(first, second)
    assert n_cells == both.sum() == 26
    assert rho == pytest.approx(reference.spearman(first.to_numpy()[both], second.to_numpy()[both]))
    assert np.isnan(rank_agreement(first.iloc[:0], second.iloc[:0])[0])


def test_robustness_is_the_perplexity_ratio_of_the_whole_set(comparison):
    measurements = synthetic.measurements(n=2)
    row = measurements[(measurements["target_layer"] == "ALL") & (measurements["selection"] == f"top_{METRIC}")].iloc[0]
    found = comparison.models.iloc[0]
    assert found["ppl_ratio"] == pytest.approx(row["perturbed_ppl"] / row["baseline_ppl"])
    assert found["ppl_ratio_low"] < found["ppl_ratio"] < found["ppl_ratio_high"]
    assert found["random_ppl_ratio"] == pytest.approx(1, abs=0.01)
    assert np.isnan(comparison.models["ppl_ratio"].iloc[1])
    assert robustness(measurements[measurements["target_layer"] != "ALL"], METRIC) == {}


def test_robustness_at_an_equal_fraction():
    measured = synthetic.measurements(n=2)
    found = compare([run("a"), run("b", seed=2)], validations={"a": measured, "b": measured}).models
    assert found["ppl_ratio_at_equal_fraction"].tolist() == pytest.approx(found["ppl_ratio"].tolist())
    assert (found["equal_fraction"] == found["ablation_k"] / found["n_weights"]).all()


def write_run(place, name, metrics=(METRIC,), **changes):
    folder = place / f"critical_analysis_{name}"
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
