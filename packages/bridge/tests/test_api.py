import doctest
import subprocess
import sys

import bridge
import pytest
from bridge import api, validate
from bridge.analysis import correlation
from bridge.exchange.errors import RequestError
from discovery_folder import make_discovery
from validations import options


@pytest.fixture
def outputs(tmp_path, python, no_plots, monkeypatch):
    """The folder ``outputs`` of the examples, with a discovery and its validation, in the current folder."""
    monkeypatch.chdir(tmp_path)
    make_discovery(tmp_path / "outputs")
    validate.validate(options(tmp_path / "outputs", python))
    return tmp_path / "outputs"


@pytest.mark.slow
def test_the_examples_of_the_entry_points_are_true(outputs):
    for module in (api, correlation):
        results = doctest.testmod(module)
        assert results.attempted and not results.failed


@pytest.mark.slow
def test_runs_are_loaded_by_path_and_by_name(outputs):
    folder = outputs / "validation_v"
    assert bridge.load_validation(folder).folder == folder
    assert bridge.load_validation(str(outputs)).discovery.folder == outputs / "critical_analysis_1"
    assert bridge.load_discovery(outputs).folder == outputs / "critical_analysis_1"
    with pytest.raises(RequestError, match=r"holds no complete validation_\* run"):
        bridge.load_validation(outputs / "critical_analysis_1")


@pytest.mark.slow
def test_correlations_from_python_are_those_of_the_file(outputs):
    validation = bridge.load_validation(outputs)
    table = bridge.correlate(validation.measurements(), targets=validation.targets(), sampled=validation.sampled())
    assert table["spearman"].tolist() == validation.correlations()["spearman"].tolist()


@pytest.mark.slow
def test_the_entry_points_are_imported_when_they_are_used():
    code = (
        "import sys, bridge, bridge.exchange.layout\n"
        "assert not {'scipy', 'matplotlib', 'pandas', 'fire'} & set(sys.modules)\n"
        "bridge.correlate\n"
        "assert 'scipy' in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_name_is_no_entry_point():
    with pytest.raises(AttributeError, match="module 'bridge' has no attribute 'load_everything'"):
        bridge.load_everything  # noqa: B018
    assert set(bridge.__all__) == set(api.__all__)
