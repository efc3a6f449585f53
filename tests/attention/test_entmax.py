"""Sparse attention at any alpha."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import HEADS, WIDTH, Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, attention_map
from vitcmp.metrics.memory import PeakMemory


def entmax_weights(z: Tensor, alpha: float) -> Tensor:
    """p = [(alpha - 1) z - tau]_+ ^ (1 / (alpha - 1)) over the last axis; tau by 200 halvings of its bracket."""
    power = 1 / (alpha - 1)
    z = (alpha - 1) * z
    with torch.no_grad():
        high = z.amax(dim=-1, keepdim=True)  # here the sum is 0
        low = high - 1  # here the largest entry alone is 1
        for _ in range(200):
            tau = (low + high) / 2
            too_much = ((z - tau).clamp(min=0) ** power).sum(dim=-1, keepdim=True) >= 1
            low, high = torch.where(too_much, tau, low), torch.where(too_much, high, tau)
        slope = torch.where(z > low, power * (z - low).clamp(min=0) ** (power - 1), 0).sum(dim=-1, keepdim=True)
    # One Newton step from the solution: it moves tau by nothing, but carries the derivative of tau(z).
    excess = ((z - low).clamp(min=0) ** power).sum(dim=-1, keepdim=True) - 1
    return (z - (low + excess / slope)).clamp(min=0) ** power


def entmax_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjk->bhik", entmax_weights(scores, alpha), v)


def learned_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head by head; the derivative of alpha by the bisected threshold's own implicit one."""
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5
    alphas = (1.01 + 0.98 / (1 + (-core.raw_alpha).exp())).flatten()
    heads = [entmax_weights(scores[:, h], alpha) for h, alpha in enumerate(alphas)]
    return torch.stack(heads, dim=1) @ v


CASES = [
    Case("entmax", partial(entmax_twin, alpha=1.5)),
    Case("entmax:alpha=1", softmax_twin),
    Case("entmax:alpha=1.25", partial(entmax_twin, alpha=1.25)),
    Case("entmax:alpha=learned", learned_twin),
]


def attend(impl: str, alpha: str, *inputs: Tensor) -> Tensor:
    return make_block(f"entmax:alpha={alpha},impl={impl}").core(*inputs)


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("alpha", ["1.01", "1.1", "4/3", "1.5", "1.7", "2", "2.5", "3", "4"])
def test_any_alpha_equals_the_bisected_one(impl: str, alpha: str) -> None:
    """All in fp64, forward and backward."""
    value = 4 / 3 if alpha == "4/3" else float(alpha)
    q, k, v = (x.requires_grad_() for x in make_qkv(17))
    found, wanted = attend(impl, str(value), q, k, v), entmax_twin(nn.Identity(), q, k, v, value)
    assert relative(found, wanted) < 1e-10
    upstream = torch.randn_like(wanted)
    # Above 2 the gradient has a pole at the threshold: an entry of 1e-8 there takes half of the digits.
    tolerance = 1e-9 if value <= 2 else 1e-6
    for f, w in zip(
        torch.autograd.grad(found, (q, k, v), upstream), torch.autograd.grad(wanted, (q, k, v), upstream), strict=True
    ):
        assert relative(f, w) < tolerance


@pytest.mark.parametrize("alpha", ["1.5", "2", "1.25"])
@pytest.mark.parametrize("std", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("tokens", [100, 150, 400])
def test_dense_and_sparse_rows_equal_the_package(tokens: int, std: float, alpha: str) -> None:
    """Few tokens, groups of heads, and several blocks of queries; flat scores, whose rows are dense, and sharp ones."""
    q, k, v = (x.requires_grad_() for x in make_qkv(tokens))
    with torch.no_grad():
        q *= std
    upstream = torch.randn_like(v)
    results = []
    for impl in ("package", "numba", "torch"):
        y = attend(impl, alpha, q, k, v)
        results.append((y, *torch.autograd.grad(y, (q, k, v), upstream)))
    for found in results[1:]:
        for f, wanted in zip(found, results[0], strict=True):
            assert relative(f, wanted) < 1e-9


@pytest.mark.parametrize("sharp", [30, 350])
def test_a_head_whose_later_rows_are_dense(sharp: int) -> None:
    """The switch comes inside the first block of queries, or in the second."""
    q, k, v = make_qkv(400)
    q[:, :, sharp:] *= 0.01
    inputs = [x.requires_grad_() for x in (q, k, v)]
    upstream = torch.randn_like(v)
    found, wanted = attend("numba", "1.5", *inputs), attend("torch", "1.5", *inputs)
    pairs = (torch.autograd.grad(y, inputs, upstream) for y in (found, wanted))
    assert all(relative(a, b) < 1e-9 for a, b in zip(*pairs, strict=True))
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("alpha", ["1.05", "1.5", "1.7", "2", "3"])
def test_rows_sum_to_one_in_single_precision(impl: str, alpha: str) -> None:
    q, k, _ = make_qkv(300, dtype=torch.float32)
    with torch.no_grad():
        sums = attention_map(make_block(f"entmax:alpha={alpha},impl={impl}").core, q, k).sum(dim=-1)
    assert (sums - 1).abs().max() < 1e-6


@pytest.mark.parametrize("impl", ["numba", "torch"])
@pytest.mark.parametrize("alpha", ["1.25", "1.5", "2", "3"])
def test_large_logits_stay_finite(impl: str, alpha: str) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(150, dtype=torch.float32, std=70))  # logits up to 1e4
    y = attend(impl, alpha, q, k, v)
    assert all(x.isfinite().all() for x in (y, *torch.autograd.grad(y.sum(), (q, k, v))))


