"""Cross-covariance attention, and its local patch interaction."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DIM, HEADS, Case, make_block, make_layer, project, relative
from torch import Tensor

import vitcmp
from vitcmp import attention
from vitcmp.attention import AttentionError, LayerConfig, TokenGrid
from vitcmp.models.vit import resized


def convolve(image: Tensor, conv: Any) -> Tensor:
    """A 3 x 3 depthwise convolution of [height, width, D], tap by tap, zeros beyond the border."""
    height, width, _ = image.shape
    padded = F.pad(image, (0, 0, 1, 1, 1, 1))
    taps = [padded[dy : dy + height, dx : dx + width] * conv.weight[:, 0, dy, dx] for dy in range(3) for dx in range(3)]
    return torch.stack(taps).sum(dim=0) + conv.bias


def normalise(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / ((centred**2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def xca_twin(block: Any, x: Tensor, lpi: bool = True) -> Tensor:
    q, k, v = project(block, x)  # [B, H, N, K]
    samples = []
    for b in range(len(x)):
        heads = []
        for h in range(HEADS):
            unit_q, unit_k = (y[b, h] / (y[b, h] ** 2).sum(dim=0).sqrt() for y in (q, k))
            a = (unit_k.T @ unit_q * block.temperature[h, 0, 0]).softmax(dim=0)  # the paper's A, v A
            heads.append(v[b, h] @ a)
        samples.append(block.out(torch.cat(heads, dim=1)))
    a = torch.stack(samples)
    if not lpi:
        return a
    grid = block.lpi.conv1.grid
    prefix = grid.num_prefix_tokens
    outputs = []
    for tokens in normalise(x + a, block.lpi.norm1):
        image = tokens[prefix:].view(grid.height, grid.width, DIM)
        image = convolve(image, block.lpi.conv1.conv)
        image = normalise(image * (1 + torch.erf(image / 2**0.5)) / 2, block.lpi.norm2)
        image = convolve(image, block.lpi.conv2.conv)
        outputs.append(torch.cat([torch.zeros(prefix, DIM, dtype=x.dtype), image.flatten(0, 1)]))
    return a + torch.stack(outputs)


CASES = [Case("xca", block=xca_twin), Case("xca:lpi=false", block=partial(xca_twin, lpi=False))]


def test_xca_alone_permutes_with_its_tokens() -> None:
    block, x = make_block("xca:lpi=false").double(), torch.randn(2, 17, DIM, dtype=torch.float64)
    order = torch.randperm(17)
    assert relative(block(x[:, order]), block(x)[:, order]) < 1e-12


def test_xca_equals_timm() -> None:
    timm = pytest.importorskip("timm.models.xcit", reason="timm is an extra")
    block = make_block("xca:lpi=false").double()
    peer = timm.XCA(DIM, HEADS, qkv_bias=True).double().eval()
    peer.load_state_dict({name.replace("out.", "proj."): value for name, value in block.state_dict().items()})
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    assert relative(block(x), peer(x)) < 1e-12


def test_the_patch_interaction_leaves_prefix_tokens_alone() -> None:
    grid = TokenGrid(3, 4, 2)
    block = make_block("xca", LayerConfig(DIM, HEADS, grid)).double()
    x = torch.randn(2, grid.num_tokens, DIM, dtype=torch.float64)
    plain = make_block("xca:lpi=false", LayerConfig(DIM, HEADS, grid)).double()
    plain.load_state_dict(block.state_dict(), strict=False)
    assert torch.equal(block(x)[:, :2], plain(x)[:, :2])
    assert relative(block(x)[:, 2:], plain(x)[:, 2:]) > 0.1


def test_channels_of_zeros_stay_finite() -> None:
    block = make_block("xca")
    with torch.no_grad():
        block.qkv.weight.zero_()
        block.qkv.bias.zero_()
    x = torch.randn(2, 17, DIM, requires_grad=True)
    block(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_xca_starts_from_the_projections_of_all() -> None:
    models = [vitcmp.build_model("tiny", attention=spec, image_size=8) for spec in ("xca", "softmax")]
    first, second = (model.blocks[0].attention for model in models)
    assert torch.equal(first.qkv.weight, second.qkv.weight)
    assert torch.equal(first.out.weight, second.out.weight)
    assert (first.temperature == 1).all()


def test_xca_follows_a_new_image_size() -> None:
    model = vitcmp.build_model("tiny", attention="xca", image_size=8, channels=1, patch_size=1)
    assert resized(model, 6)(torch.randn(1, 1, 6, 6)).shape == (1, 10)


def test_xca_has_no_weights_to_drop() -> None:
    with pytest.raises(AttentionError, match="attention_dropout"):
        attention.load("xca").build(make_layer(dropout=0.1))
