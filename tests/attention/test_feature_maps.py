"""Attention by feature maps: blocks of tokens and images, and gradients in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import HEADS, WIDTH, make_qkv, relative
from torch import Tensor

from vitcmp.attention import TokenGrid
from vitcmp.attention.cosformer import CosformerAttention
from vitcmp.attention.focused_linear import FocusedLinearAttention
from vitcmp.attention.linear import LinearAttention
from vitcmp.attention.performer import PerformerAttention
from vitcmp.kernels import feature_maps

CORES: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: LinearAttention(1e-6),
    "cosformer": lambda: CosformerAttention(TokenGrid(4, 4, 1), "sequence", 1e-6),
    "cosformer on the grid": lambda: CosformerAttention(TokenGrid(4, 4, 1), "grid", 1e-6),
    "focused-linear": lambda: FocusedLinearAttention(3),
    "performer": lambda: PerformerAttention(WIDTH, 20, "softmax", 0, 1e-4),
    "performer, relu": lambda: PerformerAttention(WIDTH, 20, "relu", 0, 1e-4),
}
every_core = pytest.mark.parametrize("core", [make() for make in CORES.values()], ids=list(CORES))


def results(core: torch.nn.Module, leaves: list[Tensor]) -> list[Tensor]:
    """Output and gradients, of inputs that are strided as a model's are."""
    q, k, v = torch.stack(leaves, dim=2).unbind(dim=2)
    y = core(q, k, v)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@every_core
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 34], ids=lambda n: f"{n} at a time")
def test_blocks_change_nothing(core: torch.nn.Module, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [x.requires_grad_() for x in make_qkv(17)]
    monkeypatch.setattr(feature_maps.Products, "__call__", feature_maps.Products.in_one_block)
    wanted = results(core, leaves)
    monkeypatch.undo()
    features = 20 if isinstance(core, PerformerAttention) else WIDTH
    if isinstance(core, CosformerAttention):
        features *= 2 if core.positions == "sequence" else 4
    monkeypatch.setattr(feature_maps, "BLOCK", tokens * HEADS * features)
    for found, expected in zip(results(core, leaves), wanted, strict=True):
        assert relative(found, expected) < 1e-12
    with torch.no_grad():
        assert relative(core(*leaves), wanted[0]) < 1e-12


def test_blocks_cover_every_token_of_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "BLOCK", 2 * 4 * 7)
    one = feature_maps.FeatureMap()
    queries, keys = torch.zeros(3, 2, 17, 1), torch.zeros(3, 2, 3, 1)
    for images, *blocks in feature_maps.Products(one, one, num_features=4).blocks(queries, keys):
        for seen, slices in zip((queries, keys), blocks, strict=True):
            for tokens in slices:
                seen[images, :, tokens] += 1
                assert seen[images, :, tokens].numel() <= 2 * 7
    assert (queries == 1).all()
    assert (keys == 1).all()


@pytest.mark.parametrize("tokens", [3, 7, 40])
def test_keys_may_be_more_or_fewer(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of some tokens attend as they do among all."""
    leaves = [x.requires_grad_() for x in make_qkv(17)]
    core = LinearAttention(1e-6)

    def results(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    q, k, v = leaves
    wanted = results(core(q, k, v)[:, :, :5])
    monkeypatch.setattr(feature_maps, "BLOCK", tokens * HEADS * WIDTH)
    found = results(core(q[:, :, :5], k, v))
    assert all(relative(f, w) < 1e-12 for f, w in zip(found, wanted, strict=True))


@every_core
def test_second_derivatives(core: torch.nn.Module) -> None:
    """Of the output in one direction; the performer's constant c counts as one, so with finite differences it errs."""
    q, k, v = (x[:1, :, :17].requires_grad_() for x in make_qkv(17))
    y = core(q, k, v)
    (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)

    def slope(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(core(x, k, v).square().sum(), x)
        return g.square().sum().detach()

    if not isinstance(core, PerformerAttention):
        direction = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        above, below = ((q.detach() + step * direction).requires_grad_() for step in (1e-6, -1e-6))
        found = float((slope(above) - slope(below)) / 2e-6)
        assert found == pytest.approx(float((second * direction).sum()), rel=1e-5)
    assert second.isfinite().all()


@every_core
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_keep_the_format_of_the_inputs(core: torch.nn.Module, dtype: torch.dtype) -> None:
    half = [x.requires_grad_() for x in make_qkv(17, dtype=dtype)]
    found, wanted = results(core, half), results(core, [x.detach().double().requires_grad_() for x in half])
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == dtype
        assert relative(f, w) < torch.finfo(dtype).eps
