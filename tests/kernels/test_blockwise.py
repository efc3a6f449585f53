"""Sigmoid attention in blocks of queries: equal to the same with all weights in memory."""

from __future__ import annotations

import pytest
import torch
from attention_cases import relative
from torch import Tensor

from vitcmp.kernels.ops import blockwise
from vitcmp.kernels.ops.blockwise import attend, explicit

BIAS = -2.0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one head and three queries; the last ones have two."""
    for name, value in {"BLOCK_SCORES": {"cpu": 60}, "MIN_QUERIES": 3, "MIN_TOKENS": 0}.items():
        monkeypatch.setattr(blockwise, name, value)


def make_leaves(dtype: torch.dtype = torch.float64, tokens: int = 20) -> list[Tensor]:
    """q, k and v as MultiHead hands them over."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, tokens, 3, 8, generator=generator, dtype=torch.float64).to(dtype).transpose(2, 3)
    return [leaf.detach().requires_grad_() for leaf in x]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_blocks_equal_the_whole(dtype: torch.dtype, tolerance: float) -> None:
    leaves = make_leaves(dtype)
    results = []
    for y in (attend(*leaves, BIAS), explicit(*(x.double() for x in leaves), BIAS)):
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for found, wanted in zip(*results, strict=True):
        assert relative(found, wanted) < tolerance


def test_gradients_can_be_differentiated() -> None:
    leaves = make_leaves(tokens=5)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, BIAS), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, BIAS), leaves, fast_mode=True)


def test_the_compiler_takes_it_whole() -> None:
    leaves = make_leaves()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for form in (attend, compiled):
        y = form(*leaves, BIAS)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for wanted, found in zip(*results, strict=True):
        assert relative(found, wanted) < 1e-12


def test_every_query_is_in_one_block() -> None:
    seen = torch.zeros(7, 20, dtype=torch.int64)
    for heads, rows in blockwise._blocks(torch.empty(7, 20, 4), 20):
        seen[heads, rows] += 1
    assert (seen == 1).all()
