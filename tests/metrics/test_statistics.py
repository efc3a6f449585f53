"""Intervals hold what they promise; the rest by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from vitcmp.metrics.statistics import (
    Crossover,
    Ratio,
    crossover,
    exponent,
    is_tie,
    median_interval,
    paired_ratio,
    unpaired_ratio,
)


@pytest.mark.parametrize(("n", "low", "high"), [(1, 1, 1), (5, 1, 5), (6, 1, 6), (9, 2, 8), (15, 4, 12), (50, 18, 33)])
def test_the_median_interval_takes_the_order_statistics_of_the_tables(n: int, low: int, high: int) -> None:
    assert median_interval(list(range(n, 0, -1))) == (low, high)


def test_the_median_interval_covers_a_skewed_median() -> None:
    samples = np.random.default_rng(0).lognormal(sigma=1, size=(2000, 30))
    intervals = np.array([median_interval(row) for row in samples])
    covered = ((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1)).mean()
    assert 0.94 < covered < 0.975


def test_a_paired_ratio_sees_through_noise_that_both_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.lognormal(sigma=1, size=40)
    a, b = 1.1 * shared * rng.lognormal(sigma=0.01, size=40), shared
    ratio = paired_ratio(a, b)
    assert ratio.low < 1.1 < ratio.high
    assert ratio.high - ratio.low < 0.02
    assert paired_ratio(b, a).value == pytest.approx(1 / ratio.value)
    assert paired_ratio(b, a).low == pytest.approx(1 / ratio.high)
    # The common prefix: what only one of the two went on to measure says nothing.
    assert paired_ratio([*a, 9e9], b) == ratio


def test_a_paired_ratio_inverts_the_sign_test() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(sigma=0.1, size=25), rng.lognormal(sigma=0.1, size=25)
    ratio = paired_ratio(a, b)
    for bound, inside in ((ratio.low, 1.001), (ratio.high, 0.999)):
        assert stats.binomtest(int((a / b > bound * inside).sum()), 25).pvalue > 0.05
        assert stats.binomtest(int((a / b > bound / inside).sum()), 25).pvalue <= 0.05


def test_disturbed_rounds_do_not_hide_a_difference() -> None:
    rng = np.random.default_rng(0)
    a, b = 1.05 * rng.lognormal(sigma=0.01, size=60), rng.lognormal(sigma=0.01, size=60)
    a[rng.random(60) < 0.2] *= 3
    b[rng.random(60) < 0.2] *= 3
    ratio = paired_ratio(a, b)
    assert 1 < ratio.low < 1.05 < ratio.high < 1.1


def test_five_rounds_tell_nothing() -> None:
    assert paired_ratio([2.0] * 5, [1.0] * 5) == Ratio(pytest.approx(2), 0, math.inf)
    assert paired_ratio([2.0] * 6, [1.0] * 6).low == pytest.approx(2)


def test_an_unpaired_ratio_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    ratios = [unpaired_ratio(1.2 * rng.lognormal(sigma=0.1, size=30), rng.lognormal(sigma=0.1, size=50))
              for _ in range(200)]  # fmt: skip
    assert np.mean([r.low <= 1.2 <= r.high for r in ratios]) > 0.9
    assert np.median([r.value for r in ratios]) == pytest.approx(1.2, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "floor", "tie"),
    [
        (Ratio(1.05, 0.99, 1.1), 0.0, True),
        (Ratio(1.05, 1.02, 1.1), 0.0, False),
        (Ratio(1.05, 1.02, 1.1), 0.06, True),
        (Ratio(0.95, 0.92, 0.98), 0.04, False),
    ],
)
def test_a_tie_is_in_the_interval_or_in_the_noise(ratio: Ratio, floor: float, tie: bool) -> None:
    assert is_tie(ratio, floor) is tie


def test_exponents() -> None:
    exact = exponent([1024, 256, 512], [3 * 1024**2, 3 * 256**2, 3 * 512**2])
    assert exact is not None
    assert (exact.value, exact.low, exact.high) == pytest.approx((2, 2, 2))
    assert exact.sizes == (256, 512, 1024)
    sizes, values = [64, 128, 256, 512], [1.0, 2.2, 3.9, 8.3]
    fit, reference = exponent(sizes, values), stats.linregress(np.log(sizes), np.log(values))
    assert fit is not None
    assert fit.value == pytest.approx(reference.slope)
    assert fit.high - fit.value == pytest.approx(stats.t.ppf(0.975, 2) * reference.stderr)
    two = exponent([64, 256], [1.0, 4.0])
    assert two is not None
    assert (two.value, two.low, two.high) == (pytest.approx(1), -math.inf, math.inf)
    assert exponent([64, 128], [1.0, 0.0]) is None


def noisy(value: float, rng: np.random.Generator, sigma: float = 0.02) -> list[float]:
    return (value * rng.lognormal(sigma=sigma, size=40)).tolist()


def test_a_crossover_is_where_the_lines_meet() -> None:
    rng = np.random.default_rng(0)
    sizes = (64, 256, 1024, 4096)
    own = {n: noisy(n, rng) for n in sizes}
    reference = {n: [noisy(9e9, rng), noisy(n**2 / 430, rng)] for n in sizes}
    found = crossover(own, reference)
    assert found.tokens == pytest.approx(430, rel=0.03)
    assert found.low < 430 < found.high
    assert found.high / found.low < 1.1
    assert str(found) == f"{found.tokens:,.0f} ({found.low:,.0f} to {found.high:,.0f})"
    # The best of the reference at each size counts, and the other way round there is none.
    assert str(crossover({n: reference[n][1] for n in sizes}, {n: [own[n]] for n in sizes})) == "none up to 4,096"
    assert str(crossover(own, {n: [noisy(9e9, rng)] for n in sizes})) == "from 64 or below"


def test_the_last_change_counts() -> None:
    own = {1: [1.0], 2: [2.0], 4: [1.0], 8: [1.0]}
    reference = {1: [[2.0]], 2: [[1.0]], 4: [[2.0]], 8: [[2.0]], 16: [[1.0]]}
    found = crossover(own, reference)
    # Half-way between 2 and 4 on the logarithmic scale.
    assert found.tokens == pytest.approx(2 * math.sqrt(2))
    assert found.sizes == (1, 2, 4, 8)
    assert crossover({**own, 16: [2.0]}, reference).tokens is None
    with pytest.raises(ValueError, match="no common token count"):
        crossover({32: [1.0]}, reference)


def test_doubt_at_the_ends_is_said() -> None:
    rng = np.random.default_rng(0)
    own = {n: noisy(1.0, rng, 0.2) for n in (64, 4096)}
    found = crossover(own, {64: [noisy(0.5, rng, 0.2)], 4096: [noisy(1.02, rng, 0.2)]})
    assert math.isinf(found.high)
    assert "4,096" in str(found)
    assert str(Crossover(4000, 3100, math.inf, (64, 4096))) == "4,000 (3,100 to above 4,096)"
    assert str(Crossover(70, 64, 90, (64, 4096))) == "70 (64 or below to 90)"
    assert str(Crossover(None, 3900, math.inf, (64, 4096))) == "none up to 4,096 (95 %: from 3,900)"
    assert str(Crossover(64, 64, 90, (64, 4096))) == "from 64 or below (95 %: to 90)"
