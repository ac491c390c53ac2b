"""Claims, intervals and samples over layers and single weights, tried in worlds whose truth is known.

    packages/bridge/.venv/bin/python benchmarks/calibration_units.py
    packages/bridge/.venv/bin/python benchmarks/calibration_units.py 200

prints a Markdown table of false claims, coverage and power, each beside what it should be; the number is that of the
replications of each line (1,000 by default, two hours of one processor core; fewer for lines of 211 layers). Every
figure comes from the functions of ``bridge.analysis`` that the report uses.

The model has 7 kinds of matrix at 30 depths and an embedding. Score and effect of a layer are sums of a part alike by
kind (45 % of the variance), a part alike by depth (15 %) and a part of its own; ``rho`` is the rank correlation of the
parts. In null worlds score and effect have nothing to do with each other, or nothing but the kind.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from bridge.analysis.claims import Verdict, adjusted_p_values, claim
from bridge.analysis.layer_sample import draw_layers
from bridge.analysis.metric_comparison import compare_metrics, standing
from bridge.analysis.population import population_precision, population_ratio
from bridge.analysis.rho_over_texts import rho_over_texts
from bridge.analysis.weight_sample import draw_probability, draw_weights
from bridge.analysis.weighted_rho import effective_number, rho_interval, weighted_rho
from bridge.analysis.within_kinds import within_kinds
from scipy import stats

N_KINDS, N_DEPTHS = 7, 30
KINDS = np.array([f"kind {kind}" for kind in range(N_KINDS) for _ in range(N_DEPTHS)] + ["embedding"])
DEPTHS = np.array([*np.tile(np.arange(N_DEPTHS, dtype=float), N_KINDS), np.nan])
N_LAYERS = len(KINDS)  # 211
SHARE_OF_KIND, SHARE_OF_DEPTH = 0.45, 0.15
N_WEIGHTS = 400_000
N_SHUFFLES = 199


class Line(NamedTuple):
    """One rate that was measured, and the band in which it should lie."""

    what: str
    world: str
    rate: float
    low: float
    high: float
    replications: int

    @property
    def holds(self) -> bool:
        """Whether the rate is in its band, two standard errors of the simulation aside."""
        middle = np.clip(self.rate, 0.02, 0.98)
        slack = 2 * np.sqrt(middle * (1 - middle) / self.replications)
        return self.low - slack <= self.rate <= self.high + slack


@dataclass(frozen=True)
class World:
    """How scores and effects of the layers arise.

    Attributes:
        rho: rank correlation of score and effect within kind and depth, for every metric.
        alike: "" if layers are independent; "own kinds": scores and effects differ by kind, each in its own way; "same
            kinds": both in the same way.
        depth: "" for no course over depth, "rough" for depths that are independent, "smooth" for a random walk.
        unbounded: share of the effects that are infinite.
    """

    rho: float = 0.0
    alike: str = ""
    depth: str = ""
    unbounded: float = 0.0

    def __str__(self) -> str:
        parts = [f"rho {self.rho:g}" if self.rho else "noise", self.alike or "layers independent"]
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
        effects = np.array(effects)
        effects[rng.uniform(size=effects.shape) < self.unbounded] = np.inf
        return np.array(scores), effects

    def _mixed(self, rng: np.random.Generator, own: np.ndarray, by_kind: np.ndarray) -> np.ndarray:
        shares = {"kind": SHARE_OF_KIND * bool(self.alike), "depth": SHARE_OF_DEPTH * bool(self.depth)}
        kinds = by_kind if self.alike == "same kinds" else _standard(rng.normal(size=N_KINDS))
        steps = rng.normal(size=N_DEPTHS)
        depths = _standard(np.cumsum(steps) if self.depth == "smooth" else steps)
        parts = np.sqrt(shares["kind"]) * np.repeat(kinds, N_DEPTHS) + np.sqrt(shares["depth"]) * np.tile(
            depths, N_KINDS
        )
        return np.append(parts, 0.0) + np.sqrt(1 - shares["kind"] - shares["depth"]) * own


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


class Verdicts(NamedTuple):
    """What a report over one draw of layers would say of its metrics; the first one is the baseline."""

    claims: list[Verdict]
    above_baseline: bool
    has_best: bool


def verdicts(
    scores: np.ndarray,
    effects: np.ndarray,
    n: int,
    rng: np.random.Generator,
    n_top: int = 0,
    primary: int | None = None,
) -> Verdicts:
    """Draw ``n`` layers and claim, as the report does: p within kinds, adjusted; all pairs of metrics compared."""
    sample = draw_layers(scores[0], KINDS, n - n_top, rng, n_top)
    layers, weights = sample.chosen, 1 / sample.inclusion
    results = [
        within_kinds(x[layers], y[layers], KINDS[layers], DEPTHS[layers], rng, weights, N_SHUFFLES)
        for x, y in zip(scores, effects, strict=True)
    ]
    p_values = np.array([result.p_value for result in results])
    adjusted = adjusted_p_values(p_values, np.arange(len(results)) == primary)
    number = effective_number(weights)
    claims = [
        claim(found.result.rho, p, number, found.result.n_fitted).verdict
        for found, p in zip(results, adjusted, strict=True)
    ]
    names = [f"metric {at}" for at in range(len(results))]
    pairs = compare_metrics({name: found.result for name, found in zip(names, results, strict=True)}, weights)
    standings = {name: standing(pairs, name) for name in names}
    above = any(names[0] in standings[name].above for name in names[1:])
    return Verdicts(claims, above, any(one.is_best for one in standings.values()))


NULL_WORLDS = (
    World(),
    World(alike="own kinds"),
    World(alike="same kinds"),
    World(alike="own kinds", depth="rough"),
    World(alike="same kinds", depth="smooth"),
    World(alike="own kinds", unbounded=0.5),
)


def false_claims(
    replications: int, seed: int, worlds: tuple = NULL_WORLDS, sizes: tuple = (4, 6, 10, 20, 40, 211)
) -> Iterator[Line]:
    """Scores of noise: how often a report claims something of one of its 1 to 8 metrics."""
    for world, n, n_metrics in product(worlds, sizes, (1, 2, 5, 8)):
        rng = np.random.default_rng([seed, n, n_metrics])
        number = replications if n < N_LAYERS else max(replications // 4, 100)
        found = [verdicts(*world.draw(rng, n_metrics), n, rng) for _ in range(number)]
        where = f"{world}; {n} layers, {n_metrics} metric{'s' * (n_metrics > 1)}"
        for what, verdict in (("better than chance", Verdict.BETTER), ("wrong way round", Verdict.WRONG_WAY)):
            rate = np.mean([verdict in one.claims for one in found])
            yield Line(f"false: {what}", where, rate, 0, 0.05, number)
        if n_metrics > 1:
            yield Line("false: above the baseline", where, np.mean([f.above_baseline for f in found]), 0, 0.05, number)
            yield Line("false: best", where, np.mean([f.has_best for f in found]), 0, 0.05, number)


def false_differences(replications: int, seed: int) -> Iterator[Line]:
    """Metrics that agree equally well with the effect: how often one of them is called best, or above the baseline."""
    for rho, n, n_metrics in product((0.5, 0.9), (10, 20, 40, 211), (2, 5)):
        rng = np.random.default_rng([seed, n, n_metrics])
        number = replications if n < N_LAYERS else max(replications // 4, 100)
        world = World(rho=rho, alike="own kinds")
        found = [verdicts(*world.draw(rng, n_metrics), n, rng) for _ in range(number)]
        where = f"all metrics with {world}; {n} layers, {n_metrics} metrics"
        yield Line("false: above the baseline", where, np.mean([f.above_baseline for f in found]), 0, 0.05, number)
        yield Line("false: best", where, np.mean([f.has_best for f in found]), 0, 0.05, number)


def naive_claims(replications: int, seed: int) -> Iterator[Line]:
    """The same null worlds by a permutation over all layers, to compare with."""
    for world, n in product(NULL_WORLDS[1:3], (40, 211)):
        rng = np.random.default_rng([seed, n])
        p_values = []
        for _ in range(replications):
            scores, effects = world.draw(rng)
            layers = draw_layers(scores[0], KINDS, n, rng).chosen
            p_values.append(stats.spearmanr(scores[0][layers], effects[0][layers]).pvalue)
        rate = np.mean(np.array(p_values) < 0.05)
        yield Line("not used: p < .05 over all layers", f"{world}; {n} layers", rate, 0, 1, replications)


def power(
    replications: int,
    seed: int,
    cases: tuple = tuple(product((0.3, 0.5, 0.77), (10, 20, 30, 40, 60, 100))),
    n_tops: tuple = (0, 5),
) -> Iterator[Line]:
    """How often a true agreement of independent layers is claimed, by the named metric (one analysis, no family)."""
    for (rho, n), n_top in product(cases, n_tops):
        rng = np.random.default_rng([seed, n, n_top])
        world = World(rho=rho)
        found = [verdicts(*world.draw(rng), n, rng, n_top, primary=0) for _ in range(replications)]
        rate = np.mean([one.claims[0] == Verdict.BETTER for one in found])
        least = 0.85 if rho == 0.77 and n >= 20 and n_top == 0 else 0
        where = f"{world}; {n} layers" + f", {n_top} of them the highest" * bool(n_top)
        yield Line("power: better than chance", where, rate, least, 1, replications)


def absence(replications: int, seed: int) -> Iterator[Line]:
    """How often agreement is claimed to be absent, at the margin of 0.2 itself (false) and where there is none."""
    for rho, n in product((0.2, 0.0), (40, 211)):
        rng = np.random.default_rng([seed, n])
        said = []
        for _ in range(replications):
            scores, effects = World(rho=rho).draw(rng)
            layers = draw_layers(scores[0], KINDS, n, rng).chosen
            found = within_kinds(scores[0][layers], effects[0][layers], KINDS[layers], DEPTHS[layers], rng, None, 99)
            interval = (found.interval.low, found.interval.high)
            verdict = claim(found.result.rho, 1.0, n, found.result.n_fitted, interval=interval).verdict
            said.append(verdict == Verdict.ABSENT)
        what, high = ("false: absent", 0.05) if rho else ("power: absent", 1)
        yield Line(what, f"rho {rho:g}; {n} layers", np.mean(said), 0, high, replications)


def layer_coverage(replications: int, seed: int, sizes: tuple = ((10, 0), (20, 0), (40, 0), (40, 5))) -> Iterator[Line]:
    """Rho over all 211 layers from the layers drawn: coverage, and the bias beside that of 5 highest + 5 spread."""
    for rho, alike in product((0.0, 0.3, 0.77, 0.95), ("", "same kinds")):
        world = World(rho=rho, alike=alike, depth="smooth")
        for (n, n_top), chooser in product(sizes, ("its own", "another metric's")):
            rng = np.random.default_rng([seed, n, n_top])
            covered = []
            for _ in range(replications):
                scores, effects = world.draw(rng, 2)
                at = 0 if chooser == "its own" else 1
                sample = draw_layers(scores[0], KINDS, n - n_top, rng, n_top)
                x, y = scores[at], effects[at]
                weights = 1 / sample.inclusion
                result = weighted_rho(x[sample.chosen], y[sample.chosen], weights)
                interval = rho_interval(result, weights, sample.inclusion)
                covered.append(interval.low <= stats.spearmanr(x, y).statistic <= interval.high)
            where = f"{world}; {n} layers ({n_top} highest) by {chooser} score"
            yield Line("coverage: rho over all layers", where, np.mean(covered), 0.93, 1, replications)


def layer_bias(replications: int, seed: int) -> Iterator[Line]:
    """Mean of estimated minus true rho over all layers, independent layers, true rho 0.3."""
    rng = np.random.default_rng(seed)
    errors = {"5 highest + 5 evenly spaced": [], "10 drawn": [], "40 drawn": [], "5 highest + 35 drawn, weighted": []}
    for _ in range(replications):
        scores, effects = World(rho=0.3).draw(rng)
        x, y = scores[0], effects[0]
        truth = stats.spearmanr(x, y).statistic
        order = np.argsort(-x)
        spread = order[5:][np.linspace(0, N_LAYERS - 6, 5).round().astype(int)]
        old = np.concatenate([order[:5], spread])
        samples = [(old, np.ones(10))]
        for n, n_top in ((10, 0), (40, 0), (35, 5)):
            drawn = draw_layers(x, KINDS, n, rng, n_top)
            samples.append((drawn.chosen, 1 / drawn.inclusion))
        for name, (layers, weights) in zip(errors, samples, strict=True):
            errors[name].append(weighted_rho(x[layers], y[layers], weights).rho - truth)
    for name, values in errors.items():
        low, high = (-0.02, 0.02) if "drawn" in name else (-1, 1)
        yield Line("bias: rho over all layers", f"true rho 0.3; {name}", np.mean(values), low, high, replications)


def text_coverage(
    replications: int,
    seed: int,
    cases: tuple = tuple(product((30, 211), (8, 12, 40), (0.0, 0.77), ("", "noisy", "skewed"))),
) -> Iterator[Line]:
    """Interval over texts of a rho over all layers: coverage of its mean over sets of as many texts."""
    for n_layers, n_texts, rho, sort in cases:
        rng = np.random.default_rng([seed, n_layers, n_texts])
        number = max(replications // 4, 50)
        covered = []
        for _ in range(10):
            log_effect = rng.normal(size=n_layers)
            pearson = 2 * np.sin(np.pi * rho / 6)
            scores = pearson * log_effect + np.sqrt(1 - pearson**2) * rng.normal(size=n_layers)
            texts = _Texts(np.exp(1.8 * log_effect), n_texts, sort)
            truth = np.mean([rho_over_texts(scores, *texts.draw_sums(rng))[0] for _ in range(200)])
            for _ in range(number // 10):
                _, low, high = rho_over_texts(scores, *texts.draw(rng))
                covered.append(low <= truth <= high)
        where = f"rho {rho:g}, {n_layers} layers, {n_texts} {sort or 'ordinary'} texts"
        yield Line("coverage: rho over texts", where, np.mean(covered), 0.93, 1, len(covered))


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

    def draw_sums(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The same, added up to one text."""
        effects, tokens = self.draw(rng)
        return effects.sum(axis=1, keepdims=True), tokens.sum(keepdims=True)


