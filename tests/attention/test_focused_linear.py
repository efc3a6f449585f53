"""Focused linear attention: the focusing function, its limits, and the convolution of the values."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import HEADS, WIDTH, Case, make_block, make_layer, make_qkv, merge_heads, project, relative
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, TokenGrid, attention_map
from vitcmp.attention.focused_linear import Focused, FocusedLinearAttention
from vitcmp.models.vit import build_model, resized


def focused_linear_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor, power: float = 3) -> Tensor:
    """Head by head, with the explicit N x N matrix."""

    def phi(x: Tensor) -> Tensor:
        x = x.relu() + 1e-6
        rows = [row.norm() / (row**power).norm() * row**power for row in x]
        return torch.stack(rows)

    heads = []
    for qh, kh, vh in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):  # [N, K] each
        weights = phi(qh) @ phi(kh).T
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ vh)
    return torch.stack(heads).view_as(q)


def block_twin(block: Any, x: Tensor, power: float = 3, kernel_size: int = 5) -> Tensor:
    """The core's twin; then the convolution image by image and head by head, its kernel the same for all heads."""
    q, k, v = project(block, x)
    mixed = focused_linear_twin(block.core, q, k, v, power)
    if kernel_size:
        conv, grid = block.after.convolution.conv, block.after.convolution.grid
        assert conv.weight.shape == (WIDTH, 1, kernel_size, kernel_size)
        prefix, size = grid.num_prefix_tokens, (grid.height, grid.width)
        convolved = torch.zeros_like(v)
        for b in range(len(v)):
            for h in range(HEADS):
                for c in range(WIDTH):
                    image = v[b, h, prefix:, c].reshape(1, 1, *size)
                    kernel = conv.weight[c : c + 1]
                    y = F.conv2d(image, kernel, conv.bias[c : c + 1], padding=kernel_size // 2)
                    convolved[b, h, prefix:, c] = y.flatten()
        mixed = mixed + convolved
    return block.out(merge_heads(mixed))


CASES = [
    Case("focused-linear", focused_linear_twin, block_twin),
    Case(
        "focused-linear:conv_kernel_size=0,focusing_factor=1.5",
        partial(focused_linear_twin, power=1.5),
        partial(block_twin, power=1.5, kernel_size=0),
    ),
]


def test_without_sharpening_it_is_relu_linear_attention() -> None:
    q, k, v = make_qkv(17)
    weights = torch.einsum("bhik,bhjk->bhij", q.relu() + 1e-6, k.relu() + 1e-6)
    wanted = weights / weights.sum(dim=-1, keepdim=True) @ v
    assert relative(FocusedLinearAttention(1)(q, k, v), wanted) < 1e-12


def test_focusing_keeps_the_norm_and_turns_to_the_largest_feature() -> None:
    x = torch.tensor([3.0, 4.0, -1.0], dtype=torch.float64)
    assert Focused(1)(x, slice(1)) == pytest.approx([3, 4, 0], abs=1e-5)
    cubes = torch.tensor([27.0, 64.0, 0.0], dtype=torch.float64)
    assert Focused(3)(x, slice(1)) == pytest.approx((5 * cubes / cubes.norm()).tolist(), abs=1e-5)
    assert Focused(50)(x, slice(1)) == pytest.approx([0, 5, 0], abs=1e-4)


@pytest.mark.parametrize("power", [1, 3, 8, 50])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_without_a_positive_feature_and_huge_ones_stay_finite(power: float, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(17, dtype=dtype, std=30)
    q[:, :, 3] = -q[:, :, 3].abs()
    k[:, 0] = -k[:, 0].abs()
    q[:, :, 4:6] = 0
    k[:, :, 6:8] = 0
    q[:, :, 9] *= 300
    # A query and keys that share no positive feature.
    q[:, 1, 10], k[:, 1, :, 0] = -1, -1
    q[:, 1, 10, 0] = 30
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = FocusedLinearAttention(power)(*leaves)
    y.sum().backward()
    assert y.isfinite().all()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


def test_rows_are_weights_even_without_a_positive_feature() -> None:
    q, k, _ = make_qkv(17, dtype=torch.float32)
    q[:, :, 3] = -q[:, :, 3].abs()
    matrix = attention_map(FocusedLinearAttention(3), q, -k.abs())
    assert (matrix >= 0).all()
    assert torch.allclose(matrix.sum(dim=-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_no_more_than_its_inputs(dtype: torch.dtype) -> None:
    """The cubes of std 30 leave fp16's range, and so do the sums over 1025 tokens."""
    q, k, v = make_qkv(1025, width=64, dtype=dtype, std=30)
    core = FocusedLinearAttention(3)
    assert relative(core(q, k, v), core(q.double(), k.double(), v.double())) < torch.finfo(dtype).eps


def test_the_convolution_leaves_prefix_tokens_alone() -> None:
    block = make_block("focused-linear", make_layer(TokenGrid(4, 4, 1)))
    x = torch.randn(2, 17, HEADS * WIDTH)
    with_convolution = block(x)
    block.after = None
    assert torch.equal(block(x)[:, 0], with_convolution[:, 0])
    assert relative(block(x)[:, 1:], with_convolution[:, 1:]) > 0.01


def test_it_follows_a_new_grid() -> None:
    model = build_model("tiny", attention="focused-linear", image_size=8, channels=1)
    assert resized(model, 12)(torch.randn(2, 1, 12, 12)).shape == (2, 10)


def test_it_counts_the_convolution() -> None:
    layer = make_layer(TokenGrid(8, 8, 1))
    dim = HEADS * WIDTH
    assert attention.load("focused-linear").macs(layer) == 2 * 65 * dim * WIDTH + dim * 25 * 64
    assert attention.load("focused-linear:conv_kernel_size=0").macs(layer) == 2 * 65 * dim * WIDTH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("focusing_factor=0.5", r"focusing_factor \(0.5\) must be 1 or more"),
        ("focusing_factor=inf", r"focusing_factor \(inf\)"),
        ("conv_kernel_size=4", r"conv_kernel_size \(4\) must be odd, or 0"),
        ("conv_kernel_size=-1", r"conv_kernel_size \(-1\) must be odd, or 0"),
    ],
)
def test_it_refuses_impossible_options(options: str, message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        attention.load(f"focused-linear:{options}").build(make_layer())
