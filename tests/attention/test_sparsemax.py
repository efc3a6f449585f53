"""Sparsemax: entmax at alpha = 2, and a projection onto the simplex."""

from __future__ import annotations

import torch
from attention_cases import Case, make_block, make_qkv
from torch import Tensor, nn

from vitcmp.attention import attention_map


def sparsemax_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sorted: the support is the largest k with 1 + k z_(k) > sum of the k largest (Martins and Astudillo, 2016)."""
    z = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5
    ordered = z.sort(dim=-1, descending=True).values
    ranks = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    sums = ordered.cumsum(dim=-1)
    size = (1 + ranks * ordered > sums).sum(dim=-1, keepdim=True)
    tau = (sums.gather(-1, size - 1) - 1) / size
    return (z - tau).clamp(min=0) @ v


CASES = [Case("sparsemax", sparsemax_twin)]


def test_no_other_distribution_is_nearer_to_the_scores() -> None:
    q, k, _ = make_qkv(9)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    weights = attention_map(make_block("sparsemax").core, q, k)
    own = (weights - scores).square().sum(dim=-1)
    for _ in range(100):
        other = torch.lerp(weights, torch.rand_like(weights).softmax(dim=-1), torch.rand(()).item())
        assert (own <= (other - scores).square().sum(dim=-1) + 1e-12).all()
