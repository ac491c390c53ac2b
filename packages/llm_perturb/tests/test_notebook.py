"""The entry points from Python: their examples, and that a model is restored bit for bit."""

import doctest

import llm_perturb
import pandas as pd
import pytest
import torch
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import TOP_WEIGHTS
from llm_perturb import notebook
from llm_perturb.perturbation import Perturbation
from reference import every_bit, naive_losses, zeroed
from tiny_models import build, save_checkpoint

MATRIX = "transformer.h.0.mlp.c_fc.weight"


def index_of(model, *pairs):
    n_columns = model.get_parameter(MATRIX).shape[1]
    return [row * n_columns + col for row, col in pairs]


def test_the_examples_are_true(tmp_path):
    save_checkpoint(tmp_path, "neox", n_layers=2)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = {"llm_perturb": llm_perturb, "folder": str(tmp_path)}
    for name in llm_perturb.__all__:
        examples = finder.find(getattr(llm_perturb, name), name, globs=names)
        assert sum(len(test.examples) for test in examples) >= 3
        for test in examples:
            runner.run(test)
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("form", ["table", "path", "mask"])
def test_a_perturbed_model_has_the_losses_of_a_rewritten_one_and_then_its_own_bits(form, sequences, tmp_path):
    model = build("gpt2")
    before = every_bit(model)
    pairs = [(0, 1), (2, 3)]
    table = pd.DataFrame({"parameter": MATRIX, "row": [row for row, _ in pairs], "col": [col for _, col in pairs]})
    if form == "table":
        weights = table
    elif form == "mask":
        weights = {MATRIX: torch.zeros_like(model.get_parameter(MATRIX), dtype=torch.bool)}
        for row, col in pairs:
            weights[MATRIX][row, col] = True
    else:
        table["value"] = [model.get_parameter(MATRIX)[row, col].item() for row, col in pairs]
        weights = tmp_path / "weights.csv"
        table.assign(rank=[1, 2], layer="transformer.h.0.mlp.c_fc", score=1.0)[list(TOP_WEIGHTS.columns)].to_csv(
            weights, index=False
        )
    with llm_perturb.perturbed(model, weights, "zero") as n_changed:
        losses = naive_losses(model, sequences)
    assert n_changed == 2
    torch.testing.assert_close(losses, naive_losses(zeroed(model, {MATRIX: index_of(model, *pairs)}), sequences))
    assert every_bit(model) == before


def test_a_model_is_restored_after_an_error():
    model = build("gpt2")
    before = every_bit(model)
    mask = torch.ones_like(model.get_parameter(MATRIX), dtype=torch.bool)
    with pytest.raises(KeyError, match="mine"), llm_perturb.perturbed(model, {MATRIX: mask}, "gaussian_noise"):
        assert every_bit(model) != before
        raise KeyError("mine")
    assert every_bit(model) == before


def test_a_weight_named_twice_or_by_a_tied_name_is_one_weight():
    model = build("gpt2")
    name = next(name for name, first in notebook.all_names(model).items() if name != first)
    table = pd.DataFrame({"parameter": [name, name], "row": [1, 1], "col": [2, 2]})
    with llm_perturb.perturbed(model, table, Perturbation("scale", factor=2.0)) as n_changed:
        assert n_changed == 1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (pd.DataFrame({"parameter": ["nothing"], "row": [0], "col": [0]}), "the model has no parameter 'nothing'"),
        (pd.DataFrame({"parameter": [MATRIX], "row": [0], "col": [10**6]}), f"outside of {MATRIX}, whose shape is"),
        (pd.DataFrame({"parameter": [MATRIX], "row": [0]}), "lacks the column col"),
        (pd.DataFrame({"parameter": [], "row": [], "col": []}), "no weight to perturb"),
        ({"nothing": torch.ones(1, dtype=torch.bool)}, "the model has no parameter 'nothing'"),
        ({MATRIX: torch.ones(2, 2, dtype=torch.bool)}, r"must be boolean of shape \(.*\), not torch\.bool of \(2, 2\)"),
        ({}, "no weight to perturb"),
    ],
)
def test_weights_that_the_model_does_not_have_are_refused(weights, message):
    with pytest.raises(RequestError, match=message), llm_perturb.perturbed(build("gpt2"), weights):
        pytest.fail("the block ran")


def test_texts_and_a_data_set_exclude_each_other(tmp_path):
    save_checkpoint(tmp_path, "neox", n_layers=1)
    loaded = llm_perturb.load_model(str(tmp_path), device="cpu")
    with pytest.raises(RequestError, match="exclude each other"):
        llm_perturb.load_corpus(loaded, ["one text"], data_file="other.txt")


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = llm_perturb.nothing
