"""Softmax attention: four forms of one function."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DIM, Case, make_block, relative
from torch import Tensor, nn

from vitcmp.kernels.forms import Cell, Profile, kept
from vitcmp.kernels.ops import softmax_attention
from vitcmp.kernels.ops.softmax import attend, naive


def softmax_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bhjk->bhik", weights, v)


CASES = [
    Case(spec, softmax_twin)
    for spec in ("softmax", *(f"softmax:impl={i}" for i in ("naive", "merged", "fused", "numba")))
]


@pytest.mark.parametrize("tokens", [17, 197])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_forms_of_softmax_agree(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    naive = make_block("softmax:impl=naive").to(dtype)
    state = naive.state_dict()
    for end in ("weight", "bias"):
        state[f"qkv.{end}"] = torch.cat([state.pop(f"{part}.{end}") for part in "qkv"])
    x = torch.randn(2, tokens, DIM, dtype=dtype)
    for form in ("merged", "fused", "numba", "auto"):
        other = make_block(f"softmax:impl={form}").to(dtype)
        other.load_state_dict(state)
        assert relative(other(x), naive(x)) < tolerance


def strided(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as the projections hand them over, and the output's gradient."""
    x = torch.randn(batch, tokens, 3 * heads * width, generator=torch.Generator().manual_seed(0)).to(dtype)
    qkv = [1.5 * part.view(batch, tokens, heads, width).transpose(1, 2) for part in x.chunk(3, dim=-1)]
    return [*(part.requires_grad_() for part in qkv), torch.randn_like(qkv[0])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_the_kernels_take_any_number_of_queries_and_keys(dtype: torch.dtype, tolerance: float) -> None:
    for queries, keys in ((65, 1), (65, 4), (65, 49), (65, 64), (65, 131), (1050, 1), (1042, 17), (2101, 33)):
        agrees_with_fp64(queries, keys, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_keys_that_come_in_parts(dtype: torch.dtype, tolerance: float) -> None:
    for queries, keys in ((1, 1041), (9, 2501), (1101, 1059)):
        agrees_with_fp64(queries, keys, dtype, tolerance)


def agrees_with_fp64(queries: int, keys: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, dout = strided(2, 2, max(queries, keys), 12, dtype)
    inputs = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], dout[:, :, :queries]
    exact = with_gradients(naive, *(x.double() for x in inputs))
    for ours, wanted in zip(with_gradients(lambda *x: attend(*x)[0], *inputs), exact, strict=True):
        assert (ours - wanted).norm() <= tolerance * max(float(wanted.norm()), 1.0)


def with_gradients(attend: Callable[..., Tensor], *inputs_and_upstream: Tensor) -> list[Tensor]:
    *inputs, dout = (x.detach() for x in inputs_and_upstream)
    out = attend(*(x.requires_grad_() for x in inputs))
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 1), (5, 3), (16, 16), (18, 33), (33, 7), (65, 12), (100, 64), (257, 16)]
)
def test_the_kernels_are_as_exact_as_torch(tokens: int, width: int) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        inputs = strided(2, 3, tokens, width, dtype)
        exact = with_gradients(naive, *(x.double() for x in inputs))
        torchs = with_gradients(F.scaled_dot_product_attention, *inputs)
        found = with_gradients(lambda *x: attend(*x)[0], *inputs)
        for ours, theirs, wanted in zip(found, torchs, exact, strict=True):
            assert ours.dtype == dtype
            # One token's scores have no gradient.
            allowed = tolerance * max(float(wanted.norm()), 1.0)
            in_bf16 = 1.1 * float((theirs - wanted).norm()) if dtype == torch.bfloat16 else 0.0
            assert (ours - wanted).norm() <= max(allowed, in_bf16)


ON_ANY_PROCESSOR = """
import sys, torch
from vitcmp.kernels.numba import simd
from vitcmp.kernels.ops.softmax import attend
assert not simd.MULTIPLIES_PAIRS
q, k, v, dout = torch.load(sys.argv[1])
inputs = [x.requires_grad_() for x in (q, k, v)]
out = attend(*inputs)[0]
torch.save([out.detach(), *torch.autograd.grad(out, inputs, dout)], sys.argv[2])
"""


