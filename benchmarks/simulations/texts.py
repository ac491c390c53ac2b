"""Claims about intervals over texts, in worlds of light, heavy-tailed and rare effects."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from llm_perturb import intervals
from scipy import stats

from simulations.rates import ANY, COVERS, Rate, claim, generator


class TextWorld(NamedTuple):
    """Texts whose true effect is known.

    Attributes:
        nats: draws d_i of texts of the lengths T_i, both (..., n).
        truth: E d / E T, nats per token.
        band: what an interval must cover, from 12 texts on.
    """

    nats: Callable[[np.random.Generator, np.ndarray], np.ndarray]
    truth: float
    band: tuple[float, float]


UNEQUAL = 0.6  # standard deviation of log lengths: of 20 texts the longest is about 10 times the shortest
LENGTHS = {"equal": 0.0, "unequal": UNEQUAL}
CATASTROPHE = 0.02  # share of texts that a rare catastrophe strikes


def lengths(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> np.ndarray:
    """T_i, lognormal with a median of 128 tokens."""
    return 128 * np.exp(sigma * rng.standard_normal(shape))


def per_token(draw: Callable[[np.random.Generator, tuple], np.ndarray]) -> Callable[..., np.ndarray]:
    """Texts that each have an effect per token of their own, which is independent of their length."""
    return lambda rng, n_tokens: draw(rng, n_tokens.shape) * n_tokens


def hit_tokens(per_text: float) -> Callable[..., np.ndarray]:
    """Single tokens are hit, so many in a text of 128, each for 5 nats in the mean (exponential)."""

    def nats(rng: np.random.Generator, n_tokens: np.ndarray) -> np.ndarray:
        hits = rng.poisson(per_text / 128 * n_tokens)
        damage = 5 * rng.standard_gamma(np.maximum(hits, 1)) * (hits > 0)
        return damage + 0.001 * rng.standard_normal(n_tokens.shape) * n_tokens

    return nats


def catastrophes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """0.02 +- 0.02 nats per token, and about 3 more in one text of 50."""
    struck = rng.random(shape) < CATASTROPHE
    size = 3 * np.exp(0.3 * rng.standard_normal(shape) - 0.045)
    return 0.02 + 0.02 * rng.standard_normal(shape) + struck * size


WORLDS = {
    "light": TextWorld(per_token(lambda rng, shape: rng.normal(0.02, 0.05, shape)), 0.02, COVERS),
    "large": TextWorld(per_token(lambda rng, shape: rng.normal(4, 1.3, shape)), 4.0, COVERS),
    "t(2.5)": TextWorld(per_token(lambda rng, shape: 0.1 + 0.1 * rng.standard_t(2.5, shape)), 0.1, COVERS),
    "one token a text": TextWorld(hit_tokens(1), 5 / 128, COVERS),
    "one token in two texts": TextWorld(hit_tokens(0.5), 2.5 / 128, (0.93, 1)),
    "lognormal(1)": TextWorld(per_token(lambda rng, shape: rng.lognormal(0, 1, shape)), math.exp(0.5), (0.88, 1)),
    "lognormal(2)": TextWorld(per_token(lambda rng, shape: rng.lognormal(0, 2, shape)), math.exp(2), ANY),
    "rare catastrophes": TextWorld(per_token(catastrophes), 0.02 + 3 * CATASTROPHE, ANY),
}


def text_cells(replications: int, purpose: str, sizes: Iterable[int]) -> Iterator[tuple]:
    """World, name of its lengths, d and T of (R, n), for each world, kind of lengths and number of texts."""
    for name, world in WORLDS.items():
        for kind, sigma in LENGTHS.items():
            for n in sizes:
                rng = generator(purpose, name, kind, n)
                n_tokens = lengths(rng, (replications, n), sigma)
                yield name, kind, world.nats(rng, n_tokens), n_tokens


def covers(interval: tuple[np.ndarray, np.ndarray], truth: float) -> np.ndarray:
    """Of each interval whether the truth lies in it."""
    low, high = interval
    return (low <= truth) & (truth <= high)


@claim("texts")
def delta_nll(replications: int) -> Iterator[Rate]:
    """The 95 % interval of `delta_nll` covers the truth.

    Light: 0.02 +- 0.05 nats per token (normal). Large: 4 +- 1.3. t(2.5): 0.1 + 0.1 t. One token: single tokens are
    hit, one in the mean of a text of 128 tokens (or of two texts), for 5 nats each (exponential). Lognormal(s): the
    log of the effect per token is normal with standard deviation s. Rare catastrophes: 3 nats per token in one text
    of 50, 0.02 in the others. Unequal: the log of a text's length has standard deviation 0.6. Bands hold from 12
    texts on; lognormal(2) and rare catastrophes have none, see the next table.
    """
    for name, kind, d, n_tokens in text_cells(replications, "delta_nll", (6, 8, 12, 20, 40, 100)):
        n = d.shape[1]
        happened = covers(intervals.ratio_interval(d, n_tokens), WORLDS[name].truth)
        yield Rate(f"{name}, {kind}", f"{n}", happened, WORLDS[name].band if n >= 12 else ANY)


@claim("texts")
def warnings(replications: int) -> Iterator[Rate]:
    """What is said where few texts decide, and where rare damage may be unseen.

    `few_texts_decide` (n_eff below a quarter of the texts) is rare in light and large worlds and fires when a
    catastrophe is among the texts. Where none is, no function of the data can tell the world from a light one: the
    interval misses the truth just then. What speaks of it is `unseen_share(n)`, the share of texts that may be
    struck without any of n showing it, which is above 2 % for fewer than 149 texts.
    """
    bands = {"light": (0, 0.05), "large": (0, 0.05)}
    for name, kind, d, n_tokens in text_cells(replications, "warnings", (12, 20, 40, 100)):
        n = f"{d.shape[1]}"
        fires = intervals.few_texts_decide(d)
        if name != "rare catastrophes":
            yield Rate(f"{name}, {kind}: few texts decide", n, fires, bands.get(name, ANY))
            continue
        struck = (d / n_tokens > 0.5).any(1)
        missed = ~covers(intervals.ratio_interval(d, n_tokens), WORLDS[name].truth)
        either = fires | (intervals.unseen_share(d.shape[1]) > CATASTROPHE)
        yield Rate(f"a catastrophe among the texts, {kind}: few texts decide", n, fires[struck], (0.9, 1))
        yield Rate(f"a catastrophe among the texts, {kind}: interval covers", n, ~missed[struck], (0.93, 1))
        yield Rate(f"none among the texts, {kind}: few texts decide", n, fires[~struck])
        yield Rate(f"none among the texts, {kind}: interval covers", n, ~missed[~struck])
        yield Rate(f"interval misses, {kind}: few texts decide or unseen share above 2 %", n, either[missed], (0.9, 1))


@claim("articles of 5 windows")
def windows(replications: int) -> Iterator[Rate]:
    """Windows of one article are one cluster.

    Effects per token of windows of one article correlate (intraclass correlation 0.3 or 0.6). The interval goes by
    the column `cluster`; what it would cover if each window were a text of its own stands beside it.
    """
    for correlation in (0.3, 0.6):
        for n in (12, 20, 40):
            rng = generator("windows", correlation, n)
            article = np.repeat(rng.standard_normal((replications, n)), 5, axis=1)
            window = rng.standard_normal((replications, 5 * n))
            effects = 0.1 + 0.2 * (math.sqrt(correlation) * article + math.sqrt(1 - correlation) * window)
            n_tokens, clusters = np.full(5 * n, 256), np.repeat(np.arange(n), 5)
            by_article = intervals.ratio_interval(256 * effects, n_tokens, clusters)
            by_window = intervals.ratio_interval(256 * effects, n_tokens)
            yield Rate(f"correlation {correlation}, by article", f"{n}", covers(by_article, 0.1), COVERS)
            yield Rate(f"correlation {correlation}, by window", f"{n}", covers(by_window, 0.1))


@claim("texts")
def perplexities(replications: int) -> Iterator[Rate]:
    """The 95 % intervals of the perplexity after a change and of `delta_ppl` cover the truth.

    Loss before: 3.4 +- 0.5 nats per token of a text. The effect of a text is normal with half its mean as standard
    deviation, and correlates with the loss before (0.3), or lognormal(1). Lengths are unequal.
    """
    for effect in (1e-4, 0.01, 0.5, 2.0, 8.0):
        for shape, band in (("normal", COVERS), ("lognormal(1)", (0.87, 1))):
            for n in (12, 20, 40, 100):
                rng = generator("perplexities", effect, shape, n)
                n_tokens = lengths(rng, (replications, n), UNEQUAL)
                base, own = rng.standard_normal((2, replications, n))
                change = 1 + 0.5 * (0.3 * base + math.sqrt(0.91) * own) if shape == "normal" else np.exp(own - 0.5)
                before = (3.4 + 0.5 * base) * n_tokens
                after = before + effect * change * n_tokens
                truth = math.exp(3.4 + effect)
                happened = covers(intervals.perplexity_interval(after, n_tokens), truth)
                yield Rate(f"perplexity after {effect:g} nats, {shape}", f"{n}", happened, band)
                interval = intervals.perplexity_change_interval(before, after, n_tokens)
                yield Rate(
                    f"delta_ppl of {effect:g} nats, {shape}", f"{n}", covers(interval, truth - math.exp(3.4)), band
                )


@claim("method", fast=None)
def other_intervals(replications: int) -> Iterator[Rate]:
    """Other 95 % intervals of the same effects, for comparison.

    Texts of unequal lengths. Chosen: the interval of `delta_nll`. t: Student's, with the jackknife's standard error and
    n - 1 degrees of freedom. Hall: the transformation of t alone. Then the percentile bootstrap of texts, BCa, and the
    studentized bootstrap with a linearized standard error, 999 resamples each.
    """
    for name, kind, d, n_tokens in text_cells(min(replications, 2000), "other_intervals", (12, 40)):
        if kind == "unequal":
            methods = {"chosen": intervals.ratio_interval(d, n_tokens)} | _others(d, n_tokens)
            for method, interval in methods.items():
                yield Rate(f"{name}, {d.shape[1]} texts", method, covers(interval, WORLDS[name].truth))


def _others(d: np.ndarray, n_tokens: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ends of the intervals of Σ d / Σ T, (R,) each, by method."""
    n, estimate = d.shape[1], intervals.ratio(d, n_tokens)
    spread = intervals.jackknife_spread(intervals.ratio_changes(d, n_tokens), n_tokens)
    se, q = np.sqrt(spread.variance), stats.t.ppf(0.975, n - 1)
    skewness = spread.third / se**3
    upper, lower = (3 / skewness * (np.cbrt(1 + skewness * x - skewness**2 / 6) - 1) for x in (q, -q))
    deviations, errors = _resampled(d - estimate[:, None] * n_tokens, n_tokens)  # (B, R)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.quantile(np.where(errors > 0, deviations / errors, 0), [0.025, 0.975], axis=0)
    percentile = estimate + np.quantile(deviations, [0.025, 0.975], axis=0)
    return {
        "t": (estimate - q * se, estimate + q * se),
        "Hall": (estimate - upper * se, estimate - lower * se),
        "percentile": (percentile[0], percentile[1]),
        "BCa": _bca(estimate, deviations, skewness / 6),
        "studentized": (estimate - t[1] * se, estimate - t[0] * se),
    }


def _resampled(rest: np.ndarray, n_tokens: np.ndarray, n_resamples: int = 999) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of each resample of texts minus the estimate, and its linearized standard error, (B, R) each."""
    n = rest.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(float)  # (B, n)
    total = counts @ n_tokens.T
    deviations = counts @ rest.T / total
    squares = counts @ (rest**2).T - 2 * deviations * (counts @ (rest * n_tokens).T)
    squares += deviations**2 * (counts @ (n_tokens**2).T)
    return deviations, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total


def _bca(estimate: np.ndarray, deviations: np.ndarray, acceleration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected and accelerated percentiles (Efron 1987)."""
    n_resamples = len(deviations)
    bias = stats.norm.ppf(np.clip((deviations < 0).mean(0), 1 / n_resamples, 1 - 1 / n_resamples))
    ordered = np.sort(deviations, axis=0)
    ends = []
    for z in stats.norm.ppf([0.025, 0.975]):
        level = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        place = np.clip((level * n_resamples).astype(int), 0, n_resamples - 1)
        ends.append(estimate + np.take_along_axis(ordered, place[None], axis=0)[0])
    return ends[0], ends[1]
