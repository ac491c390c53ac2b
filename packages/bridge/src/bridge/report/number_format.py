"""Numbers as a person reads them. What is missing is a dash, never ``nan``."""

import math

import numpy as np
import pandas as pd

DASH = "–"
LARGEST_DECIMAL = 1e6  # from here on, numbers are scientific
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """``digits`` significant digits, scientific for the very large and the very small."""
    if value is None or pd.isna(value):
        return DASH
    value = float(value)
    size = abs(value)
    sign = _sign(value, signed)
    if math.isinf(size):
        return f"{sign}∞"
    if size == 0:
        return "0"
    mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
    power = int(exponent)
    if power >= 6 or power < -4:
        return f"{sign}{mantissa}×10{str(power).translate(_SUPERSCRIPTS)}"
    decimals = max(0, digits - 1 - power)
    rounded = float(f"{mantissa}e{exponent}")
    return f"{sign}{rounded:,.{decimals}f}"


def _sign(value: float, signed: bool) -> str:
    """The sign as it is printed; a plus only where ``signed`` asks for one."""
    if value < 0:
        return "−"
    return "+" if signed and value > 0 else ""


def nats(value: float | None) -> str:
    """A change of loss, with its sign."""
    return number(value, 3, signed=True)


def perplexity(value: float | None) -> str:
    """A perplexity: two decimals while it is small."""
    if value is None or not np.isfinite(value) or value >= 1000:
        return number(value, 3)
    return f"{value:.2f}"


def coefficient(value: float | None) -> str:
    """A correlation or a share: two decimals."""
    return DASH if value is None or pd.isna(value) else f"{value:.2f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """A probability, to two digits."""
    return number(value, 2)


def spread(low: float, high: float) -> str:
    """``[low, high]``, to two digits of its width; nothing if both are missing."""
    if pd.isna(low) and pd.isna(high):
        return ""
    return _brackets(_to_digits_of_interval(low, low, high), _to_digits_of_interval(high, low, high))


def measured(value: float, low: float, high: float, signed: bool = True) -> str:
    """A value and its interval, no digit finer than a hundredth of the interval's width."""
    if pd.isna(low) and pd.isna(high):
        return number(value, 3, signed)
    return f"{_to_digits_of_interval(value, low, high, signed)} {spread(low, high)}"


def _brackets(low: str, high: str) -> str:
    return f"[{low},\u00a0{high}]"  # a line never breaks within an interval


def _to_digits_of_interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """``value`` to two digits of the width of [low, high]; to three of its own where the width gives none."""
    if not _can_be_decimal(value, low, high):
        return number(value, 3, signed)
    width = high - low
    if width <= 1e-6:
        return number(value, 3, signed)
    decimals = max(0, 1 - math.floor(math.log10(width)))
    rounded = round(float(value), decimals) if decimals else float(f"{float(value):.3g}")
    return f"{_sign(rounded, signed)}{abs(rounded):,.{decimals}f}"


def _can_be_decimal(*values: float) -> bool:
    """Whether all values are known and small enough to be printed without a power of ten."""
    return all(pd.notna(value) and abs(value) < LARGEST_DECIMAL for value in values)


def rho(value: float, low: float, high: float) -> str:
    """A correlation, or a difference of two, and its interval: ``0.90 [0.74, 0.97]``."""
    if pd.isna(low) and pd.isna(high):
        return coefficient(value)
    return f"{coefficient(value)} {_brackets(coefficient(low), coefficient(high))}"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return DASH if value is None or pd.isna(value) else f"{int(value):,}"


def plural(n: int, noun: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def exp(nll: float) -> float:
    """The perplexity of a loss; infinite where it overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll))
