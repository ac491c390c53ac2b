"""Slow, literal definitions to check the statistics against. Imports nothing from the package."""

import itertools
import math


def ranks(values):
    """Mid-ranks from 1: one more than the number of smaller values, plus half of the other equal ones."""
    return [1 + sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return product / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def spearman(x, y):
    return pearson(ranks(x), ranks(y))


def tau_b(x, y):
    """Every pair once."""
    concordant = discordant = tied_x = tied_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = (int(v[i] > v[j]) - int(v[i] < v[j]) for v in (x, y))
        concordant += a * b > 0
        discordant += a * b < 0
        tied_x += a == 0 and b != 0
        tied_y += b == 0 and a != 0
    both = concordant + discordant
    return (concordant - discordant) / math.sqrt((both + tied_x) * (both + tied_y))


def weighted_tau(x, y):
    """Vigna 2015 for values without ties: pairs weigh 1/(r_i + 1) + 1/(r_j + 1), r by x, then by y; the mean."""

    def by(order):
        place = [sum(v > value for v in order) for value in order]
        total = signed = 0.0
        for i, j in itertools.combinations(range(len(x)), 2):
            weight = 1 / (place[i] + 1) + 1 / (place[j] + 1)
            total += weight
            signed += weight * (1 if (x[i] - x[j]) * (y[i] - y[j]) > 0 else -1)
        return signed / total

    return (by(x) + by(y)) / 2


def rank_biased_overlap(first, second, p):
    """Extrapolated, of two lists of the same items, best first: the agreement at the end goes on for ever."""
    n = len(first)
    shares = [len(set(first[:d]) & set(second[:d])) / d for d in range(1, n + 1)]
    tail = shares[-1] * sum(p ** (d - 1) for d in range(n + 1, 5000))
    return (1 - p) * (sum(share * p ** (d - 1) for d, share in enumerate(shares, 1)) + tail)


def permutation_p(x, y):
    """Two-sided, all pairings: twice the smaller tail, 1 at most."""
    observed = spearman(x, y)
    every = [spearman(x, list(other)) for other in itertools.permutations(y)]
    upper = sum(rho >= observed - 1e-12 for rho in every) / len(every)
    lower = sum(rho <= observed + 1e-12 for rho in every) / len(every)
    return min(1.0, 2 * min(upper, lower))


def benjamini_hochberg(p_values):
    """The smallest level at which each hypothesis would be rejected."""
    m = len(p_values)
    adjusted = []
    for p in p_values:
        above = [q for q in p_values if q >= p]
        adjusted.append(min(min(1.0, q * m / sum(r <= q for r in p_values)) for q in above))
    return adjusted


def gini(values):
    """Half the mean absolute difference of all pairs, relative to the mean."""
    n, mean = len(values), sum(values) / len(values)
    return sum(abs(a - b) for a in values for b in values) / (2 * n * n * mean)
