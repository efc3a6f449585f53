"""What samples of latency say: medians, ratios, exponents and crossovers, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

Samples = Sequence[float] | np.ndarray
RESAMPLES = 500


@dataclass(frozen=True)
class Ratio:
    """How many times as large one quantity is as another; unbounded (0 to inf) where samples are too few to say."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Exponent:
    """The p of value ~ tokens^p; with two sizes, the slope between them, and the interval is infinite."""

    value: float
    low: float
    high: float
    sizes: tuple[int, ...]
    """The token counts that it was fitted to."""


@dataclass(frozen=True)
class Crossover:
    """The token count from which on a mechanism is quicker than its reference, up to the largest one measured."""

    tokens: float | None
    """The smallest size where it was quicker at every size; None where it was not quicker at the largest."""
    low: float
    high: float
    """Infinite where the interval reaches beyond the largest size."""
    sizes: tuple[int, ...]
    """The token counts at which both were measured."""

    def __str__(self) -> str:
        """Such as "430 (390 to 480)", "none up to 4,096" or "from 64 or below"."""
        first, last = self.sizes[0], self.sizes[-1]
        low = f"{first:,} or below" if self.low <= first else f"{self.low:,.0f}"
        high = f"above {last:,}" if math.isinf(self.high) else f"{self.high:,.0f}"
        if self.tokens is None:
            return f"none up to {last:,}" + (f" (95 %: from {low})" if math.isfinite(self.low) else "")
        if self.tokens <= first:
            return f"from {first:,} or below" + (f" (95 %: to {high})" if self.high > first else "")
        return f"{self.tokens:,.0f} ({low} to {high})"


def median_interval(samples: Samples, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the median from order statistics, whatever the distribution.

    Below 6 samples their whole range, which covers less: 94 % for 5, 50 % for 2.
    """
    # How many fair coins of n show heads: as many samples are left out at either end as chance rarely falls short of.
    chances = special.bdtr(np.arange(len(samples)), len(samples), 0.5)
    left_out = max(0, int(np.searchsorted(chances, (1 - confidence) / 2, side="right")) - 1)
    ordered = np.sort(samples)
    return float(ordered[left_out]), float(ordered[-1 - left_out])


def paired_ratio(a: Samples, b: Samples, confidence: float = 0.95) -> Ratio:
    """`a` over `b` from samples of the same rounds: the median of the rounds' ratios, over the rounds that both have.

    The interval is that of the sign test. Each round is shuffled, so two copies are as likely to be quicker one way as
    the other, round by round, whatever the noise was and however one round resembles the next: it holds where those of
    two medians would not. Wilcoxon's test holds as well, but rounds that another program disturbed outweigh the others
    in it: on recorded noise of a busy machine it finds far fewer differences.
    """
    n = min(len(a), len(b))
    logs = np.log(np.asarray(a[:n], dtype=float)) - np.log(np.asarray(b[:n], dtype=float))
    value, (low, high) = float(np.exp(np.median(logs))), np.exp(median_interval(logs, confidence))
    # All n rounds agree by chance in 2 of 2^n cases: below 6 rounds, too often for 95 %.
    return Ratio(value, float(low), float(high)) if 2.0 ** (1 - n) <= 1 - confidence else Ratio(value, 0.0, math.inf)


def unpaired_ratio(a: Samples, b: Samples, confidence: float = 0.95) -> Ratio:
    """The median of `a` over that of `b` from samples of different rounds or runs, by bootstrap.

    Noise that a whole run shares is not in the interval.
    """
    rng = np.random.default_rng(0)
    ratios = _resampled_medians(a, rng) / _resampled_medians(b, rng)
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def is_tie(ratio: Ratio, noise_floor: float) -> bool:
    """Whether the two cannot be told apart: the interval holds 1, or the value is that near 1 (a fraction)."""
    return ratio.low <= 1 <= ratio.high or abs(ratio.value - 1) <= noise_floor


def exponent(tokens: Sequence[int], values: Sequence[float], confidence: float = 0.95) -> Exponent | None:
    """Least squares on a log-log scale, with Student's interval; None below two sizes with a positive value."""
    points = [(n, value) for n, value in zip(tokens, values, strict=True) if value > 0]
    sizes = tuple(sorted({n for n, _ in points}))
    if len(sizes) < 2:
        return None
    x, y = np.log(points).T
    slope, shift = np.polyfit(x, y, 1)
    half, freedom = math.inf, len(points) - 2
    if len(sizes) > 2:
        variance = ((y - slope * x - shift) ** 2).sum() / freedom / ((x - x.mean()) ** 2).sum()
        half = special.stdtrit(freedom, (1 + confidence) / 2) * math.sqrt(variance)
    return Exponent(float(slope), float(slope - half), float(slope + half), sizes)


def crossover(
    own: Mapping[int, Samples], reference: Mapping[int, Sequence[Samples]], confidence: float = 0.95
) -> Crossover:
    """Where a mechanism becomes, and stays, quicker than the best of the reference's implementations.

    By token count: samples of the mechanism, and lists of samples of the reference, of which the one with the lowest
    median counts. Between measured sizes the ratio is linear on a log-log scale. The interval is by bootstrap over the
    rounds that all of a size have; a resample in which the mechanism is not quicker at the end counts as infinite.

    Raises: ValueError where no size has both.
    """
    sizes = tuple(sorted(n for n in own if len(own[n]) and any(map(len, reference.get(n, ())))))
    if not sizes:
        raise ValueError("the mechanism and the reference were measured at no common token count")
    rng = np.random.default_rng(0)
    exact, resampled = [], []
    for n in sizes:
        lists = [own[n], *filter(len, reference[n])]
        rounds = min(map(len, lists))
        table = np.log(np.array([samples[:rounds] for samples in lists]))
        drawn = table[:, rng.integers(rounds, size=(RESAMPLES, rounds))]
        exact.append(_lead(np.median(table, axis=-1)))
        resampled.append(_lead(np.median(drawn, axis=-1)))
    value = _last_crossing(sizes, np.array(exact)[None])[0]
    crossings = np.sort(_last_crossing(sizes, np.array(resampled).T))
    left_out = int(RESAMPLES * (1 - confidence) / 2)
    return Crossover(
        float(value) if math.isfinite(value) else None,
        float(crossings[left_out]),
        float(crossings[-1 - left_out]),
        sizes,
    )


def _lead(medians: np.ndarray) -> np.ndarray:
    """By how much the first (of log-latencies) is slower than the best of the others; negative: quicker."""
    return medians[0] - medians[1:].min(axis=0)


def _last_crossing(sizes: Sequence[int], slower_by: np.ndarray) -> np.ndarray:
    """Of [rows, sizes]: the size beyond the last one that was not quicker, between it and the next; inf: none."""
    x = np.log(sizes)
    result = np.full(len(slower_by), float(sizes[0]))
    for i in range(len(sizes)):
        slower = slower_by[:, i] >= 0
        if i + 1 == len(sizes):
            result[slower] = math.inf
            break
        before, after = slower_by[slower, i], slower_by[slower, i + 1]
        # Where the next is slower, too, the step to it overwrites this one.
        share = before / np.where(after < 0, before - after, 1)
        result[slower] = np.exp(x[i] + np.clip(share, 0, 1) * (x[i + 1] - x[i]))
    return result


def _resampled_medians(samples: Samples, rng: np.random.Generator) -> np.ndarray:
    values = np.asarray(samples, dtype=float)
    return np.median(values[rng.integers(len(values), size=(4 * RESAMPLES, len(values)))], axis=1)
