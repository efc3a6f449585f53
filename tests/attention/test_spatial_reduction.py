"""Spatial reduction: the regions, and what they leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map
from vitcmp.attention.spatial_reduction import region_means
from vitcmp.workflows.check import GRIDS


def pooling_matrix(grid: TokenGrid, regions: TokenGrid) -> Tensor:
    """P, [prefix tokens + regions, N], region by region."""
    prefix = grid.num_prefix_tokens
    rows = [torch.eye(grid.num_tokens, dtype=torch.float64)[t] for t in range(prefix)]
    tokens = torch.arange(prefix, grid.num_tokens).view(grid.height, grid.width)
    for band in tokens.tensor_split(regions.height, dim=0):
        for region in band.tensor_split(regions.width, dim=1):
            row = torch.zeros(grid.num_tokens, dtype=torch.float64)
            row[region.flatten()] = 1 / region.numel()
            rows.append(row)
    return torch.stack(rows)


def spatial_reduction_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, with the N x N matrix."""
    p = pooling_matrix(core.grid, core.regions)
    heads = []
    for qh, kh, vh in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):  # [N, K] each
        scores = qh @ (p @ kh).T / qh.shape[1] ** 0.5
        weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        heads.append((weights @ p) @ vh)
    return torch.stack(heads).view_as(q)


CASES = [Case("spatial-reduction", spatial_reduction_twin)]


@pytest.mark.parametrize("ratio", [2, 3, 7])
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.num_tokens < 200], ids=str)
def test_any_ratio_equals_the_twin(grid: TokenGrid, ratio: int) -> None:
    if ratio > max(grid.height, grid.width):
        return
    core = make_block(f"spatial-reduction:sr_ratio={ratio}", make_layer(grid)).core.double()
    q, k, v = make_qkv(grid.num_tokens)
    assert relative(core(q, k, v), spatial_reduction_twin(core, q, k, v)) < 1e-10


@pytest.mark.parametrize(
    ("grid", "regions"),
    [(TokenGrid(8, 8), TokenGrid(4, 4)), (TokenGrid(8, 6), TokenGrid(3, 6)), (TokenGrid(9, 23), TokenGrid(2, 5)),
     (TokenGrid(5, 7), TokenGrid(5, 7)), (TokenGrid(4, 7), TokenGrid(1, 1))],
    ids=str,
)  # fmt: skip
def test_means_and_their_gradients_are_exact(grid: TokenGrid, regions: TokenGrid) -> None:
    p = pooling_matrix(grid, regions)
    x = torch.randn(2, grid.num_tokens, 3, 4, dtype=torch.float64).transpose(1, 2).requires_grad_()  # as in a model
    upstream = torch.randn(2, 3, regions.num_tokens, 4, dtype=torch.float64)
    means = region_means(x, grid, regions)
    torch.testing.assert_close(means, p @ x)
    (gradient,) = torch.autograd.grad(means, x, upstream)
    torch.testing.assert_close(gradient, p.T @ upstream)
    assert torch.autograd.gradgradcheck(lambda x: region_means(x, grid, regions), x)
    half = region_means(x.bfloat16(), grid, regions)
    assert half.dtype == torch.bfloat16
    # Summed in fp32: no error beyond that of the last rounding.
    torch.testing.assert_close(half, (p @ x.bfloat16().double()).bfloat16(), rtol=2**-8, atol=1e-6)


def test_the_gradient_in_bf16_is_rounded_once() -> None:
    """17 x 17 patches are 289, which bf16 does not have."""
    grid, regions = TokenGrid(35, 35), TokenGrid(2, 2)
    x = torch.randn(grid.num_tokens, 8, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(4, 8, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(region_means(x, grid, regions), x, upstream)
    assert torch.equal(gradient, (pooling_matrix(grid, regions).T @ upstream.double()).bfloat16())


def test_ratio_one_is_softmax() -> None:
    with pytest.warns(DegenerateWarning, match="it is softmax attention"):
        core = attention.load("spatial-reduction:sr_ratio=1").build(make_layer(TokenGrid(4, 4, 1))).core
    q, k, v = make_qkv(17)
    assert relative(core(q, k, v), softmax_twin(nn.Identity(), q, k, v)) < 1e-12


def test_even_regions_are_softmax_over_one_token_each() -> None:
    """Keys and values equal within 2 x 2 patches, no prefix: pooling loses nothing."""
    q, k, v = make_qkv(64)
    k, v = (x.unflatten(-2, (8, 8))[..., ::2, ::2, :].repeat_interleave(2, -3).repeat_interleave(2, -2).flatten(-3, -2)
            for x in (k, v))  # fmt: skip
    core = make_block("spatial-reduction", make_layer(TokenGrid(8, 8))).core
    assert relative(core(q, k, v), softmax_twin(nn.Identity(), q, k, v)) < 1e-12


def test_tokens_of_a_region_weigh_alike_and_the_prefix_stands_alone() -> None:
    core = make_block("spatial-reduction", make_layer(TokenGrid(4, 4, 1))).core
    q, k, _ = make_qkv(17)
    matrix = attention_map(core, q, k)
    regions = matrix[..., 1:].unflatten(-1, (2, 2, 2, 2))  # [..., band, row, column of regions, column]
    assert (regions - regions[..., :1, :, :1]).abs().max() < 1e-15
    assert torch.linalg.matrix_rank(matrix).eq(5).all()


def test_regions_cover_a_grid_that_they_do_not_divide() -> None:
    core = make_block("spatial-reduction:sr_ratio=3", make_layer(TokenGrid(5, 7))).core
    assert (core.regions.height, core.regions.width) == (2, 3)  # 3 + 2 rows; 3 + 2 + 2 columns
    x = torch.arange(35.0).view(1, 1, 35, 1)
    assert core._reduced(x).flatten().tolist() == [8, 10.5, 12.5, 25.5, 28, 30]


@pytest.mark.parametrize(
    ("grid", "regions"),
    [
        (TokenGrid(8, 8, 1), 16), (TokenGrid(14, 14, 1), 49), (TokenGrid(32, 32), 256), (TokenGrid(1, 1, 1), 1),
        (TokenGrid(5, 7), 6), (TokenGrid(1, 17), 4), (TokenGrid(9, 4, 1), 6),
    ],
)  # fmt: skip
def test_the_default_keeps_a_quarter_at_most(grid: TokenGrid, regions: int) -> None:
    core = attention.load("spatial-reduction").build(LayerConfig(32, 2, grid)).core
    assert core.regions.num_tokens == regions <= max(1, grid.num_tokens // 4)


@pytest.mark.parametrize("ratio", [0, 8])
def test_sizes_that_cannot_work_are_named(ratio: int) -> None:
    with pytest.raises(AttentionError, match=rf"sr_ratio \({ratio}\) .* longer side of the grid \(7\)"):
        attention.load(f"spatial-reduction:sr_ratio={ratio}").build(make_layer(TokenGrid(5, 7)))
