"""Differential attention: the difference of two maps, and the norm after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import (
    DIM,
    HEADS,
    WIDTH,
    Case,
    make_block,
    make_layer,
    make_qkv,
    merge_heads,
    project,
    relative,
    taking,
)
from test_softmax import strided, with_gradients
from torch import Tensor

import vitcmp
from vitcmp import attention
from vitcmp.attention import AttentionError, LayerConfig, TokenGrid, attention_map
from vitcmp.kernels.ops.differential import _attend as attend
from vitcmp.kernels.ops.differential import explicit


def differential_twin(core: Any, q: Tensor, k: Tensor, v: Tensor, index: int = 0) -> Tensor:
    """Head by head, as the paper writes it."""
    half = q.shape[-1] // 2
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * index)
    weight = torch.exp(core.lambda_q1 @ core.lambda_k1) - torch.exp(core.lambda_q2 @ core.lambda_k2) + lambda_init
    heads = []
    for qh, kh, vh in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):
        first = (qh[:, :half] @ kh[:, :half].T / half**0.5).softmax(dim=1)
        second = (qh[:, half:] @ kh[:, half:].T / half**0.5).softmax(dim=1)
        heads.append((first - weight * second) @ vh)
    return torch.stack(heads).view_as(q)


def differential_block_twin(block: Any, x: Tensor, index: int = 0) -> Tensor:
    mixed = differential_twin(block.core, *project(block, x), index)
    rms = ((mixed**2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    normed = (0.2 + 0.6 * math.exp(-0.3 * index)) * mixed / rms * block.after.norm.weight
    return block.out(merge_heads(normed))


CASES = [Case("differential", core=differential_twin, block=differential_block_twin)]


def test_lambda_follows_the_layer() -> None:
    layer = LayerConfig(DIM, HEADS, TokenGrid(4, 4, 1), index=3)
    block = make_block("differential", layer).double()
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    assert block.core.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(-0.9))
    assert relative(block(x), differential_block_twin(block, x, index=3)) < 1e-10


def test_differential_without_lambda_is_softmax_of_half_a_head() -> None:
    core = make_block("differential").core.double()
    with torch.no_grad():
        for vector in core.parameters():
            vector.fill_(0)
    core.lambda_init = 0.0
    q, k, v = make_qkv(17)
    half = WIDTH // 2
    wanted = torch.nn.functional.scaled_dot_product_attention(q[..., :half], k[..., :half], v)
    assert relative(core(q, k, v), wanted) < 1e-12


def test_rows_of_the_difference_sum_to_one_less_lambda() -> None:
    core = make_block("differential").core.double()
    matrix = attention_map(core, *make_qkv(65)[:2])
    rows = 1 - core._lambda()
    assert (matrix.sum(dim=-1) - rows).abs().max() < 1e-12
    assert matrix.min() < 0


@pytest.mark.parametrize("index", [0, 5])
def test_differential_equals_timm(index: int) -> None:
    timm = pytest.importorskip("timm.layers.diff_attention", reason="timm is an extra")
    peer = timm.DiffAttention(DIM, HEADS, qkv_bias=True, depth=index).double().eval()
    block = make_block("differential", LayerConfig(DIM, HEADS, TokenGrid(8, 8, 1), index=index)).double()
    names = {"core.": "", "after.norm.": "sub_norm.", "out.": "proj."}
    state = {}
    for name, value in block.state_dict().items():
        old = next((old for old in names if name.startswith(old)), "")
        state[names.get(old, "") + name.removeprefix(old)] = value
    peer.load_state_dict(state)
    x = torch.randn(2, 65, DIM, dtype=torch.float64)
    assert relative(block(x), peer(x)) < 1e-6  # timm rounds lambda to fp32


def test_models_start_from_the_same_lambda() -> None:
    vectors = [
        vitcmp.build_model("tiny", seed=seed, attention="differential", image_size=8).blocks[1].attention.core.lambda_q1
        for seed in (0, 0, 1)
    ]
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])
    many = make_block("differential", make_layer(dim=4096, heads=1)).core
    many.reset_random_state(0)
    assert many.lambda_k2.detach().std() == pytest.approx(0.1, rel=0.1)


def test_differential_refuses_an_odd_head() -> None:
    with pytest.raises(AttentionError, match=r"head width \(5\) must be even.*num_heads \(2\)"):
        attention.load("differential").build(make_layer(dim=10))


def kernel(*inputs: Tensor) -> Tensor:
    return attend(*inputs)[0]


@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (5, 6), (16, 32), (33, 12), (65, 64), (257, 16)])
def test_the_kernels_are_as_exact_as_torch(tokens: int, width: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        *qkv, dout = strided(2, 3, tokens, width, dtype)
        inputs = [*qkv, torch.tensor(0.3)]
        exact = with_gradients(explicit, *(x.double() for x in (*inputs, dout)))
        for ours, wanted, x in zip(with_gradients(kernel, *inputs, dout), exact, (dout, *inputs), strict=True):
            assert ours.dtype == x.dtype
            # One token's scores have no gradient.
            assert (ours - wanted).norm() <= tolerance * max(float(wanted.norm()), 1.0)


def test_a_bad_query_spoils_its_own_row_alone() -> None:
    q, k, v, _ = (x.detach() for x in strided(1, 2, 20, 8, torch.float32))
    share = torch.tensor(0.3)
    fine = attend(q, k, v, share)[0]
    for column in (2, 6):  # of the first map, and of the second
        spoilt = q.clone()
        spoilt[0, 1, 3, column] = math.nan
        found = attend(spoilt, k, v, share)[0]
        assert found[0, 1, 3].isnan().all()
        found[0, 1, 3] = fine[0, 1, 3]
        assert torch.equal(found, fine)


def test_gradients_of_gradients() -> None:
    inputs = [*(x.detach() for x in strided(1, 2, 9, 4, torch.float32)[:3]), torch.tensor(0.3)]
    leaves = [x.requires_grad_() for x in inputs]
    found = []
    for form in (kernel, explicit):
        (dq,) = torch.autograd.grad(form(*leaves).square().sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), leaves))
    for ours, wanted in zip(*found, strict=True):
        assert relative(ours, wanted) < 1e-4


def test_the_compiler_takes_it_whole() -> None:
    leaves = [*strided(1, 2, 20, 8, torch.float32)[:3], torch.tensor(0.3, requires_grad=True)]
    compiled = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    results = []
    for form in (kernel, compiled):
        y = form(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for wanted, found in zip(*results, strict=True):
        assert relative(found, wanted) < 1e-6


def test_maps_of_a_kernel_equal_maps_apart() -> None:
    core = make_block("differential").core
    q, k, v, dout = strided(2, HEADS, 33, WIDTH, torch.float32)
    with taking("numba"):
        found = with_gradients(core, q, k, v, dout)
    with taking("apart", "naive"):
        wanted = with_gradients(core, q, k, v, dout)
    for ours, theirs in zip(found, wanted, strict=True):
        assert not torch.equal(ours, theirs)  # another form indeed
        assert relative(ours, theirs) < 1e-6
