import numpy as np
import pytest
from bridge.analysis import bootstrap
from bridge.analysis.bootstrap import paired_bootstrap_interval


def mean_of_products(x, y, axis):
    return (x * y).mean(axis=axis)


def test_interval_is_that_of_a_loop_over_the_same_draws():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 9))
    interval = paired_bootstrap_interval([x, y], mean_of_products, np.random.default_rng(1), n_resamples=400)
    loop = np.random.default_rng(1)
    means = [np.mean(x[drawn] * y[drawn]) for drawn in loop.integers(0, 9, size=(400, 9))]
    assert [*interval] == pytest.approx(np.percentile(means, [2.5, 97.5]).tolist())


def test_interval_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    intervals = set()
    for size in (bootstrap.BLOCK_SIZE, 30, 5):  # all resamples at once, three, and less than one
        monkeypatch.setattr(bootstrap, "BLOCK_SIZE", size)
        intervals.add(paired_bootstrap_interval([x, y], mean_of_products, np.random.default_rng(1), n_resamples=50))
    assert len(intervals) == 1


def test_a_lower_level_gives_a_narrower_interval():
    x = np.arange(20.0)
    wide, narrow = (
        paired_bootstrap_interval([x, x], mean_of_products, np.random.default_rng(1), 2000, level)
        for level in (0.95, 0.5)
    )
    assert wide.low < narrow.low < narrow.high < wide.high


def test_resamples_in_which_the_statistic_is_undefined_are_left_out():
    def mean_unless_all_equal(x, axis):
        return np.where(np.ptp(x, axis=axis) > 0, x.mean(axis=axis), np.nan)

    interval = paired_bootstrap_interval([np.array([0.0, 1.0])], mean_unless_all_equal, np.random.default_rng(0), 200)
    assert interval == (0.5, 0.5)


def test_by_default_there_are_9999_resamples_and_the_interval_covers_95_percent():
    x = np.random.default_rng(0).normal(size=40)
    interval = paired_bootstrap_interval([x, x], mean_of_products, np.random.default_rng(1))
    drawn = np.random.default_rng(1).integers(0, 40, size=(9999, 40))
    expected = np.percentile((x**2)[drawn].mean(1), [2.5, 97.5]).tolist()
    assert [*interval] == pytest.approx(expected, rel=1e-12)
