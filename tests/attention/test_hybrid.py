"""Hybrid attention against its parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import HEADS, WIDTH, Case, make_block, make_layer, make_qkv, relative
from test_dilated import dilated_allowed, fitting
from test_linear import linear_twin
from test_local import auto_window, masked_twin
from test_softmax import softmax_twin
from torch import Tensor

from vitcmp import attention, build_model
from vitcmp.attention import AttentionError, DegenerateWarning, TokenGrid, attention_map
from vitcmp.models.vit import resized


def hybrid_twin(
    core: Any, q: Tensor, k: Tensor, v: Tensor, dilations: tuple[int, ...] = (1, 2, 4), linear: bool = True
) -> Tensor:
    """A = sum_b diag(g_b) A_b with dense A_b; the prefix's rows are softmax's."""
    window = auto_window(core.grid)
    answers = [
        masked_twin(q, k, v, dilated_allowed(core.grid, window, d))
        for d in (fitting(core.grid, dilations) if dilations else ())
    ]
    answers += [linear_twin(core, q, k, v)] if linear else []
    if core.gate is None:
        mixed = torch.stack(answers).mean(dim=0)
    else:
        logits = torch.einsum("bhik,hrk->rbhi", q, core.gate)
        mixed = torch.einsum("rbhi,rbhik->bhik", logits.exp() / logits.exp().sum(dim=0), torch.stack(answers))
    prefix = core.grid.num_prefix_tokens
    return torch.cat([softmax_twin(core, q, k, v)[:, :, :prefix], mixed[:, :, prefix:]], dim=2)


CASES = [
    Case("hybrid", hybrid_twin),
    Case("hybrid:gate=false", hybrid_twin),
    Case("hybrid:linear=false", partial(hybrid_twin, linear=False)),
    Case("hybrid:local=false", partial(hybrid_twin, dilations=())),
    Case("hybrid:dilations=2", partial(hybrid_twin, dilations=(2,))),
]
GRIDS = [TokenGrid(8, 8), TokenGrid(9, 6, 1), TokenGrid(3, 11, 2)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@every_grid
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_one_dilation_without_the_linear_branch_is_dilated(grid: TokenGrid, dilation: int) -> None:
    hybrid = make_block(f"hybrid:dilations={dilation},linear=false", make_layer(grid))
    dilated = make_block(f"dilated:dilations={dilation}", make_layer(grid))
    q, k, v = make_qkv(grid.num_tokens)
    assert torch.equal(hybrid.core(q, k, v), dilated.core(q, k, v))
    assert hybrid.state_dict().keys() == dilated.state_dict().keys()


@every_grid
def test_the_linear_branch_alone_is_linear_on_the_patches(grid: TokenGrid) -> None:
    hybrid, linear = (make_block(spec, make_layer(grid)) for spec in ("hybrid:local=false", "linear"))
    q, k, v = make_qkv(grid.num_tokens)
    prefix = grid.num_prefix_tokens
    found = hybrid.core(q, k, v)
    assert relative(found[:, :, prefix:], linear.core(q, k, v)[:, :, prefix:]) < 1e-14
    if prefix:
        assert relative(found[:, :, :prefix], softmax_twin(linear, q, k, v)[:, :, :prefix]) < 1e-12
    assert hybrid.state_dict().keys() == linear.state_dict().keys()


def test_the_gate_starts_at_equal_shares() -> None:
    layer = make_layer(TokenGrid(8, 8, 1))
    gated, equal = (attention.load(spec).build(layer).core for spec in ("hybrid", "hybrid:gate=false"))
    assert gated.gate.shape == (HEADS, 4, WIDTH)
    assert not list(equal.parameters())
    q, k, v = make_qkv(65)
    assert relative(gated.double()(q, k, v), equal(q, k, v)) < 1e-12


def test_the_gate_can_choose_a_branch_by_the_query() -> None:
    """A gate that is wide open for the windows in head 0 and for the linear branch in head 1."""
    grid = TokenGrid(8, 8, 1)
    core = make_block("hybrid:dilations=2", make_layer(grid)).core.double()
    q, k, v = make_qkv(65)
    q[..., 0] = q[..., 0].abs() + 1
    with torch.no_grad():
        core.gate.zero_()
        core.gate[0, 0, 0] = core.gate[1, 1, 0] = 1e3
    found = core(q, k, v)
    dilated = make_block("dilated:dilations=2", make_layer(grid)).core(q, k, v)
    linear = make_block("linear", make_layer(grid)).core(q, k, v)
    assert relative(found[:, 0], dilated[:, 0]) < 1e-12
    assert relative(found[:, 1, 1:], linear[:, 1, 1:]) < 1e-12


def test_the_linear_branch_reaches_every_patch() -> None:
    q, k, _ = make_qkv(65)
    reach = [
        attention_map(make_block(spec, make_layer(TokenGrid(8, 8, 1))).core.double(), q, k)[0, 0, 1:, 1:].gt(0).all()
        for spec in ("hybrid", "hybrid:linear=false")
    ]
    assert reach == [True, False]


def test_resized_keeps_the_gate_of_each_branch() -> None:
    model = build_model("tiny", attention="hybrid", image_size=8, channels=1)
    core = model.blocks[0].attention.core
    assert core.branches == (1, 2, 4, "linear")
    with torch.no_grad():
        core.gate.normal_(generator=torch.Generator().manual_seed(0))
    smaller = resized(model, 4)
    small = smaller.blocks[0].attention.core
    assert small.branches == (1, 2, "linear")
    assert torch.equal(small.gate, core.gate[:, [0, 1, 3]])
    again = resized(smaller, 8).blocks[0].attention.core.gate
    assert torch.equal(again[:, [0, 1, 3]], core.gate[:, [0, 1, 3]])
    assert not again[:, 2].any()
    unchanged = resized(model, 16).blocks[0].attention.core.gate
    assert torch.equal(unchanged, core.gate)


def test_hybrid_refuses_to_be_nothing() -> None:
    with pytest.raises(AttentionError, match="local=false and linear=false leave no branch"):
        attention.load("hybrid:local=false,linear=false").build(make_layer())
    with pytest.raises(AttentionError, match=r"attention_dropout \(0.1\): hybrid:local=false has no weights to drop"):
        attention.load("hybrid:local=false").build(make_layer(dropout=0.1))


def test_hybrid_warns_of_dilations_that_it_leaves_out() -> None:
    with pytest.warns(DegenerateWarning, match=r"hybrid: dilations 1\+5 .* used: 1$"):
        attention.load("hybrid:dilations=1+5").build(make_layer(TokenGrid(4, 4)))
