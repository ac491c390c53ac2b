"""Claims about chosen sets of weights against random ones."""

import math
from collections.abc import Iterator

import numpy as np
from llm_perturb import top_against_random

from simulations.rates import ANY, Rate, claim, generator
from simulations.texts import UNEQUAL, covers, lengths

# standard deviations of the effect per token: between random sets, of a text in all sets, of a text in the chosen set,
# of a text in one random set
PARTS = {
    "texts dominate": (0.0, 0.02, 0.3, 0.0),
    "draws dominate": (0.3, 0.02, 0.02, 0.0),
    "both": (0.1, 0.1, 0.3, 0.1),
    "noise that no two sets share dominates": (0.0, 0.0, 0.3, 0.3),
    "draws and their own noise": (0.1, 0.0, 0.1, 0.3),
    "lognormal(1) draws dominate": (0.3, 0.02, 0.02, 0.0),
}


@claim("random sets")
def top_minus_random(replications: int) -> Iterator[Rate]:
    """The 95 % interval of top minus random covers the truth.

    Texts and random sets are both drawn anew in every replication; 12 texts of unequal lengths, 40 of nearly equal
    ones. The band is for 3 draws and more.
    """
    for name in PARTS:
        for n, sigma in ((12, UNEQUAL), (40, 0.3)):
            for n_draws in (2, 3, 5, 10, 20):
                rng = generator("top_minus_random", name, n, n_draws)
                n_tokens = lengths(rng, (replications, 1, n), sigma)
                top, drawn = (effects * n_tokens for effects in _sets(rng, name, replications, n_draws, n))
                interval = top_against_random.difference_interval(top, drawn, n_tokens[:, 0])
                band = (0.92, 1) if n_draws >= 3 else ANY
                yield Rate(f"{name}, {n} texts", f"{n_draws}", covers(interval, 1.0), band)


def _sets(
    rng: np.random.Generator, name: str, replications: int, n_draws: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Effects per token of a chosen set (R, 1, n), 1 above those of random ones in the mean, and of these (R, B, n)."""
    of_set, of_text, of_chosen, of_draw = PARTS[name]
    texts = of_text * rng.standard_normal((replications, 1, n))
    sets = rng.standard_normal((replications, n_draws, 1))
    if name.startswith("lognormal"):
        sets = (np.exp(sets) - math.exp(0.5)) / 2
    top = 1 + texts + of_chosen * rng.standard_normal((replications, 1, n))
    return top, of_set * sets + texts + of_draw * rng.standard_normal((replications, n_draws, n))


@claim("claimed when")
def exchangeable_sets(replications: int) -> Iterator[Rate]:
    """A chosen set that is one more random set is seldom called more damaging.

    The chosen set is drawn like the random ones. Noise: standard deviation of a seeded perturbation's effect
    against that between sets; a part of it is common to all sets of a seed (shared) or not. Effects are normal or
    lognormal(1.5).
    """
    for law in ("normal", "lognormal"):
        for noise in (0, 0.3, 1, 3, math.inf):
            for shared in (False, True) if noise else (False,):
                name = f"{law}, noise {noise:g}{', shared' if shared else ''}"
                for n_draws, level in ((3, 0.25), (5, 1 / 6), (19, 0.05), (39, 0.05)):
                    rng = generator("exchangeable_sets", name, n_draws)
                    top, drawn = _seeded(rng, law, noise, shared, replications, n_draws)
                    p = top_against_random.rank_p_value(top, drawn)
                    setting = f"p <= {level:.2g} of {n_draws}"
                    yield Rate(name, setting, p <= level + 1e-12, (0, level))


def _seeded(
    rng: np.random.Generator, law: str, noise: float, shared: bool, replications: int, n_draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Effects of one set and of B others, (R, B) each, under the noise of B seeds."""

    def draw(*shape: int) -> np.ndarray:
        values = rng.standard_normal(shape)
        return values if law == "normal" else np.exp(1.5 * values)

    between = 0.0 if math.isinf(noise) else 1.0
    scale = 1.0 if math.isinf(noise) else noise
    own = 0.3 if shared else 1.0
    seeds = draw(replications, n_draws) if shared else 0.0
    top = between * draw(replications, 1) + scale * (own * draw(replications, n_draws) + seeds)
    drawn = between * draw(replications, n_draws) + scale * (own * draw(replications, n_draws) + seeds)
    return top, drawn
