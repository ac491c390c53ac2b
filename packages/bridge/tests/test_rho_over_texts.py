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
    effects /= 1e5  # so small that any number in place of what is missing would change the order
    smallest = int(np.argmin(scores))
    for value, texts in ((np.inf, [3]), (np.nan, [3]), (np.inf, [3, 5])):
        broken = effects.copy()
        broken[smallest, texts] = value
        ranked = np.where(np.arange(30) == smallest, 1e9, effects.sum(1))
        rho, low, high = rho_over_texts(scores, broken, tokens)
        assert rho == pytest.approx(stats.spearmanr(scores, ranked).statistic)
        replicates = []
        for text in range(12):
            summed = np.delete(effects, text, axis=1).sum(1) / np.delete(tokens, text).sum()
            if texts != [text]:
                summed[smallest] = 1e9
            replicates.append(np.arctanh(stats.spearmanr(scores, summed).statistic))
        half = stats.t.ppf(0.975, 11) * np.sqrt(11 / 12 * ((replicates - np.mean(replicates)) ** 2).sum())
        assert [low, high] == pytest.approx(np.tanh(np.arctanh(rho) + np.array([-half, half])))


def test_an_order_that_every_text_gives_is_certain():
    scores = np.arange(8.0)
    effects = np.outer(scores, np.arange(1.0, 8))
    for sign in (1, -1):
        rho, low, high = rho_over_texts(scores, sign * effects, np.ones(7))
        assert [rho, low, high] == pytest.approx([sign] * 3, rel=1e-11)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_rho_of_one_is_taken_as_one_less_a_trifle(sign):
    """Without one of the texts the first two layers change places: rho 1 for all texts and for all sets but one."""
    effects = np.outer(np.arange(8.0), np.ones(7))
    effects[1, 3] += 5
    effects[0] += 1.5
    rho, low, high = rho_over_texts(np.arange(8.0), sign * effects, np.ones(7))
    swapped = 1 - 6 * 2 / (8 * 63)
    replicates = np.arctanh([1 - 1e-12] * 6 + [swapped])
    half = stats.t.ppf(0.975, 6) * np.sqrt(6 / 7 * ((replicates - replicates.mean()) ** 2).sum())
    ends = np.arctanh(1 - 1e-12) + np.array([-half, half])
    assert rho == pytest.approx(sign)
    assert np.arctanh(low if sign > 0 else -high) == pytest.approx(ends[0], rel=1e-6)
    assert 1 - abs(high if sign > 0 else low) < 1e-12


def test_fewer_than_six_texts_have_no_interval():
    scores, effects, tokens = world(n_texts=5)
    rho, low, high = rho_over_texts(scores, effects, tokens)
    assert np.isfinite(rho) and np.isnan([low, high]).all()


@pytest.mark.parametrize("n_texts", [6, 10])
def test_exactly_so_many_texts_have_an_interval(n_texts):
    rho, low, high = rho_over_texts(*world(n_texts=n_texts))
    assert low < rho < high
