"""Linear attention."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, make_qkv, relative
from torch import Tensor, nn

from vitcmp.attention import attention_map
from vitcmp.attention.linear import LinearAttention
from vitcmp.kernels.feature_maps import elu_plus_one


def linear_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    weights = torch.einsum("bhik,bhjk->bhij", phi(q), phi(k))
    return torch.einsum("bhij,bhjk->bhik", weights / (weights.sum(dim=-1, keepdim=True) + 1e-6), v)


CASES = [Case("linear", linear_twin)]


def test_the_feature_map_keeps_the_digits_that_elu_loses() -> None:
    """elu(-30) + 1 is 0 in fp32; exp(-30) is not. The slope at 0 is 1, as from either side."""
    x = torch.tensor([-30.0, -1.0, 0.0, 2.0], requires_grad=True)
    y = elu_plus_one(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y, torch.tensor([-30.0, -1.0, 0.0, 2.0]).clamp(max=0).exp() + torch.tensor([0.0, 0, 0, 2]))
    assert torch.allclose(slope, torch.tensor([-30.0, -1.0, 0.0, 0.0]).exp())


def test_the_map_has_rank_k_at_most() -> None:
    q, k, _ = make_qkv(65, width=8)
    assert (torch.linalg.matrix_rank(attention_map(LinearAttention(1e-6), q, k)) <= 8).all()


@pytest.mark.parametrize("std", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_that_leave_fp16_s_range(dtype: torch.dtype, std: float, autocast: bool) -> None:
    """At N = 1025 and K = 64 the normaliser does, and with values of mean 1 the numerator too."""
    q, k, v = make_qkv(1025, width=64, dtype=dtype, std=std)
    v = v + 1
    phi_q, phi_k = elu_plus_one(q.double()), elu_plus_one(k.double())
    assert (phi_q @ phi_k.sum(dim=-2).unsqueeze(-1)).max() > torch.finfo(torch.float16).max
    assert (phi_q @ (phi_k.transpose(-2, -1) @ v.double())).max() > torch.finfo(torch.float16).max
    core = LinearAttention(1e-6)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = core(q, k, v)
    assert y.dtype == dtype
    assert relative(y, core(q.double(), k.double(), v.double())) < torch.finfo(dtype).eps
