import numpy as np
import pytest
import synthetic
from bridge.analysis.model_comparison import ComparedModel, compare_models

METRIC = "grad_x_weight"


def compared_model(name, n_layers=15, k=100, seed=1, **tables):
    return ComparedModel(
        name=name,
        model={"id": f"org/{name}"},
        summaries={METRIC: synthetic.summary(n_layers, seed=seed)},
        top_weights={METRIC: synthetic.top_weights(n_layers, k, seed=seed)},
        **tables,
    )


@pytest.fixture(scope="module")
def comparison():
    small = compared_model("small", measurements=synthetic.measurements(n=2))
    return compare_models([small, compared_model("large", n_layers=30, k=40, seed=9)])


def test_rankings_are_cut_to_the_smallest_k(comparison):
    assert comparison.models["k"].tolist() == [40, 40]
    first_forty = synthetic.top_weights(15, seed=1).head(40)
    down = first_forty["layer"].str.endswith("down_proj").mean()
    assert comparison.models["share mlp out"].iloc[0] == pytest.approx(down)


def test_shares_add_up_to_one(comparison):
    shares = comparison.models.filter(like="share ")
    assert shares.filter(regex="depth|outside").sum(axis=1).tolist() == pytest.approx([1, 1])
    assert shares.filter(regex="attention|mlp|norm|head|embedding|other").sum(axis=1).tolist() == pytest.approx([1, 1])


def test_concentration_is_over_the_score_of_all_weights(comparison):
    row, summary = comparison.models.iloc[0], synthetic.summary(15, seed=1)
    assert row["top_k_score_share"] == pytest.approx(
        synthetic.top_weights(15, seed=1).head(40)["score"].sum() / summary["score_sum"].sum()
    )
    assert row["n_weights"] == summary["n_weights"].sum()
    assert row["largest_layer_share"] == pytest.approx(summary["score_sum"].max() / summary["score_sum"].sum())


def test_each_row_says_what_the_model_and_its_texts_are():
    described = ComparedModel(
        name="a",
        model={"id": "org/a", "dtype": "bfloat16", "n_parameters": 7},
        corpus={"source": "some texts", "n_tokens": 5},
        summaries={METRIC: synthetic.summary()},
        top_weights={METRIC: synthetic.top_weights()},
    )
    bare = ComparedModel(name="b", summaries=described.summaries, top_weights=described.top_weights)
    columns = ["model", "model_id", "dtype", "n_parameters", "corpus", "n_tokens"]
    first, second = compare_models([described, bare]).models[columns].to_numpy(object).tolist()
    assert first == ["a", "org/a", "bfloat16", 7, "some texts", 5]
    assert second[:3] == ["b", "", ""] and second[4] == "" and np.isnan([second[3], second[5]]).all()


def test_a_model_without_any_score_has_no_shares():
    nothing = synthetic.summary().assign(score_sum=0.0), synthetic.top_weights().assign(score=0.0)
    half = synthetic.summary(2).assign(score_sum=[0.5] + [0.0] * 9 + [0.25]), synthetic.top_weights(2, k=2)
    models = [
        ComparedModel(name=name, summaries={METRIC: summary}, top_weights={METRIC: top})
        for name, (summary, top) in {"nothing": nothing, "little": half}.items()
    ]
    rows = compare_models(models).models
    assert rows[["top_k_score_share", "largest_layer_share", "gini_layers"]].iloc[0].isna().all()
    assert rows["largest_layer_share"].iloc[1] == pytest.approx(2 / 3)
    assert rows["top_k_score_share"].iloc[1] == pytest.approx(half[1]["score"].sum() / 0.75)


def test_overlap_of_a_model_with_itself_is_whole():
    pair = compare_models([compared_model("a"), compared_model("b")]).pairs.iloc[0]
    assert (pair["first"], pair["second"]) == ("a", "b")
    assert [pair["top_k_cosine"], pair["score_spearman"]] == pytest.approx([1, 1])


def test_by_default_the_metrics_that_every_model_has_are_compared_in_the_order_of_the_first():
    tables = [synthetic.summary(), synthetic.top_weights()]
    models = []
    for name, metrics in (("a", ("obd", "only_a", "magnitude")), ("b", ("only_b", "magnitude", "obd"))):
        summaries, top_weights = (dict.fromkeys(metrics, table) for table in tables)
        models.append(ComparedModel(name=name, summaries=summaries, top_weights=top_weights))
    compared = compare_models(models)
    assert compared.models[["metric", "model"]].to_numpy().tolist() == [
        ["obd", "a"],
        ["obd", "b"],
        ["magnitude", "a"],
        ["magnitude", "b"],
    ]
    assert compare_models(models, ["magnitude"]).models["metric"].tolist() == ["magnitude"] * 2


def test_robustness_at_an_equal_fraction():
    measured = synthetic.measurements(n=2)
    models = [compared_model(name, seed=seed, measurements=measured) for seed, name in enumerate("abc", start=1)]
    models.append(compared_model("unmeasured"))
    table = compare_models(models).models
    assert table.pop("model").tolist() == ["a", "b", "c", "unmeasured"]
    assert table["ppl_ratio_at_equal_fraction"].isna().tolist() == [False, False, False, True]
    table = table.iloc[:3]
    assert table["ppl_ratio_at_equal_fraction"].tolist() == pytest.approx(table["ppl_ratio"].tolist())
    assert (table["equal_fraction"] == table["ablation_k"] / table["n_weights"]).all()


def test_robustness_is_that_of_the_models_that_have_a_validation(comparison):
    measured, unmeasured = comparison.models.to_dict("records")
    assert measured["ppl_ratio_low"] < measured["ppl_ratio"] < measured["ppl_ratio_high"]
    assert measured["random_ppl_ratio"] == pytest.approx(1, abs=0.01)
    assert np.isnan(unmeasured["ppl_ratio"])
    assert "equal_fraction" not in comparison.models


def test_beyond_the_top_k_the_sampled_weights_tell_the_share_of_the_score():
    """Of 400,000 weights the highest 0.01 % are 40, of which ten are ranked."""
    summary = synthetic.summary(4).assign(n_weights=20_000)
    top = synthetic.top_weights(4, k=10).assign(score=np.arange(10.0, 0, -1))
    sampled = synthetic.sampled(2, metrics=(METRIC,)).assign(**{f"score_{METRIC}": [1.0, 1.0]})
    model = {"name": "a", "summaries": {METRIC: summary}, "top_weights": {METRIC: top}}
    without, with_ranks = (
        ComparedModel(**model, sampled=table)
        for table in (sampled, sampled.assign(**{f"share_{METRIC}": [2e-5, 2e-4]}))
    )
    shares = [compare_models([each, each]).models["top_fraction_score_share"].iloc[0] for each in (without, with_ranks)]
    n_top = round(1e-4 * summary["n_weights"].sum())
    assert np.isnan(shares[0])
    assert shares[1] == pytest.approx(min(1.0, (55 + n_top - 10) / summary["score_sum"].sum()))
