"""Bias with GELU, and LayerNorm, by compiled kernels: as torch's, and as torch's in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.ops.rows import _gelu as bias_gelu
from vitcmp.kernels.ops.rows import _norm as norm
from vitcmp.kernels.ops.rows import layer_norm, linear_gelu

SHAPES = [(1, 1), (3, 7), (2, 65, 192), (130, 16), (257, 50)]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check(ours: Callable[..., Tensor], torchs: Callable[..., Tensor], inputs: list[Tensor], tolerance: float) -> None:
    """Values and gradients are those of torch in fp64, and as near to it as torch's own in this number format."""
    upstream = torch.randn(inputs[0].shape).to(inputs[0].dtype)
    wanted = gradients(torchs, [x.double() for x in inputs], upstream)
    for found, exact in zip(gradients(ours, inputs, upstream), wanted, strict=True):
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_gelu_is_torchs(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    inputs = [(3 * torch.randn(shape)).to(dtype), torch.randn(shape[-1])]
    check(bias_gelu, lambda x, b: F.gelu(x + b), inputs, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_norm_is_torchs(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    x = (2 * torch.randn(shape) + 1).to(dtype)
    check(
        lambda x, w, b: norm(x, w, b, 1e-6, dtype == torch.bfloat16)[0],
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6),
        [x, torch.randn(shape[-1]), torch.randn(shape[-1])],
        tolerance,
    )


def test_gelu_in_its_tails() -> None:
    x = torch.tensor([-1e30, -100.0, -6.0, -5.2, 5.2, 6.0, 100.0, 1e30, torch.inf, torch.nan, 0.0])
    found, slope = gradients(lambda x: bias_gelu(x, torch.zeros(len(x))), [x], torch.ones(len(x)))
    wanted, slopes = gradients(F.gelu, [x.double()], torch.ones(len(x)))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=6e-7, equal_nan=True)
    torch.testing.assert_close(slope[:8].double(), slopes[:8], rtol=0, atol=1e-6)
    assert slope[9].isnan()


def test_a_row_that_is_not_finite_stays_alone() -> None:
    x = torch.randn(20, 48)
    x[3, 5], x[7, 0] = torch.inf, torch.nan
    out = norm(x, torch.ones(48), torch.zeros(48), 1e-6, False)[0]
    assert out.isfinite().all(dim=1).tolist() == [i not in (3, 7) for i in range(20)]


@pytest.mark.parametrize(("in_bf16", "tolerance"), [(False, 5e-6), (True, 2**-6)])
def test_the_forms_agree(in_bf16: bool, tolerance: float) -> None:
    x, w, b = torch.randn(40, 65, 48), torch.randn(96, 48) / 7, torch.randn(96)
    for operator, args in ((linear_gelu, (x, w, b, in_bf16)), (layer_norm, (x, w[0], w[1], 1e-6, in_bf16))):
        assert operator.can_compile(*args)
        compiled, plain = operator(*args, form="numba"), operator(*args, form="torch")
        assert compiled.dtype == plain.dtype == (torch.bfloat16 if in_bf16 else torch.float32)
        torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=tolerance)
        assert not torch.equal(compiled, plain), "both took the same way"


def test_gradients_can_be_differentiated_again() -> None:
    x, w, b = (torch.randn(s, dtype=torch.float32, requires_grad=True) for s in ((4, 8), (8,), (8,)))
    for ours, torchs in (
        (lambda: bias_gelu(x, b), lambda: F.gelu(x + b)),
        (lambda: norm(x, w, b, 1e-6, False)[0], lambda: F.layer_norm(x, (8,), w, b, 1e-6)),
    ):
        seconds = []
        for function in (ours, torchs):
            (first,) = torch.autograd.grad(function().square().sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(first.square().sum(), (x, b)))
        for found, wanted in zip(*seconds, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_torchs_rules(dtype: torch.dtype) -> None:
    x = torch.randn(6, 16, dtype=dtype, requires_grad=True)
    w, b = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(bias_gelu.overload, (x, b), test_utils=checks)
    torch.library.opcheck(norm.overload, (x, w, b, 1e-6, dtype == torch.bfloat16), test_utils=checks)


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x, b, upstream = torch.randn(700, 48), torch.randn(48), torch.randn(700, 48)
    found = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            found.append(gradients(lambda x, w, b: norm(bias_gelu(x, b), w, b, 1e-6, False)[0], [x, b, b], upstream))
        finally:
            torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
