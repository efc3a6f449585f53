"""The pseudo-inverse of many small matrices by iteration: by torch's products, or by a kernel for a forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator

MAX_COMPILED = 64
"""Largest matrix of the kernel; for larger ones torch's products are as quick."""


def by_products(a: Tensor, iterations: int) -> Tensor:
    """Nearly the pseudo-inverse of each matrix of [..., m, m], all with non-negative entries and row sums of 1."""
    # |A|_inf, the largest row sum, is 1; |A|_1 is the largest column sum.
    z = (a.transpose(-2, -1) / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)).flatten(0, -3)
    flat = a.flatten(0, -3)
    for _ in range(iterations):
        # Multiplied out, which needs no I: Z (13 I - P) / 4, P = A Z (15 I - A Z (7 I - A Z)).
        az = flat @ z
        p = torch.baddbmm(az, az, torch.baddbmm(az, az, az, beta=-7), beta=15)
        z = torch.baddbmm(z, z, p, beta=13 / 4, alpha=-1 / 4)
    return z.view_as(a)


@torch_operator("pseudo_inverse")
def _without_gradient(a: Tensor, iterations: int) -> Tensor:
    """The same, for matrices so small that torch's products are mostly calls."""
    from vitcmp.kernels.numba import nystromformer as cpu

    a, size = a.detach().contiguous(), a.shape[-1]
    out, matrices = torch.empty_like(a), a.numel() // size**2
    arrays = a.view(-1).numpy(), out.view(-1).numpy()
    share_out(cpu.pseudo_inverse, matrices, min(matrices, torch.get_num_threads()), *arrays, size, iterations)
    return out


@_without_gradient.register_fake
def _(a: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


_without_gradient.register_flops(lambda a, iterations: 8 * iterations * math.prod(a) * a[-1])  # four products a step


def _example(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Tensor, int]:
    m, matrices = sizes
    generator = torch.Generator().manual_seed(0)
    return torch.randn(matrices, 1, m, m, generator=generator).softmax(dim=-1).to(dtype), 6


pseudo_inverse = Operator(
    "pseudo_inverse", "*MM", {"torch": by_products, "numba": _without_gradient},
    accepts=lambda a, iterations: a.dtype == torch.float32
    and a.dim() > 2
    and a.shape[-1] <= MAX_COMPILED
    and not (a.requires_grad and torch.is_grad_enabled()),
    sizes=lambda a, iterations: (a.shape[-1], a.numel() // max(1, a.shape[-1]) ** 2),
    unmeasured=lambda dtype, trains: ("numba", "torch"),
    example=_example, grid=[(m, n) for m in (16, 32, 64) for n in (8, 256)],
    tolerance={torch.float32: 1e-4}, has_gradient=False,
)  # fmt: skip
