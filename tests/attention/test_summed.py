"""Kernels of efficient and linear attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_cases import relative
from test_softmax import strided, with_gradients
from torch import Tensor

from vitcmp.kernels.feature_maps import elu_products
from vitcmp.kernels.numba.simd import LANES
from vitcmp.kernels.ops import efficient_attention, linear_attention, summed

EPS = 1e-2
FORMS = {
    "efficient": (lambda *x: efficient_attention(*x, form="numba"), summed.efficient),
    "linear": (
        lambda *x: linear_attention(*x, EPS, form="numba"),
        lambda q, k, v: elu_products(q.shape[-1], EPS).in_one_block(q, k, v),
    ),
}
both = pytest.mark.parametrize(("by_kernel", "at_once"), FORMS.values(), ids=FORMS)
Form = Callable[..., Tensor]


@both
@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 2), (5, 3), (16, 16), (33, 7), (65, 12), (100, 64), (257, 33), (300, 128), (1025, 16)]
)
def test_the_kernels_are_as_exact_as_torch(by_kernel: Form, at_once: Form, tokens: int, width: int) -> None:
    inputs = strided(2, 3, tokens, width, torch.float32)
    exact = with_gradients(at_once, *(x.double() for x in inputs))
    for ours, wanted in zip(with_gradients(by_kernel, *inputs), exact, strict=True):
        # One token's keys have no gradient in efficient attention.
        assert (ours - wanted).norm() <= 1e-6 * max(float(wanted.norm()), 1.0)


@both
def test_queries_and_keys_may_differ_in_number(by_kernel: Form, at_once: Form) -> None:
    for queries, keys in ((1, 300), (37, 5), (300, 1)):
        q, k, v, dout = strided(2, 2, 300, 12, torch.float32)
        inputs = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys], dout[:, :, :queries]
        exact = with_gradients(at_once, *(x.double() for x in inputs))
        of_torch = with_gradients(at_once, *inputs)
        for ours, theirs, wanted in zip(with_gradients(by_kernel, *inputs), of_torch, exact, strict=True):
            # Where there is one key, queries and keys hardly have gradients: what is left is rounding.
            assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm() + 2e-7 * dout.norm()


@both
@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("tokens", [20, 600])
def test_features_of_any_size(by_kernel: Form, at_once: Form, tokens: int, scale: float) -> None:
    q, k, v, dout = (x.detach() for x in strided(1, 2, tokens, 8, torch.float32))
    # The largest keys come last, or first, so that what came before them shrinks to nothing, or stays.
    k = torch.cat([k[:, :1].sort(dim=-2).values, k[:, 1:].sort(dim=-2, descending=True).values], dim=1)
    inputs = q * scale, k * scale, v, dout
    exact = with_gradients(at_once, *(x.double() for x in inputs))
    of_torch = with_gradients(at_once, *inputs)
    for ours, theirs, wanted in zip(with_gradients(by_kernel, *inputs), of_torch, exact, strict=True):
        assert (ours - wanted).norm() < 3 * (theirs - wanted).norm() + 1e-6 * max(1, scale) * dout.norm()


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_query_spoils_its_own_row_alone(by_kernel: Form, at_once: Form, bad: float) -> None:
    q, k, v, _ = (x.detach() for x in strided(1, 2, 50, 8, torch.float32))
    fine = by_kernel(q, k, v)
    q = q.clone()
    q[0, 1, 49, 2] = bad
    found = by_kernel(q, k, v)
    assert found[0, 1, 49].isnan().any()
    found[0, 1, 49] = fine[0, 1, 49]
    assert torch.equal(found, fine)


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_key_spoils_its_head_alone(by_kernel: Form, at_once: Form, bad: float) -> None:
    q, k, v, _ = (x.detach() for x in strided(1, 2, 50, 8, torch.float32))
    fine = by_kernel(q, k, v)
    k = k.clone()
    k[0, 1, 3, 2] = bad
    found = by_kernel(q, k, v)
    assert found[0, 1].isnan().any(dim=-1).all()
    assert torch.equal(found[0, 0], fine[0, 0])


@both
def test_gradients_of_gradients(by_kernel: Form, at_once: Form) -> None:
    inputs = [x.detach().requires_grad_() for x in strided(1, 2, 9, 4, torch.float32)[:3]]
    found = []
    for form in (by_kernel, at_once):
        (dq,) = torch.autograd.grad(form(*inputs).square().sum(), inputs[0], create_graph=True)
        found.append(torch.autograd.grad(dq.square().sum(), inputs))
    for ours, wanted in zip(*found, strict=True):
        assert relative(ours, wanted) < 1e-4


def test_a_vector_is_the_kernels() -> None:
    assert summed.VECTOR == LANES
