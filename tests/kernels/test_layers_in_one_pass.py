"""LayerNorm with what follows it, and a projection with what it is added to, in one pass: as torch's in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.ops import layers

SIZES = [(1, 16, 16), (77, 32, 96), (1, 48, 144), (531, 48, 192), (300, 128, 512)]
"""Rows, inputs, outputs: less and more than a block, all columns in whole panels or not."""
EPS = 1e-6


def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, w: Tensor, b: Tensor | None, in_bf16: bool
) -> Tensor:
    return layers._norm_linear(x, weight, bias, w, b, eps, in_bf16)


def add_linear(x: Tensor, y: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return layers._add_linear(x, y, w, b, y.dtype == torch.bfloat16)


def norm_mlp(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *matrices_and_format: Any) -> Tensor:
    *matrices, in_bf16 = matrices_and_format
    return layers._norm_mlp(x, weight, bias, *matrices, eps, in_bf16)


def parameters(width: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """A norm's weight and bias, then matrices and vectors."""
    return [1 + torch.randn(width) / 10, torch.randn(width) / 10, *(torch.randn(s) / s[-1] ** 0.5 for s in shapes)]


def gradients(function: Callable[..., Tensor], inputs: list[Any], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in inputs]
    out = function(*leaves)
    found = torch.autograd.grad(out, [x for x in leaves if isinstance(x, Tensor)], upstream.to(out.dtype))
    return [out.detach(), *found]


def check(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Any], tolerance: float) -> None:
    """Values and all gradients are those of torch in fp64."""
    exact = [x.double() if isinstance(x, Tensor) else x for x in inputs]
    upstream = torch.randn_like(plain(*exact)).float()
    wanted = gradients(plain, exact, upstream.double())
    for found, right in zip(gradients(ours, inputs, upstream), wanted, strict=True):
        assert found.shape == right.shape
        assert (found.double() - right).abs().max() <= tolerance * right.abs().max()


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(F.layer_norm(x, weight.shape, weight, bias, EPS), w, b)


