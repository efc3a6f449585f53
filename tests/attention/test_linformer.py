"""Linformer: its projections, what they share, and how they follow another grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

import vitcmp
from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map
from vitcmp.models.vit import resized


def linformer_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, with the N x N matrix."""
    e = core.key_projection
    f = e if core.value_projection is None else core.value_projection
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            eh, fh = e[h % len(e)], f[h % len(f)]  # [k, N]; one for all heads, or one each
            scores = q[b, h] @ (eh @ k[b, h]).T / q.shape[-1] ** 0.5
            weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
            out[b, h] = (weights @ fh) @ v[b, h]
    return out


SHARING = {"none": 2 * 2, "heads": 2, "key-value": 1}
"""Matrices that a layer of 2 heads has."""

CASES = [Case("linformer", linformer_twin)] + [
    Case(f"linformer:sharing={sharing}", linformer_twin) for sharing in ("none", "heads")
]


@pytest.mark.parametrize("sharing", SHARING)
def test_as_many_rows_as_tokens_can_be_softmax(sharing: str) -> None:
    core = make_block(f"linformer:proj_dim=17,sharing={sharing}").core.double()
    with torch.no_grad():
        for matrix in core.parameters():
            matrix.copy_(torch.eye(17).expand_as(matrix))
    q, k, v = make_qkv(17)
    assert relative(core(q, k, v), softmax_twin(nn.Identity(), q, k, v)) < 1e-12


@pytest.mark.parametrize("sharing", SHARING)
def test_what_is_shared_is_one_matrix(sharing: str) -> None:
    core = attention.load(f"linformer:sharing={sharing}").build(make_layer()).core
    assert sum(p.numel() for p in core.parameters()) == SHARING[sharing] * 4 * 17
    assert len(core.state_dict()) == (1 if sharing == "key-value" else 2)


@pytest.mark.parametrize("sharing", SHARING)
def test_a_shorter_input_slices_the_projection(sharing: str) -> None:
    core = make_block(f"linformer:sharing={sharing}").core.double()
    q, k, v = make_qkv(17)
    rest = torch.zeros_like(k[..., 11:, :])  # tokens of zeros add nothing to E k
    longer = core(q, torch.cat([k[..., :11, :], rest], dim=-2), torch.cat([v[..., :11, :], rest], dim=-2))
    assert relative(core(*(x[..., :11, :] for x in (q, k, v))), longer[..., :11, :]) < 1e-12


def test_a_longer_input_is_refused() -> None:
    core = attention.load("linformer").build(make_layer(16)).core
    with pytest.raises(AttentionError, match="17 tokens, but its projections were built for 16"):
        core(*make_qkv(17, dtype=torch.float32))


def test_projections_start_as_in_the_paper_and_from_their_seed() -> None:
    layer = LayerConfig(32, 2, TokenGrid(14, 14, 1))
    core, other = (attention.load("linformer:sharing=none").build(layer).core for _ in range(2))
    assert not torch.equal(core.key_projection, other.key_projection)
    for c in (core, other):
        c.reset_random_state(7)
    assert torch.equal(core.key_projection, other.key_projection)
    assert torch.equal(core.value_projection, other.value_projection)
    for matrix in core.parameters():
        assert float(matrix.detach().std()) == pytest.approx(49**-0.5, rel=0.03)
    assert relative(core.key_projection, core.value_projection) > 1
    models = [
        vitcmp.build_model("tiny", attention="linformer", image_size=8, channels=1, pool="cls", seed=3)
        for _ in range(2)
    ]
    first, second = (model.blocks[0].attention.core.key_projection for model in models)
    assert torch.equal(first, second)
    assert relative(first, models[0].blocks[1].attention.core.key_projection) > 1  # layers differ


def test_an_untrained_projection_is_no_estimate() -> None:
    q, k, v = make_qkv(197, width=64, std=0.5)
    core = make_block("linformer", LayerConfig(128, 2, TokenGrid(14, 14, 1))).core.double()
    assert relative(core(q, k, v), softmax_twin(nn.Identity(), q, k, v)) > 1


def test_another_resolution_keeps_the_attention_of_even_images() -> None:
    """From 8 x 8 patches with 16 rows to 16 x 16 with 64: where all patches are alike, nothing changes."""
    model = vitcmp.build_model("tiny", attention="linformer", image_size=8, channels=1, pool="cls")
    core = model.blocks[0].attention.core
    with torch.no_grad():  # every row the same weight for all patches
        core.key_projection[..., 1:] = core.key_projection[..., 1:2].clone()
    larger = resized(model, 16).blocks[0].attention.core
    assert larger.key_projection.shape == (1, 64, 257)
    assert torch.equal(larger.key_projection[0, ::4, 0], core.key_projection[0, :, 0])  # the class token's column
    q, k, v = make_qkv(2, dtype=torch.float32)  # a class token and a patch
    repeated = [[torch.cat([x] + [x[..., 1:, :]] * (n - 1), dim=-2) for x in (q, k, v)] for n in (64, 256)]
    assert relative(larger(*repeated[1])[..., :2, :], core(*repeated[0])[..., :2, :]) < 1e-5


def test_another_resolution_interpolates_the_columns_as_images() -> None:
    model = vitcmp.build_model(
        "tiny", attention="linformer:proj_dim=8,sharing=none", image_size=8, channels=1, pool="cls"
    )
    core = model.blocks[0].attention.core
    down = torch.linspace(-1, 1, 8)
    with torch.no_grad():  # weights that rise from the top of the image to its bottom
        core.key_projection[..., 1:] = down.repeat_interleave(8)
    images = resized(model, 16).blocks[0].attention.core.key_projection[..., 1:].unflatten(-1, (16, 16)).detach()
    assert images.shape[:2] == core.key_projection.shape[:2]
    assert (images - images[..., :1]).abs().max() < 1e-6  # even along a row
    assert (images[..., 3:13, 0].diff() * 4 - 1 / 7).abs().max() < 1e-3  # half the step, for four times the patches


def test_sizes_that_cannot_work_are_named() -> None:
    with pytest.raises(AttentionError, match=r"proj_dim \(18\) .* the number of tokens \(17\)"):
        attention.load("linformer:proj_dim=18").build(make_layer())
    with pytest.raises(AttentionError, match=r"proj_dim \(0\)"):
        attention.load("linformer:proj_dim=0").build(make_layer())
    with pytest.warns(DegenerateWarning, match="17 of 17 tokens compresses nothing"):
        attention.load("linformer:proj_dim=17").build(make_layer())


def test_the_map_has_the_rank_of_the_projection() -> None:
    core = make_block("linformer:proj_dim=3", make_layer(64)).core.double()
    q, k, _ = make_qkv(64)
    assert (torch.linalg.matrix_rank(attention_map(core, q, k)) == 3).all()
