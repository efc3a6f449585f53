"""Sparse attention at any alpha."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_cases import WIDTH, Case, make_block, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, attention_map


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


CASES = [
    Case("entmax", partial(entmax_twin, alpha=1.5)),
    Case("entmax:alpha=1", softmax_twin),
    Case("entmax:alpha=1.25", partial(entmax_twin, alpha=1.25)),
    Case("entmax:alpha=2", partial(entmax_twin, alpha=2)),
]


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