def plain_mlp(x: Tensor, weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return x + F.linear(F.gelu(plain_linear(x, weight, bias, w1, b1)), w2, b2)


@pytest.mark.parametrize(("rows", "width", "columns"), SIZES)
@pytest.mark.parametrize(("in_bf16", "tolerance"), [(False, 3e-6), (True, 2**-6)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layer(with_bias: bool, in_bf16: bool, tolerance: float, rows: int, width: int, columns: int) -> None:
    weight, bias, w, b = parameters(width, (columns, width), (columns,))
    check(
        lambda x, weight, bias, w, b: norm_linear(x, weight, bias, EPS, w, b, in_bf16),
        plain_linear, [2 * torch.randn(rows, width) + 1, weight, bias, w, b if with_bias else None], tolerance,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "width", "columns"), SIZES)
@pytest.mark.parametrize(("in_bf16", "tolerance"), [(False, 3e-6), (True, 2**-6)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_sum(with_bias: bool, in_bf16: bool, tolerance: float, rows: int, width: int, columns: int) -> None:
    *_, w, b = parameters(width, (columns, width), (columns,))
    check(
        lambda x, y, w, b: add_linear(x, y.bfloat16() if in_bf16 else y, w, b),
        lambda x, y, w, b: x + F.linear(y, w, b),
        [torch.randn(rows, columns), torch.randn(rows, width), w, b if with_bias else None], tolerance,
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "width", "hidden"), [(r, w, h) for r, w, h in SIZES if h % 32 == 0])
@pytest.mark.parametrize(("in_bf16", "tolerance"), [(False, 3e-6), (True, 2**-6)])
def test_an_mlp(in_bf16: bool, tolerance: float, rows: int, width: int, hidden: int) -> None:
    weight, bias, w1, b1, w2, b2 = parameters(width, (hidden, width), (hidden,), (width, hidden), (width,))
    check(
        lambda x, weight, bias, *matrices: norm_mlp(x, weight, bias, EPS, *matrices, in_bf16),
        plain_mlp, [torch.randn(rows, width), weight, bias, w1, b1, w2, b2], tolerance,
    )  # fmt: skip


def test_a_row_that_is_not_finite_stays_alone() -> None:
    x = torch.randn(70, 48)
    x[3, 5], x[66, 0] = torch.inf, torch.nan
    weight, bias, w1, b1, w2, b2 = parameters(48, (96, 48), (96,), (48, 96), (48,))
    for out in (
        norm_linear(x, weight, bias, EPS, w1, b1, False),
        norm_mlp(x, weight, bias, EPS, w1, b1, w2, b2, True),
        add_linear(x, torch.randn(70, 96), w2, b2),
    ):
        assert out.isfinite().all(dim=1).tolist() == [i not in (3, 66) for i in range(70)]


@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_result_does_not_depend_on_the_number_of_threads(in_bf16: bool) -> None:
    norm_and_matrices = parameters(48, (96, 48), (96,), (48, 96), (48,))
    x, upstream, threads, found = torch.randn(700, 48), torch.randn(700, 48), torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            found.append(
                gradients(
                    lambda x, weight, bias, *m: norm_mlp(x, weight, bias, EPS, *m, in_bf16),
                    [x, *norm_and_matrices], upstream,
                )
            )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_gradients_can_be_differentiated_again() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    weight, bias, w1, b1, w2, b2 = parameters(16, (32, 16), (32,), (16, 32), (16,))
    for ours, plain in (
        (lambda: norm_linear(x, weight, bias, EPS, w1, b1, False), lambda: plain_linear(x, weight, bias, w1, b1)),
        (
            lambda: norm_mlp(x, weight, bias, EPS, w1, b1, w2, b2, False),
            lambda: plain_mlp(x, weight, bias, w1, b1, w2, b2),
        ),
        (lambda: add_linear(x, x.sin() @ w1.T, w2, b2), lambda: x + F.linear(x.sin() @ w1.T, w2, b2)),
    ):
        seconds = []
        for function in (ours, plain):
            (first,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
        torch.testing.assert_close(*seconds, rtol=1e-3, atol=1e-3)


def test_the_operators_keep_torchs_rules() -> None:
    x, y = torch.randn(6, 16, requires_grad=True), torch.randn(6, 32, requires_grad=True)
    leaves = [p.requires_grad_() for p in parameters(16, (32, 16), (32,), (16, 32), (16,))]
    weight, bias, w1, b1, w2, b2 = leaves
    for operator, args in (
        (layers._norm_linear, (x, weight, bias, w1, b1, EPS, False)),
        (layers._norm_linear, (x, weight, bias, w1, None, EPS, True)),
        (layers._norm_mlp, (x, weight, bias, w1, b1, w2, b2, EPS, True)),
        (layers._add_linear, (x, y, w2, b2, False)),
    ):
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(operator.overload, args, test_utils=checks)


def test_without_wide_vectors_the_kernels_compute_the_same(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_layers_in_one_pass as t
t.test_an_mlp(True, 2**-6, 77, 32, 96)
"""
    variables = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True)


def test_rows_may_lie_in_memory_as_they_like() -> None:
    x = torch.randn(48, 70).T
    weight, bias, w1, b1, w2, b2 = parameters(48, (96, 48), (96,), (48, 96), (48,))
    for function in (
        lambda x: norm_linear(x, weight, bias, EPS, w1, b1, False),
        lambda x: norm_mlp(x, weight, bias, EPS, w1, b1, w2, b2, False),
        lambda x: add_linear(x, x, w1[:48], b2),
    ):
        upstream = torch.randn_like(function(x)).T.contiguous().T
        for ours, wanted in zip(
            gradients(function, [x], upstream), gradients(function, [x.contiguous()], upstream), strict=True
        ):
            assert torch.equal(ours, wanted)
