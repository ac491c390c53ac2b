from dataclasses import replace

import pandas as pd
import pytest
import synthetic
from bridge.report.caveats import caveats


@pytest.fixture(scope="module")
def example():
    return synthetic.evidence()


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"n": 6}, "Only 6 layers tested"),
        ({"n_control": 0}, "range is restricted"),
        ({"n": 5}, "Only 5 layers tested: rho has no interval, and nothing is claimed (at least 6)"),
        (
            {"sampled": synthetic.sampled(9)},
            "The 9 single weights were drawn over the ranks",
        ),
        ({"seeds": (0,)}, "only 1 random draw; with 1 no p-value of a single layer can be below 0.50 (19 are needed)"),
        ({"seeds": ()}, "only 0 random draws."),
    ],
)
def test_caveats_name_what_weakens_the_result(change, limit):
    assert any(limit in text for text in caveats(synthetic.evidence(**change)))


def test_caveats_of_the_corpus_and_the_manifests(example):
    table = example.measurements.assign(n_sequences=4, n_weights=20, n_changed=12, corpus_sha256="00")
    manifest = synthetic.manifest("validation") | {"warnings": ["the corpus is short"]}
    text = "\n".join(caveats(replace(example, measurements=table, validation_manifest=manifest)))
    assert "With 4 texts no interval of an effect is given (at least 6)." in text
    assert "Damage that strikes fewer than 53 % of texts may be unseen: 4 texts" in text  # 1 - 0.05^(1/4)
    assert "fewer than k weights were perturbed" in text
    assert "some of the chosen weights have the same value under the perturbation" in text
    assert "other token sequences" in text
    assert "Warning of the validation: the corpus is short" in text
    assert "model.embed_tokens.weight = lm_head.weight" in text
    assert "same texts" in "\n".join(caveats(example))
    assert "the same value under" not in "\n".join(caveats(replace(example, measurements=table.assign(n_changed=20))))
    assert "fewer than 3.0 % of texts may be unseen: 100 texts" in "\n".join(caveats(example))


def test_measurements_that_few_texts_make_are_counted(example):
    table = example.measurements.assign(n_clusters=12, n_eff=2.0, few_texts_decide=0)
    table.loc[table.index[:3], "few_texts_decide"] = 1
    (text,) = [text for text in caveats(replace(example, measurements=table)) if "quarter" in text]
    assert text.startswith(f"In 3 of {len(table)} measurements fewer than a quarter of the texts make the effect")
    assert any("12 texts may all have missed it" in text for text in caveats(replace(example, measurements=table)))
    assert not any("quarter" in text for text in caveats(example))


def test_a_model_of_few_layers_has_no_restricted_range():
    example = synthetic.evidence(n_control=0)
    every = replace(example, targets=example.targets.assign(n_layers=12))
    assert any("range is restricted" in text for text in caveats(example))
    assert not any("range is restricted" in text for text in caveats(every))


def test_single_weights_are_of_a_design():
    texts = caveats(synthetic.evidence(sampled=synthetic.sampled(40)))
    assert any("The 40 single weights were drawn over" in text and "a figure of this design" in text for text in texts)


def test_stability_of_the_ranking_is_told_where_it_was_measured():
    rows = [("halves", 10, 0.25), ("halves", 10, 0.5), ("halves", 100, 0.9), ("seeds", 10, 0.7)]
    table = pd.DataFrame(rows, columns=["kind", "k", "jaccard"]).assign(jaccard_chance=1e-6)
    table["jaccard_null"] = [0.125, 0.375, 0.5, 0.5]
    example = synthetic.evidence()
    texts = caveats(replace(example, stability=table.assign(metric=example.metric, other=example.metric)))
    (text,) = [text for text in texts if "Jaccard" in text]
    assert f"the top 10 by {example.metric} of two random halves" in text
    assert "0.25 to 0.50 (2 splits; " in text
    assert "the same weights with gradients of other weights give 0.25, random sets 1.0×10⁻⁶)" in text
    assert caveats(replace(example, stability=table.assign(metric="another"))) == caveats(example)
    same = table.assign(metric=example.metric, other=example.metric, jaccard=1.0)
    (text,) = [text for text in caveats(replace(example, stability=same)) if "Jaccard" in text]
    assert "hardly depends on the texts" in text and "overlap of 1.00 (2 splits" in text


def test_exactly_six_texts_have_intervals_and_exactly_ten_layers_no_rough_one(example):
    text = "\n".join(caveats(replace(example, measurements=example.measurements.assign(n_sequences=6))))
    assert "6 texts may all have missed it" in text and "no interval of an effect" not in text
    names = synthetic.layer_names(10)
    ten, nine = (
        replace(example, measurements=example.measurements[example.measurements["target_layer"].isin(names[:n])])
        for n in (10, 9)
    )
    assert not any("is rough" in text for text in caveats(ten))
    assert "Only 9 layers tested: the interval of rho is rough." in caveats(nine)
