"""Uniform attention, the control."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_layer
from torch import Tensor

from vitcmp import attention
from vitcmp.attention import AttentionError
from vitcmp.models.vit import build_model


def uniform_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([sum(v.unbind(dim=2)) / v.shape[2]] * v.shape[2], dim=2)


def block_twin(block: Any, x: Tensor) -> Tensor:
    """Every projection is affine, so all of the block is: the mean of the tokens goes through it."""
    mean = x.mean(dim=1, keepdim=True)
    y = (mean @ block.v.weight.T + block.v.bias) @ block.out.weight.T + block.out.bias
    return y.expand_as(x)


CASES = [Case("uniform", uniform_twin, block_twin)]


def test_it_has_two_projections_and_no_other_parameter() -> None:
    layer = make_layer()
    block = attention.load("uniform").build(layer)
    assert {name for name, _ in block.named_parameters()} == {"v.weight", "v.bias", "out.weight", "out.bias"}
    assert attention.load("uniform").block_macs(layer) == 2 * 17 * 32**2


def test_it_starts_from_the_values_and_outputs_that_softmax_starts_from() -> None:
    uniform, softmax = (
        build_model("tiny", attention=spec, image_size=8, channels=1).blocks[0].attention
        for spec in ("uniform", "softmax")
    )
    assert torch.equal(uniform.v.weight, softmax.qkv.weight.chunk(3)[2])
    assert torch.equal(uniform.out.weight, softmax.out.weight)


def test_a_model_shows_its_map() -> None:
    model = build_model("tiny", attention="uniform", image_size=8, channels=1).eval()
    images = torch.randn(2, 1, 8, 8)
    logits, maps = model(images, return_maps=True)
    assert torch.equal(logits, model(images))
    for matrix in maps:
        assert torch.allclose(matrix, torch.full_like(matrix, 1 / matrix.shape[-1]))


def test_half_precision_sums_many_tokens() -> None:
    """A sum of 1025 values of 100 leaves fp16's range."""
    v = torch.full((1, 1, 1025, 4), 100.0, dtype=torch.float16)
    assert torch.equal(attention.load("uniform").build(make_layer(1025)).core(v, v, v), v)


def test_it_has_no_weights_to_drop() -> None:
    with pytest.raises(AttentionError, match=r"attention_dropout \(0.1\): uniform has no weights to drop"):
        attention.load("uniform").build(make_layer(dropout=0.1))
