"""Worlds of layers, and claims about rank agreement over layers that are drawn, measured and compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from bridge.analysis.claims import Verdict, adjusted_p_values, detectable_rho
from bridge.analysis.claims import claim as judge
from bridge.analysis.layer_sample import draw_layers
from bridge.analysis.rho_over_texts import rho_over_texts
from bridge.analysis.top_against_random import layers_above_random
from bridge.analysis.weighted_rho import rho_interval, weighted_rho
from bridge.analysis.within_kinds import kind_and_depth, within_kinds
from scipy import stats

from simulations.rates import ANY, FALSE, Rate, claim, generator

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
N_KINDS, N_DEPTHS = len(MODULES), 30
NAMES = np.array(
    [f"model.layers.{depth}.{module}" for module in MODULES for depth in range(N_DEPTHS)] + ["model.embed_tokens"]
)
KINDS = np.array([module for module in MODULES for _ in range(N_DEPTHS)] + ["embedding"])
DEPTHS = np.array([*np.tile(np.arange(N_DEPTHS, dtype=float), N_KINDS), np.nan])
N_LAYERS = len(NAMES)  # 211
SHARE_OF_KIND, SHARE_OF_DEPTH = 0.45, 0.15


@dataclass(frozen=True, kw_only=True)
class World:
    """How scores and effects of the layers of a model arise: 7 kinds of matrix at 30 depths, and an embedding.

    Attributes:
        rho: rank correlation of score and effect within kind and depth, for every metric.
        alike: "" if layers are independent; "own kinds": scores and effects differ by kind, each in its own way; "same
            kinds": both in the same way.
        depth: "" for no course over depth, "rough" for depths that are independent, "smooth" for a random walk.
        unbounded: share of the effects that are infinite.
        one_kind: whether only layers of one kind of matrix are measured.
    """

    rho: float = 0.0
    alike: str = ""
    depth: str = ""
    unbounded: float = 0.0
    one_kind: bool = False

    def __str__(self) -> str:
        parts = [self.alike or ("layers of one kind" if self.one_kind else "independent layers")]
        parts += [f"{self.depth} depth"] if self.depth else []
        return ", ".join(parts + ([f"{self.unbounded:.0%} infinite"] if self.unbounded else []))

    def draw(self, rng: np.random.Generator, n_metrics: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Scores and effects of all layers, (metrics, layers) each. Effects of several metrics' sets are alike."""
        by_kind = _standard(rng.normal(size=N_KINDS))
        common = rng.normal(size=N_LAYERS)
        pearson = 2 * np.sin(np.pi * self.rho / 6)
        scores, effects = [], []
        for _ in range(n_metrics):
            own = rng.normal(size=N_LAYERS)
            effect = 0.8 * common + 0.6 * rng.normal(size=N_LAYERS)
            score = pearson * effect + np.sqrt(1 - pearson**2) * own
            scores.append(self._mixed(rng, score, by_kind))
            effects.append(self._mixed(rng, effect, by_kind))
        all_effects = np.array(effects)
        all_effects[rng.uniform(size=all_effects.shape) < self.unbounded] = np.inf
        return np.array(scores), all_effects

    def _mixed(self, rng: np.random.Generator, own: np.ndarray, by_kind: np.ndarray) -> np.ndarray:
        """A part alike by kind (45 % of the variance), one alike by depth (15 %), the layer's own for the rest."""
        kind, depth = SHARE_OF_KIND * bool(self.alike), SHARE_OF_DEPTH * bool(self.depth)
        kinds = by_kind if self.alike == "same kinds" else _standard(rng.normal(size=N_KINDS))
        steps = rng.normal(size=N_DEPTHS)
        depths = _standard(np.cumsum(steps) if self.depth == "smooth" else steps)
        shared = np.sqrt(kind) * np.repeat(kinds, N_DEPTHS) + np.sqrt(depth) * np.tile(depths, N_KINDS)
        mixed: np.ndarray = np.append(shared, 0.0) + np.sqrt(1 - kind - depth) * own
        return mixed


