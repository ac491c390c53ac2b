"""Do samples of single weights and of layers speak of the whole model? Coverage and bias where the truth is known.

    packages/critical_weight_analysis/.venv/bin/python benchmarks/sampled_populations.py --studies 400

A made-up model of a million weights, each with the effect of taking it away and two scores whose rank correlation with
that effect over all weights is known. A study runs discovery's sampling, draws 200 weights by the metrics that are
compared, and estimates. Prints a table for docs/statistics.md.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from bridge.analysis.layer_sample import DEFAULT_LAYERS, draw_layers
from bridge.analysis.population_estimates import PopulationColumns, estimate_population
from bridge.analysis.single_weights import choose_weights
from bridge.analysis.spearman import spearman_rho
from bridge.analysis.within_kinds import within_kinds
from bridge.exchange import layout
from bridge.exchange.command_line import flags
from bridge.exchange.printable import say
from critical_weight_analysis import sampling
from critical_weight_analysis.highest_scores import top_indices
from critical_weight_analysis.metrics import METRICS, Sensitivity
from scipy import stats

NAMES = ("grad_x_weight", "magnitude")
N_PARAMETERS, SHAPE = 40, (100, 250)
N_SINGLE = 200
POWERS = ((1.1, 0.4), (0.3, 0.6))  # of weight and gradient: metrics that agree equally well, and one far better


class World(NamedTuple):
    """A model, and the effect of taking each weight away."""

    sensitivities: list[Sensitivity]
    highest: dict[str, list[torch.Tensor]]  # by parameter, for each metric
    effects: dict[str, np.ndarray]  # by parameter, (O, I)

    @property
    def n_weights(self) -> int:
        """Of the model."""
        return sum(effects.size for effects in self.effects.values())


def make_world(powers: tuple[float, float], seed: int = 0) -> World:
    """Weights and gradients of different size in each parameter; effects |weight|^a |gradient|^b, with noise."""
    rng = np.random.default_rng([seed, *b"world"])
    sensitivities, highest, effects = [], {}, {}
    for number in range(N_PARAMETERS):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        weight = rng.normal(size=SHAPE) * np.exp(0.5 * rng.normal())
        gradient = rng.normal(size=SHAPE) * np.exp(1.0 * rng.normal(size=SHAPE) + rng.normal())
        sensitivity = Sensitivity(name, torch.from_numpy(weight), grad=torch.from_numpy(gradient))
        sensitivities.append(sensitivity)
        highest[name] = [top_indices(METRICS[metric].score(sensitivity), sampling.N_HEAD) for metric in NAMES]
        effects[name] = np.abs(weight) ** powers[0] * np.abs(gradient) ** powers[1] * np.exp(rng.normal(size=SHAPE))
    return World(sensitivities, highest, effects)


def truth(world: World) -> dict[str, tuple[float, float, float]]:
    """By metric: rho, overlap of the top tenths, and total effect by total score, over all weights."""
    effect = np.concatenate([world.effects[s.name].reshape(-1) for s in world.sensitivities])
    in_effect = effect >= np.quantile(effect, 0.9)
    true = {}
    for metric in NAMES:
        score = np.concatenate([METRICS[metric].score(s).numpy().reshape(-1) for s in world.sensitivities])
        precision = float((score >= np.quantile(score, 0.9))[in_effect].mean())
        true[metric] = (spearman_rho(score, effect), precision, float(effect.sum() / score.sum()))
    return true


class Study(NamedTuple):
    """By metric: the estimates for all weights, and rho over the measured ones alone."""

    estimates: dict[str, PopulationColumns]
    design: dict[str, float]


def study(world: World, compared: Sequence[str], seed: int) -> Study:
    """Sample as a discovery does, draw as a validation does, and estimate."""
    sample = sampling.Sample({s.name: tuple(s.weight.shape) for s in world.sensitivities}, NAMES, seed)
    for sensitivity in world.sensitivities:
        sample.update(sensitivity, world.highest[sensitivity.name])
    table = sample.table()
    chosen = choose_weights(table, compared, N_SINGLE, world.n_weights, seed).merge(
        table.drop(columns="inclusion"), on=["parameter", "row", "col"]
    )
    cells = zip(chosen["parameter"], chosen["row"], chosen["col"], strict=True)
    effect = np.array([world.effects[name][row, col] for name, row, col in cells])
    estimates, design = {}, {}
    for metric in NAMES:
        score = chosen[layout.score_column(metric)].to_numpy()
        points = pd.DataFrame({"score_sum": score, "delta_nll": effect, "inclusion": chosen["inclusion"]})
        estimates[metric] = estimate_population(points)
        design[metric] = spearman_rho(score, effect)
    return Study(estimates, design)


def weights_table(world: World, studies: int) -> list[str]:
    """Rows of Markdown: for each choice of metrics and each metric, truth, mean estimate and coverage in percent."""
    true = truth(world)
    lines = [
        "| `--metrics` | metric | true rho | mean estimate | 95 % interval covers | rho over the 200 | "
        "precision covers | ratio covers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for compared in (("grad_x_weight",), ("magnitude",), NAMES):
        results = [study(world, compared, seed) for seed in range(studies)]
        for metric in NAMES:
            rho, precision, ratio = true[metric]
            rows = [result.estimates[metric] for result in results]
            covered = (
                100 * np.mean([low <= value <= high for low, high in ends])
                for value, ends in (
                    (rho, [(row.population_low, row.population_high) for row in rows]),
                    (precision, [(row.precision_low, row.precision_high) for row in rows]),
                    (ratio, [(row.ratio_low, row.ratio_high) for row in rows]),
                )
            )
            shares = [f"{share:.1f}" for share in covered]
            mean = np.mean([row.population_rho for row in rows])
            design = np.mean([result.design[metric] for result in results])
            cells = [" ".join(compared), metric, f"{rho:.3f}", f"{mean:.3f}", shares[0], f"{design:.3f}", *shares[1:]]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def layers_table(studies: int, n_layers: int = 210, n_kinds: int = 7, rho: float = 0.5) -> list[str]:
    """Rows of Markdown: for each design, bias of rho over all layers, its spread and coverage, and power within kinds.

    Score and effect differ by kind and agree within kinds with a correlation of ``rho``; certain ones score highest.
    """
    lines = [
        "| certain + drawn | mean error of the estimate | its standard deviation | 95 % interval covers | rho over the "
        "measured ones is off by | agreement within kinds is shown |",
        "|---|---|---|---|---|---|",
    ]
    kinds = np.repeat(np.arange(n_kinds), n_layers // n_kinds)
    for n_top, n_drawn in ((5, 5), (0, 10), (5, 35), (0, 20), (0, DEFAULT_LAYERS)):
        errors, covered, plain, shown = [], [], [], []
        for seed in range(studies):
            rng = np.random.default_rng([seed, *b"layers"])
            own = rng.normal(size=n_layers)
            score = own + 0.8 * rng.normal(size=n_kinds)[kinds]
            effect = rho * own + np.sqrt(1 - rho**2) * rng.normal(size=n_layers) + rng.normal(size=n_kinds)[kinds]
            order = np.argsort(-score)
            others = np.sort(order[n_top:])
            drawn = draw_layers(score[others], [str(kind) for kind in kinds[others]], n_drawn, rng)
            chosen = np.append(order[:n_top], others[drawn.chosen])
            inclusion = np.append(np.ones(n_top), drawn.inclusion)
            points = pd.DataFrame({"score_sum": score[chosen], "delta_nll": effect[chosen], "inclusion": inclusion})
            estimate = estimate_population(points)
            true = spearman_rho(score, effect)
            errors.append(estimate.population_rho - true)
            if not np.isnan(estimate.population_low):
                covered.append(estimate.population_low <= true <= estimate.population_high)
            if seed % 5 == 0:
                named = [str(kind) for kind in kinds[chosen]]
                x, y = score[chosen], effect[chosen]
                within = within_kinds(x, y, named, [None] * len(x), rng, 1 / inclusion, n_resamples=499)
                shown.append(within.result.rho > 0 and within.p_value < 0.05)
            plain.append(stats.spearmanr(score[chosen], effect[chosen]).statistic - true)
        figures = [f"{np.mean(errors):+.3f}", f"{np.std(errors):.3f}"]
        figures.append(f"{100 * np.mean(covered):.1f}" if covered else "no interval")
        figures += [f"{np.mean(plain):+.3f}", f"{100 * np.mean(shown):.1f}"]
        lines.append(f"| {n_top} + {n_drawn} | " + " | ".join(figures) + " |")
    return lines


def main(*, studies: int = 400, n_uniform: int = 1 << 12) -> None:
    """Print both tables.

    Args:
        studies: for each row.
        n_uniform: weights drawn uniformly of the million; few, as of a large model.
    """
    sampling.N_UNIFORM = n_uniform
    for powers in POWERS:
        say(f"effect: weight^{powers[0]} gradient^{powers[1]}", *weights_table(make_world(powers), studies), "")
    say(*layers_table(5 * studies))


if __name__ == "__main__":
    flags.run(main)
