"""Vectors of numbers in compiled functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from vitcmp.kernels.numba import simd


@pytest.mark.parametrize("compresses", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_chosen_lanes_are_packed(compresses: bool, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's instruction, where it has one, and without."""
    monkeypatch.setattr(simd, "COMPRESSES", compresses and simd.COMPRESSES)

    @njit
    def pack(x, found, place):  # type: ignore[no-untyped-def]
        n = 0
        for j in range(0, len(x), simd.LANES):
            part = simd.load_part(x, j, len(x) - j, -1.0)
            chosen = part > 0
            simd.append(found, n, part, chosen)
            simd.append(place, n, simd.places(j), chosen)
            n += simd.count(chosen)
        return n

    x = np.random.default_rng(0).normal(size=50).astype(dtype)
    x[7] = np.nan  # is not dropped
    found, place = np.zeros(70, dtype), np.zeros(70, np.int32)
    n = pack(x, found, place)
    wanted = np.flatnonzero(~(x <= 0))
    np.testing.assert_array_equal(place[:n], wanted)
    np.testing.assert_array_equal(found[:n], x[wanted])


def test_a_vector_meets_numbers_and_nan() -> None:
    @njit
    def mix(x, out):  # type: ignore[no-untyped-def]
        a = simd.load(x, 0)
        simd.store(out, 0, simd.larger(0.0, (a * 2 - 1) / 4))
        simd.store_part(out, simd.LANES, 3, simd.where(a > 0, a, -1.0))
        return simd.total_of(a), simd.largest(a)

    x, out = np.linspace(-1, 2, simd.LANES, dtype=np.float32), np.zeros(2 * simd.LANES, np.float32)
    total, largest = mix(x, out)
    np.testing.assert_allclose((total, largest), (x.sum(), x.max()), rtol=1e-6)
    np.testing.assert_allclose(out[: simd.LANES], np.maximum(0, (x * 2 - 1) / 4), rtol=1e-6)
    np.testing.assert_array_equal(out[simd.LANES :], [-1, -1, -1, *[0] * (simd.LANES - 3)])
    x[5] = np.nan
    mix(x, out)
    assert np.flatnonzero(np.isnan(out)).tolist() == [5]


def test_powers_of_two() -> None:
    @njit
    def powers(x, out):  # type: ignore[no-untyped-def]
        for j in range(0, len(x), simd.LANES):
            simd.store(out, j, simd.exp2(simd.load(x, j)))

    x, out = np.linspace(-126, 127, 16_000, dtype=np.float32), np.empty(16_000, np.float32)
    powers(x, out)
    np.testing.assert_allclose(out, 2.0 ** x.astype(np.float64), rtol=3e-7)
    x[:3] = -np.inf, np.nan, -1e30
    powers(x, out)
    assert 0 <= out[0] < 2e-38
    assert np.isnan(out[1])
    assert 0 <= out[2] < 2e-38


@pytest.mark.parametrize("multiplies", [True, False])
def test_pairs_of_bf16_are_multiplied(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's instruction, where it has one, and without."""
    monkeypatch.setattr(simd, "MULTIPLIES_PAIRS", multiplies and simd.MULTIPLIES_PAIRS)

    @njit
    def multiply(a, x, y, out):  # type: ignore[no-untyped-def]
        pairs = simd.pair(simd.load(x, 0), simd.load(y, 0))
        simd.store(out, 0, simd.multiply_add(a, 1, pairs, simd.splat(0.5, out)))

    a, x, y = (np.random.default_rng(i).normal(size=16).astype(np.float32) for i in range(3))
    short = [torch.from_numpy(z).bfloat16() for z in (a, x, y)]
    out = np.empty(16, np.float32)
    multiply(short[0].view(torch.int16).numpy().view(np.int32), x, y, out)
    a, x, y = (z.float().numpy() for z in short)
    np.testing.assert_allclose(out, 0.5 + a[2] * x + a[3] * y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
@pytest.mark.parametrize(("few", "n"), [(16, 16), (1, 1), (3, 13), (16, 32), (5, 31)])
@pytest.mark.parametrize("apart", [16, 32])
def test_rows_are_transposed(apart: int, few: int, n: int, dtype: type) -> None:
    share = 4 // np.dtype(dtype).itemsize
    n = min(n, simd.LANES * share)

    @njit
    def transpose(x, out):  # type: ignore[no-untyped-def]
        simd.store_transposed(out, 2, apart, x, 1, 33, few, n)

    x = np.arange(1, 1 + (few - 1) * 33 + 1 + n, dtype=dtype)
    out = np.full(2 + 17 * apart, -1, np.float32 if share == 1 else np.int32)
    transpose(x, out)
    words = -(-n // share)
    rows = np.zeros((simd.LANES, words * share), dtype)
    for i in range(simd.LANES):
        start = 1 + min(i, few - 1) * 33
        rows[i, :n] = x[start : start + n]
    wanted = rows.view(out.dtype).T
    lines = out[2 : 2 + words * apart].reshape(words, apart)
    np.testing.assert_array_equal(lines[:, : simd.LANES], wanted)
    assert (out[:2] == -1).all()
    assert (lines[:, simd.LANES :] == -1).all()
    assert (out[2 + words * apart :] == -1).all()


def test_a_polynomial() -> None:
    cubic = simd.polynomial(2.0, 0.0, -1.0, 0.5)

    @njit
    def evaluate(x, out):  # type: ignore[no-untyped-def]
        simd.store(out, 0, cubic(simd.load(x, 0)))

    x, out = np.linspace(-2, 2, simd.LANES, dtype=np.float32), np.zeros(simd.LANES, np.float32)
    evaluate(x, out)
    np.testing.assert_allclose(out, 2 * x**3 - x + 0.5, rtol=1e-5, atol=1e-6)
