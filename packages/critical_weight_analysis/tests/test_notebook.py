"""The entry point from Python: its example, and that it gives the lists of the command's own discovery."""

import doctest

import critical_weight_analysis
import pandas as pd
import pytest
from bridge.exchange.errors import RequestError
from critical_weight_analysis.discovery import discover, engine_for
from llm_perturb.evaluation.parameters import in_scope
from tiny_models import build, random_sequences, save_checkpoint


def test_the_example_is_true(tmp_path):
    save_checkpoint(tmp_path, "neox", n_layers=2)
    (test,) = doctest.DocTestFinder(recurse=False).find(
        critical_weight_analysis.discover, "discover", globs={"folder": str(tmp_path)}
    )
    assert len(test.examples) >= 5
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_it_gives_the_lists_of_the_discovery():
    model, sequences = build("llama"), random_sequences()
    expected = discover(engine_for(model), model, sequences, in_scope(model), ["grad_x_weight"], 7)
    tables = critical_weight_analysis.discover(model, sequences, k=7)
    pd.testing.assert_frame_equal(tables["grad_x_weight"], expected.rankings["grad_x_weight"].top(7))


@pytest.mark.parametrize(
    ("metrics", "k", "complaint"), [(["obdd"], 5, "did you mean 'obd'"), (["obd"], 0, "k must be from 1 to ")]
)
def test_wrong_requests(metrics, k, complaint):
    with pytest.raises(RequestError, match=complaint):
        critical_weight_analysis.discover(build("gpt2"), random_sequences(), metrics, k)