WEIGHT_WORLDS = (
    "two equal metrics",
    "two equal metrics, the second blind among its highest 2 %",
    "the second better, but blind among its highest 7 %",
    "a fifth of the first metric's scores tie at zero",
    "noise",
)


def weight_population(world: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores by two metrics (N, 2) and sizes of the effects (N,) of all weights of a model, lognormal."""
    effect, noise, order = rng.normal(size=N_WEIGHTS), rng.normal(size=(N_WEIGHTS, 2)), rng.uniform(size=N_WEIGHTS)
    correlations = {WEIGHT_WORLDS[2]: (0.6, 0.75), WEIGHT_WORLDS[3]: (0.8, 0.5), WEIGHT_WORLDS[4]: (0.0, 0.0)}
    pearson = np.array(correlations.get(world, (0.69, 0.69)))
    scores = effect[:, None] * pearson + noise * np.sqrt(1 - pearson**2)  # (N, 2)
    if "blind" in world:
        start = 2.0 if "2 %" in world else 1.5
        scores[:, 1] = np.where(scores[:, 1] > start, start + order, scores[:, 1])
    if "tie" in world:
        scores[order < 0.2, 0] = scores[:, 0].min()
    return np.exp(1.5 * scores), np.exp(1.5 * effect)


def ranks_among_all(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1 = highest, by each metric, (N, M); ties in the order in which they come."""
    ranks = np.empty(scores.shape)
    for at, column in enumerate(scores.T):
        ranks[np.argsort(-column, kind="stable"), at] = np.arange(1, len(column) + 1)
    return ranks


class Candidates(NamedTuple):
    """What one pass over a model keeps of its weights: from these the table of a discovery is drawn."""

    index: np.ndarray  # (m,)
    inclusion: np.ndarray  # (m,): the probability with which each was kept
    ranks: np.ndarray  # (m, M): among all weights, estimated below the head


def candidates(scores: np.ndarray, true_ranks: np.ndarray, rng: np.random.Generator) -> Candidates:
    """As one pass can keep them: the 100 highest, the highest 512 of every 32nd weight, and 2,000 of all.

    Ranks beyond the head are not known; a candidate's is estimated by how many weights the candidates that score at
    least as high stand for.
    """
    n_head, n_middle, middle_share, n_uniform = 100, 512, 1 / 32, 2_000
    drawn = rng.choice(len(scores), int(len(scores) * middle_share), replace=False)
    bounds = np.sort(scores[drawn], axis=0)[-n_middle]
    in_head, in_middle = (true_ranks <= n_head).any(axis=1), (scores >= bounds).any(axis=1)
    kept = in_head.copy()
    kept[drawn[in_middle[drawn]]] = True
    kept[drawn[:n_uniform]] = True
    index = np.flatnonzero(kept)
    inclusion = np.where(in_middle[index], middle_share, n_uniform / len(scores))
    inclusion[in_head[index]] = 1.0
    ranks = np.empty((len(index), scores.shape[1]))
    for at, column in enumerate(scores[index].T):
        order = np.argsort(-column, kind="stable")
        position = np.arange(1, len(order) + 1)
        estimate = np.cumsum(1 / inclusion[order])
        ranks[order, at] = np.where(position <= n_head, position, np.maximum(position, estimate))
    return Candidates(index, inclusion, ranks)


def weight_coverage(
    replications: int, seed: int, worlds: tuple = WEIGHT_WORLDS, n: int = 200, n_table: int = 1_500
) -> Iterator[Line]:
    """Two metrics over all weights from 200 single ones: rho, its difference, overlap of heads, ratio of totals."""
    for world, metrics in product(worlds, ([0], [1], [0, 1])):
        rng = np.random.default_rng([seed, *world.encode()])
        scores, effects = weight_population(world, rng)
        true_ranks = ranks_among_all(scores)
        truth = np.array([stats.spearmanr(column, effects).statistic for column in scores.T])
        overlaps = [_overlap(column, effects, 0.1) for column in scores.T]
        ratios = effects.sum() / scores.sum(axis=0)
        seen = []
        for repeat in range(replications):
            if repeat % 5 == 0:
                kept = candidates(scores, true_ranks, rng)
            table = draw_weights(draw_probability(kept.ranks, N_WEIGHTS), kept.inclusion, n_table, rng)
            ranks = kept.ranks[table.chosen][:, metrics]
            sample = draw_weights(draw_probability(ranks, N_WEIGHTS), table.inclusion, n, rng)
            index, weights = kept.index[table.chosen][sample.chosen], 1 / sample.inclusion
            x, y = scores[index], effects[index]
            results = {str(at): weighted_rho(x[:, at], y, weights) for at in range(2)}
            intervals = [rho_interval(result, weights, sample.inclusion) for result in results.values()]
            pair = compare_metrics(results, weights)[0]
            heads = [population_precision(x[:, at], y, sample.inclusion, 0.1) for at in range(2)]
            totals = [population_ratio(x[:, at], y, sample.inclusion) for at in range(2)]
            seen.append(
                [
                    np.mean([one.low <= true <= one.high for one, true in zip(intervals, truth, strict=True)]),
                    pair.low <= truth[0] - truth[1] <= pair.high,
                    np.mean([one.low <= true <= one.high for one, true in zip(heads, overlaps, strict=True)]),
                    np.mean([one.low <= true <= one.high for one, true in zip(totals, ratios, strict=True)]),
                    np.mean([one.rho for one in results.values()] - truth),
                    np.mean([stats.spearmanr(column, y).statistic for column in x.T] - truth),
                ]
            )
        rates = np.mean(seen, axis=0)
        where = f"{world}; drawn for {'both' if len(metrics) == 2 else ('the first', 'the second')[metrics[0]]}"
        yield Line("coverage: rho over all weights", where, rates[0], 0.90, 1, replications)
        yield Line("coverage: difference of two rhos", where, rates[1], 0.90, 1, replications)
        yield Line("coverage: overlap of the top 10 %", where, rates[2], 0.90, 1, replications)
        yield Line("coverage: ratio of total effect to score", where, rates[3], 0.80, 1, replications)
        yield Line("bias: rho over all weights", where, rates[4], -0.02, 0.02, replications)
        yield Line("not used: bias of the unweighted rho", where, rates[5], -1, 1, replications)


def _overlap(x: np.ndarray, y: np.ndarray, share: float) -> float:
    size = round(share * len(x))
    heads = [np.argpartition(-values, size)[:size] for values in (x, y)]
    return len(np.intersect1d(*heads)) / size


def false_discovery(replications: int, seed: int) -> Iterator[Line]:
    """Tables without any agreement, 4 k x 2 units x 3 perturbations x 5 metrics: how often anything is claimed."""
    for n in (20, 40):
        rng = np.random.default_rng([seed, n])
        any_claim, by_groups = [], []
        for _ in range(replications):
            shared = rng.normal(
                size=(2, 5, n)
            )  # scores of a metric are alike at every k, effects at every perturbation
            p_values = []
            for unit, metric, _, _ in product(range(2), range(5), range(4), range(3)):
                x = 0.9 * shared[unit, metric] + np.sqrt(0.19) * rng.normal(size=n)
                p_values.append(stats.spearmanr(x, rng.normal(size=n)).pvalue)
            p_values = np.array(p_values)
            any_claim.append((adjusted_p_values(p_values, np.zeros(120, bool)) < 0.05).any())
            groups = p_values.reshape(2, 5, 12).swapaxes(1, 2).reshape(24, 5)
            by_groups.append(any((stats.false_discovery_control(group) < 0.05).any() for group in groups))
        where = f"120 rows, {n} units"
        yield Line("false: any claim of a table", where, np.mean(any_claim), 0, 0.05, replications)
        yield Line(
            "not used: a family for each unit, perturbation and k", where, np.mean(by_groups), 0, 1, replications
        )


PARTS: dict[str, Callable[[int, int], Iterator[Line]]] = {
    "Null worlds": false_claims,
    "Equal metrics": false_differences,
    "Permutation over all layers": naive_claims,
    "Power": power,
    "Absence": absence,
    "Layers drawn": layer_coverage,
    "Choice of layers": layer_bias,
    "Texts": text_coverage,
    "Single weights": weight_coverage,
    "One family a table": false_discovery,
}


def markdown(lines: list[Line]) -> str:
    """A Markdown table of the lines; the last column says whether the rate is in its band."""
    rows = ["| what | world | measured | reach | replications | |", "|---|---|---|---|---|---|"]
    for line in lines:
        band = "" if line.what.startswith("not used") else f"{line.low:g} to {line.high:g}"
        verdict = "" if line.holds else "**missed**"
        rows.append(f"| {line.what} | {line.world} | {line.rate:.3f} | {band} | {line.replications} | {verdict} |")
    return "\n".join(rows)


def main(replications: int = 1_000, seed: int = 0, parts: list[str] | None = None) -> None:
    """Print one table for each part."""
    for title, part in PARTS.items():
        if parts is None or title in parts:
            print(f"\n### {title}\n\n{markdown(list(part(replications, seed)))}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), parts=sys.argv[2:] or None)