def test_the_kernels_need_no_instruction_for_pairs(tmp_path: Path) -> None:
    """A process of its own, whose kernels are compiled for any processor."""
    inputs = [x.detach() for x in strided(1, 2, 21, 5, torch.bfloat16)]
    torch.save(inputs, tmp_path / "inputs")
    variables = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ON_ANY_PROCESSOR, tmp_path / "inputs", tmp_path / "found"]
    subprocess.run(command, env=variables, check=True)
    quick = with_gradients(lambda *x: attend(*x)[0], *inputs)
    for ours, wanted in zip(torch.load(tmp_path / "found"), quick, strict=True):
        assert relative(ours, wanted) < 4e-3


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("tokens", [4, 20, 50, 1100])
def test_scores_of_any_size(tokens: int, scale: float) -> None:
    q, k, v, dout = strided(1, 2, tokens, 8, torch.float32)
    inputs = q * scale, k, v, dout
    exact = with_gradients(naive, *(x.double() for x in inputs))
    of_torch = with_gradients(naive, *inputs)
    for ours, theirs, wanted in zip(with_gradients(lambda *x: attend(*x)[0], *inputs), of_torch, exact, strict=True):
        # Weights of 0 and 1 have no gradients: what is left is rounding, of numbers as large as q.
        assert (ours - wanted).norm() < 3 * (theirs - wanted).norm() + 1e-6 * max(1, scale) * dout.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tokens", "row"), [(20, 3), (20, 19), (17, 16), (2100, 3), (2100, 1050)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_query_spoils_its_own_row_alone(dtype: torch.dtype, tokens: int, row: int, bad: float) -> None:
    q, k, v, _ = (x.detach() for x in strided(1, 2, tokens, 8, dtype))
    fine = attend(q, k, v)[0]
    q = q.clone()
    q[0, 1, row, 2] = bad
    found = attend(q, k, v)[0]
    assert found[0, 1, row].isnan().all()
    found[0, 1, row] = fine[0, 1, row]
    assert torch.equal(found, fine)


def test_gradients_of_gradients() -> None:
    inputs = [x.detach().requires_grad_() for x in strided(1, 2, 9, 4, torch.float32)[:3]]
    found = []
    for form in (lambda *x: attend(*x)[0], naive):
        (dq,) = torch.autograd.grad(form(*inputs).square().sum(), inputs[0], create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), inputs))
    for ours, wanted in zip(*found, strict=True):
        assert relative(ours, wanted) < 1e-4


def test_threads_share_heads_out() -> None:
    inputs = strided(4, 3, 65, 12, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(lambda *x: attend(*x)[0], *inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize(
    ("dtype", "trains", "wanted"),
    [
        (torch.float32, False, "fused"),
        (torch.float32, True, "fused"),
        (torch.bfloat16, False, "fused"),
        (torch.bfloat16, True, "merged"),
        (torch.float16, True, "merged"),
        (torch.float64, True, "fused"),
    ],
)
def test_where_nothing_was_measured(dtype: torch.dtype, trains: bool, wanted: str) -> None:
    q = torch.empty(2, 4, 65, 12, dtype=dtype, requires_grad=trains)
    with kept(Profile("an unknown CPU")):
        assert softmax_attention.quickest(q, q, q) == wanted
        assert softmax_attention.quickest(q.to("meta"), q.to("meta"), q.to("meta")) == "fused"


def test_a_form_that_hides_nan_is_not_taken_by_itself() -> None:
    """torch's fused attention gives zeros to a query of NaN where there are fewer than 16 keys."""
    for keys in (1, 4, 15, 16, 17):
        q, k = torch.full((1, 1, 3, 8), torch.nan), torch.randn(1, 1, keys, 8)
        with kept(Profile("an unknown CPU")):
            assert softmax_attention.quickest(q, k, k) == ("fused" if keys >= 16 else "merged")
            assert softmax_attention(q, k, k).isnan().all()


def test_the_nearest_measurement_decides() -> None:
    def cell(mode: str, tokens: int, **ms: float) -> Cell:
        return Cell("softmax_attention", "fp32", mode, (16, tokens, tokens), ms)

    profile = Profile("a CPU", (cell("forward", 64, numba=1, fused=2), cell("forward", 1024, fused=1, numba=2),
                                cell("train", 64, merged=1, fused=2, numba=3)))  # fmt: skip
    with kept(profile):
        for tokens, wanted in ((65, "numba"), (17, "numba"), (700, "fused"), (4096, "fused"), (10**6, "fused")):
            q = torch.empty(1, 1, 1, 16).expand(1, 1, tokens, 16)
            assert softmax_attention.quickest(q, q, q) == wanted
            assert softmax_attention.quickest(q.double(), q.double(), q.double()) == "fused"
        leaf = torch.empty(1, 1, 65, 16, requires_grad=True)
        assert softmax_attention.quickest(leaf, leaf, leaf) == "merged"
        with torch.no_grad():
            assert softmax_attention.quickest(leaf, leaf, leaf) == "numba"


def test_attention_of_no_images() -> None:
    q = torch.zeros(0, 2, 17, 16)
    assert make_block("softmax:impl=numba").core(q, q, q).shape == q.shape
