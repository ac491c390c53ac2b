import math

import pytest
from bridge.report import number_format


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.500"),
        (37.0444, "37.0"),
        (999.9, "1,000"),
        (999_999.4, "1.00×10⁶"),
        (0.0001, "0.000100"),
        (0.00009, "9.00×10⁻⁵"),
        (152_999, "153,000"),
        (4.04e6, "4.04×10⁶"),
        (-0.00012345, "−0.000123"),
        (3.1e-12, "3.10×10⁻¹²"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_numbers(value, text):
    assert number_format.number(value) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.0461, 0.0405, 0.0518, "+0.046 [0.041,\u00a00.052]"),
        (-7.17e-5, -0.000272, 0.000128, "−0.00007 [−0.00027,\u00a00.00013]"),
        (7.92, 6.97, 8.87, "+7.9 [7.0,\u00a08.9]"),
        (1e-9, -2e-9, 3e-9, "+1.00×10⁻⁹ [−2.00×10⁻⁹,\u00a03.00×10⁻⁹]"),
        (math.inf, math.inf, math.inf, "+∞ [∞,\u00a0∞]"),
        (0.5, math.nan, math.nan, "+0.500"),
        (0.2, 0.2, 0.2, "+0.200 [0.200,\u00a00.200]"),
        (0.0, -0.5, 0.5, "0.0 [−0.5,\u00a00.5]"),
        (-0.01, -0.5, 0.5, "0.0 [−0.5,\u00a00.5]"),
        (1e-6, 0.0, 2e-6, "+0.0000010 [0.0000000,\u00a00.0000020]"),
        (5e-7, 0.0, 1e-6, "+5.00×10⁻⁷ [0,\u00a01.00×10⁻⁶]"),
        (1.0, 0.0, 1.5, "+1.0 [0.0,\u00a01.5]"),
        (1.0, -9.0, 1.0, "+1 [−9,\u00a01]"),
        (152_499.0, 100_999.0, 200_999.0, "+152,000 [101,000,\u00a0201,000]"),
        (600_000.0, 0.0, 999_999.0, "+600,000 [0,\u00a01,000,000]"),
        (600_000.0, 0.0, 1e6, "+600,000 [0,\u00a01.00×10⁶]"),
        (600_000.0, -1e6, 0.5, "+600,000 [−1.00×10⁶,\u00a00.500]"),
        (0.25, math.nan, 0.5, "+0.250 [–,\u00a00.500]"),
        (math.nan, 0.25, 0.5, "– [0.25,\u00a00.50]"),
    ],
)
def test_no_digit_is_finer_than_the_interval(value, low, high, text):
    assert number_format.measured(value, low, high) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.500"), (-12.345, "−12.3"), (0.0, "0"), (1e6, "+1.00×10⁶"), (math.nan, "–")]
)
def test_a_change_of_loss_has_a_sign(value, text):
    assert number_format.nats(value) == text


def test_an_interval_without_ends_is_nothing():
    assert number_format.spread(math.nan, math.nan) == ""
    assert number_format.spread(-0.00021, 0.000013) == "[−0.00021,\u00a00.00001]"
    assert number_format.rho(0.5, math.nan, math.nan) == "0.50"
    assert number_format.rho(0.5, math.nan, 0.75) == "0.50 [–,\u00a00.75]"
    assert number_format.rho(0.5, 0.25, math.nan) == "0.50 [0.25,\u00a0–]"
    assert number_format.rho(-0.5, -0.75, 0.125) == "−0.50 [−0.75,\u00a00.12]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (37.0444, "37.04"),
        (999.994, "999.99"),
        (1000.0, "1,000"),
        (2117.3, "2,120"),
        (4.04e6, "4.04×10⁶"),
        (math.inf, "∞"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_perplexity(value, text):
    assert number_format.perplexity(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0002, "0.00020"), (0.25, "0.25"), (1, "1.0"), (8.7e-19, "8.7×10⁻¹⁹")])
def test_p_value(value, text):
    assert number_format.p_value(value) == text


def test_a_loss_that_overflows_is_an_infinite_perplexity():
    assert number_format.exp(1e4) == math.inf
    assert number_format.exp(0) == 1


def test_plural():
    assert [number_format.plural(n, "layer") for n in (0, 1, 1200)] == ["0 layers", "1 layer", "1,200 layers"]


@pytest.mark.parametrize(("value", "text"), [(-0.414, "−0.41"), (0.5, "0.50"), (None, "–"), (math.nan, "–")])
def test_coefficient(value, text):
    assert number_format.coefficient(value) == text


@pytest.mark.parametrize(("value", "text"), [(1_234_567.0, "1,234,567"), (0, "0"), (None, "–"), (math.nan, "–")])
def test_count(value, text):
    assert number_format.count(value) == text