def _standard(values: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = (values - values.mean()) / values.std()
    return scaled


@claim("layers", fast={"cases": ((40, ""), (40, "own kinds"))}, cost=10)
def permutations(
    replications: int, cases: tuple = tuple(product((10, 20, 40, 211), ("", "own kinds", "same kinds")))
) -> Iterator[Rate]:
    """Shuffles within kinds find no agreement in noise, shuffles over all layers do.

    Share of p < 0.05 where score and effect have nothing in common, or nothing but the kind of matrix (45 % of the
    variance) and a smooth course over depth (15 %). Over all layers: the p-value of scipy's Spearman test, which is not
    used where there are kinds.
    """
    for n, alike in cases:
        world = World(alike=alike, depth="smooth" if alike else "")
        rng = generator("permutations", world, n)
        within, over_all = np.zeros(replications), np.zeros(replications)
        for at in range(replications):
            scores, effects = world.draw(rng)
            layers = draw_layers(scores[0], KINDS, n, rng).chosen
            x, y = scores[0][layers], effects[0][layers]
            within[at] = within_kinds(x, y, KINDS[layers], DEPTHS[layers], rng, n_resamples=199).p_value
            over_all[at] = stats.spearmanr(x, y).pvalue
        yield Rate(f"{world}: within kinds", f"{n}", within < 0.05, (0, 0.06))
        yield Rate(f"{world}: over all layers", f"{n}", over_all < 0.05)


@claim("layers", fast={"cases": ((40, ""),)}, cost=10)
def smallest_detectable(
    replications: int, cases: tuple = tuple(product((16, 20, 40, 211), ("", "own kinds")))
) -> Iterator[Rate]:
    """The smallest rho that is said to be seen with 80 % power is seen about so often.

    Score and effect agree within kinds by that rho; the claim is that of one analysis that was named beforehand.
    """
    for n, alike in cases:
        depths_and_kinds = kind_and_depth(list(KINDS[:: N_LAYERS // n][:n]), list(DEPTHS[:: N_LAYERS // n][:n]))
        rho = detectable_rho(n, int(np.linalg.matrix_rank(depths_and_kinds)))
        world = World(rho=rho, alike=alike)
        rng = generator("detectable", alike, n)
        claimed = np.zeros(replications, dtype=bool)
        for at in range(replications):
            scores, effects = world.draw(rng)
            layers = draw_layers(scores[0], KINDS, n, rng).chosen
            agreement = within_kinds(
                scores[0][layers], effects[0][layers], KINDS[layers], DEPTHS[layers], rng, n_resamples=199
            )
            result = agreement.result
            claimed[at] = judge(result.rho, agreement.p_value, n, result.n_fitted).verdict is Verdict.BETTER
        yield Rate(f"{world}", f"{n}", claimed, (0.7, 0.95))


@claim("layers", fast={"sizes": (40,)}, cost=10)
def absence(replications: int, sizes: tuple = (40, 100, 211)) -> Iterator[Rate]:
    """Agreement is seldom called absent where it is as large as the margin.

    True rho within kinds 0.2 (the margin, where the claim is false) or 0.
    """
    for rho, n in product((0.2, 0.0), sizes):
        rng = generator("absence", rho, n)
        absent = np.zeros(replications, dtype=bool)
        for at in range(replications):
            scores, effects = World(rho=rho).draw(rng)
            layers = draw_layers(scores[0], KINDS, n, rng).chosen
            covariates = kind_and_depth(list(KINDS[layers]), list(DEPTHS[layers]))
            result = weighted_rho(scores[0][layers], effects[0][layers], covariates=covariates)
            interval = rho_interval(result, np.ones(n))
            ends = (interval.low, interval.high)
            absent[at] = judge(result.rho, 1.0, n, result.n_fitted, interval=ends).verdict is Verdict.ABSENT
        yield Rate(f"rho {rho:g}", f"{n}", absent, FALSE if rho else ANY)


@claim("layers drawn", fast=None, cost=20)
def drawn_layers(replications: int) -> Iterator[Rate]:
    """The interval of rho over all 211 layers from those drawn covers it, whichever metric they were drawn by.

    Layers are drawn over every kind and the range of the score by one of two metrics; the estimate is weighted by the
    inverse of each layer's probability.
    """
    for rho, alike in product((0.0, 0.3, 0.77), ("", "same kinds")):
        world = World(rho=rho, alike=alike, depth="smooth" if alike else "")
        for n, own in product((10, 20, 40), (True, False)):
            rng = generator("drawn layers", world, rho, n, own)
            covered = np.zeros(replications, dtype=bool)
            for at in range(replications):
                scores, effects = world.draw(rng, 2)
                sample = draw_layers(scores[0], KINDS, n, rng)
                x, y = scores[int(not own)], effects[int(not own)]
                weights = 1 / sample.inclusion
                interval = rho_interval(weighted_rho(x[sample.chosen], y[sample.chosen], weights), weights)
                covered[at] = interval.low <= stats.spearmanr(x, y).statistic <= interval.high
            whose = "its own" if own else "another metric's"
            yield Rate(f"rho {rho:g}, {world}, by {whose} score", f"{n}", covered, (0.92, 1) if n >= 20 else ANY)


@claim("layers, texts", fast={"cases": ((30, 12, 0.77, ""),)}, cost=40)
def rho_and_texts(
    replications: int, cases: tuple = tuple(product((30, 211), (8, 12, 40), (0.0, 0.77), ("", "noisy", "skewed")))
) -> Iterator[Rate]:
    """The interval over texts of a rho over all layers covers its mean over other sets of as many texts.

    A layer's effect varies by a factor from text to text (standard deviation of its log 0.5; skewed: 1.5) and has noise
    of either sign (noisy: larger than most effects). Noise lowers every such rho: unlimited texts would give a
    larger one, which the interval does not aim at.
    """
    for n_layers, n_texts, rho, sort in cases:
        rng = generator("texts", n_layers, n_texts, rho, sort)
        covered = []
        for _ in range(10):
            log_effect = rng.normal(size=n_layers)
            pearson = 2 * np.sin(np.pi * rho / 6)
            scores = pearson * log_effect + np.sqrt(1 - pearson**2) * rng.normal(size=n_layers)
            texts = _Texts(np.exp(1.8 * log_effect), n_texts, sort)
            truth = np.mean([stats.spearmanr(scores, texts.draw_effects(rng)).statistic for _ in range(200)])
            for _ in range(max(1, replications // 10)):
                _, low, high = rho_over_texts(scores, *texts.draw(rng))
                covered.append(low <= truth <= high)
        band = (0.9, 1) if n_texts >= 12 else ANY
        yield Rate(f"rho {rho:g}, {sort or 'ordinary'} texts", f"{n_layers}, {n_texts}", np.array(covered), band)


@dataclass(frozen=True)
class _Texts:
    """Effects of layers on texts: each layer's own size, a factor a text and one a pair, and noise of either sign."""

    sizes: np.ndarray
    n_texts: int
    sort: str

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Summed effects (layers, texts) and tokens (texts,)."""
        tokens = rng.integers(20, 200, self.n_texts).astype(float)
        shape = (len(self.sizes), self.n_texts)
        spread = 1.5 if self.sort == "skewed" else 0.5
        factor = np.exp(spread * (rng.normal(size=shape[1]) + rng.normal(size=shape)) - spread**2)
        noise = (2.0 if self.sort == "noisy" else 0.3) * np.sqrt(12) * rng.normal(size=shape)
        return tokens * (self.sizes[:, None] * factor + noise), tokens

    def draw_effects(self, rng: np.random.Generator) -> np.ndarray:
        """Effects per token over all texts, (layers,)."""
        effects, tokens = self.draw(rng)
        per_token: np.ndarray = effects.sum(axis=1) / tokens.sum()
        return per_token


@claim("layers", fast={"sizes": (10,)})
def layers_above_draws(replications: int, sizes: tuple = (4, 10, 40, 211)) -> Iterator[Rate]:
    """The count of layers above every random draw seldom has p < 0.05 where the top weights are random ones.

    Effects of the top set and of 3 or 20 draws are alike in distribution; with noise, a seeded perturbation adds as
    much again, anew in every draw and seed.
    """
    for n_draws, noise, n in product((3, 20), (0.0, 1.0), sizes):
        rng = generator("layers above draws", n_draws, noise, n)
        small = np.zeros(replications, dtype=bool)
        for at in range(replications):
            top = np.repeat(rng.normal(size=(n, 1)), n_draws, axis=1) + noise * rng.normal(size=(n, n_draws))
            drawn = rng.normal(size=(n, n_draws)) + noise * rng.normal(size=(n, n_draws))
            small[at] = layers_above_random((top > drawn).sum(1), np.full(n, n_draws)).p_value < 0.05
        yield Rate(f"{n_draws} draws, noise {noise:g}", f"{n}", small, FALSE)


@claim("units", cost=10)
def false_discovery(replications: int) -> Iterator[Rate]:
    """A table in which nothing agrees seldom has a claim.

    120 rows: 4 k, 3 perturbations, 2 units and 5 metrics, all scores and effects noise (normal, their correlation's
    p-value exact), scores alike at every k. Beside it, one family for each unit, perturbation and k, which is not used.
    """
    for n in (20, 40):
        rng = generator("false discovery", n)
        one_family, many = np.zeros(replications, dtype=bool), np.zeros(replications, dtype=bool)
        for at in range(replications):
            shared = rng.normal(size=(2, 5, 1, n))
            x = 0.9 * shared + np.sqrt(0.19) * rng.normal(size=(2, 5, 12, n))
            x, y = (values - values.mean(-1, keepdims=True) for values in (x, rng.normal(size=x.shape)))
            r = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
            p_values = 2 * stats.t.sf(np.abs(r) * np.sqrt((n - 2) / (1 - r**2)), n - 2)  # exact; (2, 5, 12)
            one_family[at] = (adjusted_p_values(p_values.ravel(), np.zeros(120, bool)) < 0.05).any()
            groups = p_values.swapaxes(1, 2).reshape(24, 5)
            many[at] = any((stats.false_discovery_control(group) < 0.05).any() for group in groups)
        yield Rate("one family", f"{n}", one_family, FALSE)
        yield Rate("24 families", f"{n}", many)