@pytest.mark.parametrize("alpha", ["1.5", "1.3"])
@pytest.mark.parametrize("std", [0.01, 1])
@pytest.mark.parametrize("tokens", [17, 150])
def test_a_diverged_model_shows(tokens: int, std: float, alpha: str) -> None:
    """In sparse rows and in dense ones."""
    q, k, v = make_qkv(tokens, dtype=torch.float32)
    q *= std
    q[0, 0, 3, 0] = torch.nan
    y = attend("numba", alpha, q, k, v)
    assert y[0, 0, 3].isnan().all()
    assert y.isnan().sum() == y.shape[-1]
    leaf = q.requires_grad_()
    (gradient,) = torch.autograd.grad(attend("numba", alpha, leaf, k, v).sum(), leaf)
    assert gradient[0, 0, 3].isnan().all()


def test_digits_lost_are_announced() -> None:
    with pytest.warns(DegenerateWarning, match="stay at 4 or below"):
        attention.load("entmax:alpha=5").build(make_layer())


def test_the_number_of_threads_changes_nothing() -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(400, dtype=torch.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = attend("numba", "1.5", q, k, v)
            results.append((y, *torch.autograd.grad(y.sum(), (q, k, v))))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_threads_keep_the_mode_of_their_caller() -> None:
    q, k, v = make_qkv(150)
    before, core = torch.get_num_threads(), make_block("entmax").core
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            y = core(q, k, v)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, core(q, k, v))


@pytest.mark.parametrize("alpha", ["1.5", "learned"])
def test_second_derivatives(alpha: str) -> None:
    core = make_block(f"entmax:alpha={alpha},impl=numba").core.double()
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradgradcheck(core, (q, k, v))


def test_blocks_in_torch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(65))
    results = []
    for size in (2**24, 2 * HEADS * 65 * 16):
        monkeypatch.setattr("vitcmp.kernels.ops.entmax.MAX_TORCH_SCORES", size)
        y = attend("torch", "1.5", q, k, v)
        results.append((y, *torch.autograd.grad(y.sum(), (q, k, v))))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole)


def test_memory_stays_far_below_the_square_of_the_tokens() -> None:
    """One row of 4,096 tokens takes 16 KiB; all of them, for 8 heads, 512 MiB. The supports' room is not touched."""
    q, k, v = (torch.randn(1, 8, 4096, 16, requires_grad=True) for _ in range(3))

    def step() -> None:
        attend("numba", "1.5", q, k, v).sum().backward()

    step()  # compiles
    peak = PeakMemory(torch.device("cpu"))
    if peak.start != peak.start:
        pytest.skip("this system does not tell a process's memory")
    step()
    used = peak.mib()
    assert used is not None
    assert used < 128


def test_the_package_is_still_there_as_an_oracle() -> None:
    q, k, v = make_qkv(65)
    for alpha in ("1.5", "2", "1.3", "learned"):
        assert relative(attend("auto", alpha, q, k, v), attend("package", alpha, q, k, v)) < 1e-9


def test_numba_has_no_weights_to_drop() -> None:
    with pytest.raises(AttentionError, match="impl=numba"):
        attention.load("entmax:impl=numba").build(make_layer(dropout=0.1))


def test_what_the_kernels_for_cuda_cannot_do_is_an_error() -> None:
    with pytest.raises(AttentionError, match="alpha up to 2, not 3"):
        attention.load("entmax:alpha=3,impl=triton").build(make_layer())
    with pytest.raises(AttentionError, match="no weights to drop"):
        attention.load("sparsemax:impl=triton").build(make_layer(dropout=0.1))
    q = torch.zeros(1, 4, 4, 4)
    with pytest.raises(AttentionError, match="needs CUDA"):
        make_block("entmax:impl=triton").core(q, q, q)


def test_entmax_has_its_known_limits() -> None:
    from entmax import sparsemax

    q, k, v = make_qkv(65)
    scores = q @ k.transpose(-2, -1) / WIDTH**0.5
    at_one = make_block("entmax:alpha=1").core(q, k, v)
    near_one = make_block("entmax:alpha=1.001").core(q, k, v)
    assert relative(at_one, scores.softmax(dim=-1) @ v) < 1e-12
    assert relative(near_one, at_one) < 1e-2
    assert relative(make_block("entmax:alpha=2").core(q, k, v), sparsemax(scores, dim=-1) @ v) < 1e-12
    bisected = make_block("entmax:alpha=1.500001").core(q, k, v)
    assert relative(bisected, make_block("entmax").core(q, k, v)) < 1e-5


def test_a_larger_alpha_is_sparser() -> None:
    q, k, _ = make_qkv(65)
    zeros = [
        float((attention_map(make_block(f"entmax:alpha={alpha}").core.double(), q, k) == 0).double().mean())
        for alpha in (1, 1.25, 1.5, 2)
    ]
    assert zeros[0] == 0
    assert zeros == sorted(zeros)
    # Gaussian scores of standard deviation 1, as mechanisms are usually quoted.
    assert zeros[2] == pytest.approx(0.84, abs=0.04)
    assert zeros[3] == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("spec", ["entmax:alpha=0.5", "entmax:alpha=nan", "entmax:alpha=inf"])
def test_entmax_refuses_other_alphas(spec: str) -> None:
    with pytest.raises(AttentionError, match="alpha"):
        attention.load(spec).build(make_layer())
