"""Nystromformer: landmarks, the pseudo-inverse, and how near it comes to softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_block, make_layer, make_qkv, merge_heads, project, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid
from vitcmp.attention.nystromformer import NystromAttention, pseudo_inverse, segment_means
from vitcmp.kernels._torch import TorchDispatchMode, tree_leaves


def nystrom_twin(core: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head, with the N x N matrix; the paper's iteration with both norms."""
    m, eye = core.num_landmarks, torch.eye(core.num_landmarks, dtype=q.dtype)

    def weights(x: Tensor, y: Tensor) -> Tensor:
        scores = x @ y.T / x.shape[1] ** 0.5
        return scores.exp() / scores.exp().sum(dim=1, keepdim=True)

    heads = []
    for qh, kh, vh in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):  # [N, K] each
        q_landmarks, k_landmarks = (
            torch.stack([part.mean(dim=0) for part in x.tensor_split(m)]) for x in (qh, kh)
        )  # the first parts are the longer ones
        a = weights(q_landmarks, k_landmarks)
        z = a.T / (a.abs().sum(dim=0).max() * a.abs().sum(dim=1).max())
        for _ in range(core.pinv_iterations):
            z = 0.25 * z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z)))
        matrix = weights(qh, k_landmarks) @ z @ weights(q_landmarks, kh)
        heads.append(matrix @ vh)
    return torch.stack(heads).view_as(q)


def nystrom_block_twin(block: Any, x: Tensor) -> Tensor:
    """The convolution as an N x N matrix a head: entry (i, j) is the kernel's at j - i."""
    q, k, v = project(block, x)
    mixed = nystrom_twin(block.core, q, k, v)
    kernel = block.after.conv.weight[:, 0, :, 0]  # [H, size]
    half, tokens = kernel.shape[1] // 2, torch.arange(x.shape[1])
    offset = tokens[None, :] - tokens[:, None]
    toeplitz = kernel[:, (offset + half).clamp(0, 2 * half)] * (offset.abs() <= half)  # [H, N, N]
    return block.out(merge_heads(mixed + torch.einsum("hij,bhjk->bhik", toeplitz, v)))


CASES = [
    Case("nystromformer", nystrom_twin, nystrom_block_twin),
    Case("nystromformer:pinv_iterations=2,conv_kernel_size=5", nystrom_twin, nystrom_block_twin),
    Case("nystromformer:num_landmarks=1,conv_kernel_size=0", nystrom_twin),
]


def test_segments_are_contiguous_and_the_first_ones_longer() -> None:
    x = torch.arange(8.0).unsqueeze(-1)
    assert segment_means(x, 3).flatten().tolist() == [1, 4, 6.5]  # 0 1 2, 3 4 5, 6 7
    assert segment_means(x, 4).flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert segment_means(x, 8).equal(x)
    assert segment_means(torch.ones(1025, 2), 256).equal(torch.ones(256, 2))  # no padding in the means


@pytest.mark.parametrize("std", [1, 0.5])
@pytest.mark.parametrize("tokens", [17, 65])
def test_all_tokens_as_landmarks_are_softmax_once_converged(tokens: int, std: float) -> None:
    q, k, v = make_qkv(tokens, width=64, std=std)
    wanted = softmax_twin(nn.Identity(), q, k, v)
    spec, layer = f"nystromformer:num_landmarks={tokens},conv_kernel_size=0", make_layer(tokens)
    assert relative(make_block(f"{spec},pinv_iterations=30", layer).core(q, k, v), wanted) < 1e-6
    assert 1e-3 < relative(make_block(spec, layer).core(q, k, v), wanted) < 0.1  # 6 steps: no shortcut for m = N


@pytest.mark.parametrize(("std", "bound"), [(1, 0.8), (0.5, 0.3)])
def test_the_default_error_against_softmax(std: float, bound: float) -> None:
    """Random tokens have no neighbours alike, so segment means say little: the uniform average errs hardly more."""
    q, k, v = make_qkv(197, width=64, std=std)
    wanted = softmax_twin(nn.Identity(), q, k, v)

    def error(iterations: int) -> float:
        return relative(NystromAttention(32, iterations)(q, k, v), wanted)

    assert error(6) < bound
    assert error(6) < relative(v.mean(dim=-2, keepdim=True).expand_as(v), wanted)
    assert error(30) > 3 * error(6)  # the better pseudo-inverse is the worse estimate


def test_alike_neighbours_are_what_landmarks_are_for() -> None:
    """64 tokens in 16 runs of 4 equal ones, 16 landmarks: exact."""
    q, k, v = make_qkv(16, width=64)
    q, k = (x.repeat_interleave(4, dim=-2) for x in (q, k))
    v = v.repeat(1, 1, 4, 1)
    assert relative(NystromAttention(16, 30)(q, k, v), softmax_twin(nn.Identity(), q, k, v)) < 1e-10


def test_the_iteration_finds_the_pseudo_inverse_of_each_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64).mul(2).softmax(dim=-1)
    assert relative(pseudo_inverse(a, 30), torch.linalg.pinv(a)) < 1e-10


def test_no_matrix_of_tokens_by_tokens_arises() -> None:
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out))
            return out

    q, k, v = (x[:1, :1] for x in make_qkv(1024))
    with Record():
        NystromAttention(32, 6)(q, k, v)
    assert max(sizes) <= 1024 * 32


def test_scores_and_inverse_are_in_fp32_under_autocast() -> None:
    q, k, v = make_qkv(65, dtype=torch.bfloat16)
    core = NystromAttention(16, 6)
    wanted = core(q.float(), k.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = core(q, k, v)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


def test_defaults_follow_the_token_count() -> None:
    for grid, landmarks in ((TokenGrid(1, 1), 1), (TokenGrid(8, 8, 1), 16), (TokenGrid(14, 14, 1), 32)):
        assert attention.load("nystromformer").build(LayerConfig(32, 2, grid)).core.num_landmarks == landmarks


def test_sizes_that_cannot_work_are_named() -> None:
    for options, match in {
        "num_landmarks=18": r"num_landmarks \(18\) .* tokens \(17\)",
        "num_landmarks=0": r"num_landmarks \(0\)",
        "pinv_iterations=0": r"pinv_iterations \(0\)",
        "conv_kernel_size=4": r"conv_kernel_size \(4\) must be odd",
        "conv_kernel_size=-1": r"conv_kernel_size \(-1\)",
    }.items():
        with pytest.raises(AttentionError, match=match):
            attention.load(f"nystromformer:{options}").build(make_layer())
    with pytest.warns(DegenerateWarning, match="17 landmarks for 17 tokens"):
        attention.load("nystromformer:num_landmarks=17").build(make_layer())


@pytest.mark.parametrize("size", [1, 7, 16, 33, 64])
def test_the_kernel_finds_what_torch_finds(size: int) -> None:
    a = torch.randn(3, 2, size, size, generator=torch.Generator().manual_seed(0)).mul(2).softmax(dim=-1)
    exact = pseudo_inverse(a.double(), 6)
    ours, torchs = pseudo_inverse(a, 6), pseudo_inverse(a.clone().requires_grad_(), 6)
    assert relative(ours, exact) < 3 * relative(torchs, exact) + 1e-6
    assert torch.equal(pseudo_inverse(a.transpose(0, 1), 6), ours.transpose(0, 1))
