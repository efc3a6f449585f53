"""Attention in blocks of queries: equal to the same with all weights in memory."""

from __future__ import annotations

import pytest
import torch
from attention_cases import relative
from torch import Tensor

from vitcmp.attention import _blockwise
from vitcmp.attention._blockwise import attend, attend_at_once

KINDS = {"softmax": (None, None), "sigmoid": (None, -2.0), "difference": (0.3, None)}
every_kind = pytest.mark.parametrize(("share", "bias"), KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one head and three queries; the last ones have two."""
    for name, value in {"BLOCK_SCORES": {"cpu": 60}, "MIN_QUERIES": 3, "MIN_TOKENS": 0}.items():
        monkeypatch.setattr(_blockwise, name, value)


def make_leaves(share: float | None, dtype: torch.dtype = torch.float64, tokens: int = 20) -> list[Tensor]:
    """q, k and v as MultiHead hands them over, and the share."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, tokens, 3, 8, generator=generator, dtype=torch.float64).to(dtype).transpose(2, 3)
    leaves = [*x.unbind(0)]
    if share is not None:
        leaves.append(torch.tensor(share, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    return [leaf.detach().requires_grad_() for leaf in leaves]


def at_once(q: Tensor, k: Tensor, v: Tensor, share: Tensor | None = None, bias: float | None = None) -> Tensor:
    maps = 1 if share is None else 2
    q, k = (torch.stack(x.chunk(maps, dim=-1)) for x in (q, k))
    return attend_at_once(q, k, v, share, bias)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_blocks_equal_the_whole(share: float | None, bias: float | None, dtype: torch.dtype, tolerance: float) -> None:
    leaves = make_leaves(share, dtype)
    results = []
    for y in (attend(*leaves, bias=bias), at_once(*(x.double() for x in leaves), bias=bias)):
        upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for found, wanted in zip(*results, strict=True):
        assert relative(found, wanted) < tolerance


@every_kind
def test_gradients_can_be_differentiated(share: float | None, bias: float | None) -> None:
    leaves = make_leaves(share, tokens=5)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, bias=bias), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, bias=bias), leaves, fast_mode=True)


@every_kind
def test_the_compiler_takes_it_whole(share: float | None, bias: float | None) -> None:
    leaves = make_leaves(share)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for form in (attend, compiled):
        y = form(*leaves, bias=bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for wanted, found in zip(*results, strict=True):
        assert relative(found, wanted) < 1e-12


def test_every_query_is_in_one_block() -> None:
    seen = torch.zeros(7, 20, dtype=torch.int64)
    for heads, rows in _blockwise._blocks(torch.empty(1, 7, 20, 4)):
        seen[heads, rows] += 1
    assert (seen == 1).all()
