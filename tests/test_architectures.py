"""A dozen families of ``nox -s architectures``, and that its comparison sees what is wrong."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from architectures import examine, reference, subject, tiny
from architectures.configurations import MODEL_TYPES
from architectures.examine import Result
from architectures.table import write_page

FAMILIES = [
    "bloom", "deepseek_v2", "falcon", "gemma", "glm4_moe", "gpt2", "gpt_neox", "llama", "mixtral", "mpt", "openai-gpt",
    "opt", "phi",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_discovery_and_instrument_agree_with_autograd_and_zeroing(family):
    result = examine.examine(family, float32=False)
    assert result.problems == []
    assert (result.discovery, result.streamed) == ("layer by layer", "layer by layer")
    assert result.instrument == "batch 1; batch 4; "
    assert result.difference < 1e-4


@pytest.mark.slow
def test_a_type_that_is_run_as_a_whole_is_compared_and_says_why():
    result = examine.examine("git", float32=False)
    assert result.problems == []
    assert result.discovery == "whole model"
    assert result.reason


def test_the_reference_is_the_difference_quotient(tmp_path):
    """A check of the reference itself: dL/dθ is what the loss does when θ is moved a little."""
    built, sequences = tiny.build("gpt2"), tiny.sequences()
    tiny.save(built, tmp_path)
    model, name, at = reference.in_float64(built, tmp_path), "transformer.h.1.mlp.c_fc.weight", (3, 5)
    grad = reference.sums(model, sequences)[name].grad[at].item()
    n_tokens = sum(len(ids) - 1 for ids in sequences)
    totals = []
    for step in (1e-5, -2e-5):
        model.get_parameter(name)[at] += step
        totals.append(reference.losses(model, sequences).sum().item() / n_tokens)
    assert grad == pytest.approx((totals[0] - totals[1]) / 2e-5, rel=1e-6)


def one_gradient_off(loaded, engine, sequences, batches):
    for each in plain_passes(loaded, engine, sequences, batches):
        stream = (
            replace(one, grad=one.grad + 1e-3 * one.grad.abs().max()) if one.name.endswith("k_proj.weight") else one
            for one in each.stream
        )
        yield replace(each, stream=stream)


def one_parameter_missing(loaded, engine, sequences, batches):
    for each in plain_passes(loaded, engine, sequences, batches):
        yield replace(each, stream=(one for one in each.stream if one.name != "model.norm.weight"))


def one_effect_off(*arguments):
    for at, (name, index, losses) in enumerate(plain_losses(*arguments)):
        yield name, index, losses + 1e-3 * (at == 5)


plain_passes, plain_losses = subject.passes, subject.perturbed_losses


WRONG_GRADIENT = r"grad of model.*k_proj\.weight: relative difference 1\.0e"
WRONG_EFFECT = r"instrument, batch \d: .* relative difference"


def test_wrong_numbers_of_discovery_and_instrument_are_problems(monkeypatch):
    monkeypatch.setattr(subject, "passes", one_gradient_off)
    monkeypatch.setattr(subject, "perturbed_losses", one_effect_off)
    problems = examine.examine("llama", float32=False).problems
    for message in (WRONG_GRADIENT, WRONG_EFFECT):
        assert any(re.search(message, problem) for problem in problems)
    assert all(re.search(f"{WRONG_GRADIENT}|{WRONG_EFFECT}", problem) for problem in problems)


def test_a_missing_parameter_is_a_problem(monkeypatch):
    monkeypatch.setattr(subject, "passes", one_parameter_missing)
    monkeypatch.setattr(examine, "BATCHES", ())  # the instrument has nothing to do with it
    problems = examine.examine("llama", float32=False).problems
    assert problems
    assert all(re.search(r"other parameters: \['model\.norm\.weight'\]", problem) for problem in problems)


def test_a_traceback_is_a_problem_and_a_refusal_is_not(monkeypatch):
    def broken(*arguments):
        raise AssertionError("layers make other calls")

    monkeypatch.setattr(subject, "engine_of", broken)
    result = examine.examine("bert", float32=False)  # a decoder here
    assert [problem.split(":")[0] for problem in result.problems] == ["discovery", "streamed"]
    assert "AssertionError at test_architectures.py: layers make other calls" in result.problems[0]


def test_the_page_has_a_row_for_every_type(tmp_path):
    page = (ROOT / "docs/architectures.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \|", page, re.MULTILINE)
    assert rows == MODEL_TYPES
    assert [row for row in page.splitlines() if row.startswith("| `") and "**" in row] == []
    results = [
        Result("one", "layer by layer", streamed="layer by layer", instrument="batch 1; batch 4; ", difference=2e-9),
        Result("two", "whole model", reason="a | b", streamed="not", problems=["x"], difference=0.1, difference32=0.2),
        Result("three", reason="too large"),
    ]
    write_page(tmp_path / "page.md", results, {"torch": "2", "transformers": "5"})
    text = (tmp_path / "page.md").read_text()
    assert "3 model types: 1 layer by layer, 1 whole model, 0 refused, 1 not built; 1 streamed; 1 wrong." in text
    assert text.splitlines()[-3:] == [
        "| `one` | layer by layer | yes | yes | 2e-09 |  |  |",
        "| `two` | whole model | not |  | 1e-01 | 2e-01 | a \\| b; **x** |",
        "| `three` | not built |  |  |  |  | too large |",
    ]
