import numpy as np
import pytest
from bridge.analysis.rho_over_texts import rho_over_texts
from scipy import stats


def world(n_layers=30, n_texts=12, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=n_layers)
    tokens = rng.integers(20, 200, n_texts).astype(float)
    effects = tokens * (np.exp(scores)[:, None] + rng.normal(size=(n_layers, n_texts)))
    return scores, effects, tokens


def test_the_interval_is_the_jackknife_over_texts():
    scores, effects, tokens = world()
    rho, low, high = rho_over_texts(scores, effects, tokens)
    assert rho == pytest.approx(stats.spearmanr(scores, effects.sum(1) / tokens.sum()).statistic)
    without = []
    for text in range(12):
        summed = np.delete(effects, text, axis=1).sum(1) / np.delete(tokens, text).sum()
        without.append(np.arctanh(stats.spearmanr(scores, summed).statistic))
    error = np.sqrt(11 / 12 * ((np.array(without) - np.mean(without)) ** 2).sum())
    half = stats.t.ppf(0.975, 11) * error
    assert [low, high] == pytest.approx(np.tanh(np.arctanh(rho) + np.array([-half, half])))


def test_a_loss_that_overflowed_on_one_text_ranks_as_the_largest():
    scores, effects, tokens = world()
    smallest = int(np.argmin(scores))
    for value in (np.inf, np.nan):
        broken = effects.copy()
        broken[smallest, 3] = value
        ranked = np.where(np.arange(30) == smallest, 1e9, effects.sum(1))
        rho, low, high = rho_over_texts(scores, broken, tokens)
        assert rho == pytest.approx(stats.spearmanr(scores, ranked).statistic)
        assert low < rho < high


def test_fewer_than_six_texts_have_no_interval():
    scores, effects, tokens = world(n_texts=5)
    rho, low, high = rho_over_texts(scores, effects, tokens)
    assert np.isfinite(rho) and np.isnan([low, high]).all()


@pytest.mark.parametrize("n_texts", [6, 10])
def test_exactly_so_many_texts_have_an_interval(n_texts):
    rho, low, high = rho_over_texts(*world(n_texts=n_texts))
    assert low < rho < high
