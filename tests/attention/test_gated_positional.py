"""Gated positional attention: where its heads look."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, relative
from torch import Tensor

import vitcmp
from vitcmp import attention
from vitcmp.attention import AttentionError, LayerConfig, TokenGrid, attention_map
from vitcmp.attention.gated_positional import square_of_offsets
from vitcmp.models.vit import resized


def gated_positional_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, with an explicit N x N x 3 array of relative positions."""
    grid = core.grid
    places = torch.tensor([(x, y) for y in range(grid.height) for x in range(grid.width)], dtype=q.dtype)
    d = places[None, :] - places[:, None]  # from patch i to patch j
    r = torch.cat([d, (d**2).sum(dim=-1, keepdim=True)], dim=-1)
    prefix, outputs = grid.num_prefix_tokens, []
    for b in range(len(q)):
        for h in range(q.shape[1]):
            weights = (q[b, h] @ k[b, h].T / q.shape[-1] ** 0.5).softmax(dim=1)
            positional = torch.zeros_like(weights)
            positional[prefix:, prefix:] = (r @ core.position[h]).softmax(dim=1)
            gate = torch.full((len(weights), 1), 1, dtype=q.dtype) / (1 + (-core.gate[h]).exp())
            gate = torch.cat([torch.zeros(prefix, 1, dtype=q.dtype), gate[prefix:]])
            outputs.append(((1 - gate) * weights + gate * positional) @ v[b, h])
    return torch.stack(outputs).view_as(q)


CASES = [Case(spec, gated_positional_twin) for spec in ("gated-positional", "gated-positional:locality_strength=0.1")]


def positional_map(heads: int, grid: TokenGrid, strength: float = 100) -> Tensor:
    """The map at the start, its gates open: [H, N, N]."""
    layer = LayerConfig(4 * heads, heads, grid)
    core: Any = attention.load(f"gated-positional:locality_strength={strength}").build(layer).core.double()  # type: ignore
    with torch.no_grad():
        core.gate.fill_(1000)
        q, k = torch.randn(2, 1, heads, grid.num_tokens, 4, dtype=torch.float64)
        return attention_map(core, q, k)[0]


def test_strongly_local_heads_are_a_convolution() -> None:
    """Nine heads: each one's positional part shifts the image by one of the offsets of a 3 x 3 kernel."""
    grid = TokenGrid(4, 5, 1)
    matrix = positional_map(9, grid)
    for head in range(9):
        dx, dy = head % 3 - 1, head // 3 - 1
        for y in range(grid.height):
            for x in range(grid.width):
                if 0 <= y + dy < grid.height and 0 <= x + dx < grid.width:
                    target = 1 + (y + dy) * grid.width + x + dx
                    wanted = torch.zeros(grid.num_tokens, dtype=torch.float64)
                    wanted[target] = 1
                    assert (matrix[head, 1 + y * grid.width + x] - wanted).abs().max() < 1e-12


def test_four_heads_look_between_patches() -> None:
    """An even square has its centre between patches, so each head looks at a block of 2 x 2."""
    matrix = positional_map(4, TokenGrid(4, 4))
    row = matrix[3, 5].view(4, 4)  # the patch (1, 1), the offset (1/2, 1/2)
    assert torch.allclose(row[1:3, 1:3], torch.full((2, 2), 0.25, dtype=torch.float64))
    assert row.sum() == pytest.approx(1)


def test_prefix_tokens_attend_by_content_alone() -> None:
    grid = TokenGrid(3, 4, 2)
    core = make_block("gated-positional", make_layer(grid)).core.double()
    q, k, v = torch.randn(3, 1, 2, 14, 16, dtype=torch.float64)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative(core(q, k, v)[:, :, :2], wanted[:, :, :2]) < 1e-12
    matrix = positional_map(2, grid, strength=1)
    assert (matrix[:, 2:, :2] == 0).all()
    assert ((matrix[:, :2] > 0) & (matrix[:, :2] < 1)).all()


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [(0, 0)]), (2, [(-0.5, -0.5), (0.5, -0.5)]), (4, [(-0.5, -0.5), (0.5, -0.5), (-0.5, 0.5), (0.5, 0.5)]),
        (5, [(0, -1), (-1, 0), (0, 0), (1, 0), (0, 1)]),
    ],
)  # fmt: skip
def test_heads_fill_a_square_from_its_centre(count: int, expected: list[tuple[float, float]]) -> None:
    assert square_of_offsets(count).tolist() == [list(offset) for offset in expected]


def test_twelve_heads_leave_the_corners_out() -> None:
    offsets = square_of_offsets(12)
    assert len(offsets.unique(dim=0)) == 12
    assert offsets.square().sum(dim=1).max() == 1.5**2 + 0.5**2


def test_gated_positional_follows_a_new_image_size() -> None:
    model = vitcmp.build_model("tiny", attention="gated-positional", image_size=8, channels=1, patch_size=1)
    old, new = model.blocks[1].attention.core, resized(model, 6).blocks[1].attention.core
    assert torch.equal(new.position, old.position)
    q, k, v = torch.randn(3, 1, 4, 36, 8)
    assert relative(new(q, k, v), gated_positional_twin(new, q, k, v)) < 1e-5


@pytest.mark.parametrize("strength", ["-1", "inf", "nan"])
def test_gated_positional_refuses_other_strengths(strength: str) -> None:
    with pytest.raises(AttentionError, match="locality_strength"):
        attention.load(f"gated-positional:locality_strength={strength}").build(make_layer())
