"""Performer: features, draws, and what they estimate."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import Case, make_layer, make_qkv, relative
from test_softmax import softmax_twin
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention.performer import PerformerAttention, orthogonal_gaussian


def performer_twin(core: Any, q: Tensor, k: Tensor, v: Tensor, kernel: str = "softmax") -> Tensor:
    """Head by head, with the core's own features; the stabilising constants are constants."""
    w, eps = core.projection.to(q.dtype), 1e-4
    heads = []
    for qh, kh, vh in zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), strict=True):  # [N, K] each
        qh, kh = qh / qh.shape[-1] ** 0.25, kh / kh.shape[-1] ** 0.25
        if kernel == "relu":
            phi_q, phi_k = (qh @ w.T).relu() + eps, (kh @ w.T).relu() + eps
        else:
            log_q = qh @ w.T - (qh * qh).sum(dim=1, keepdim=True) / 2
            log_k = kh @ w.T - (kh * kh).sum(dim=1, keepdim=True) / 2
            phi_q = torch.stack([(row - row.max().detach()).exp() for row in log_q]) + eps
            phi_k = (log_k - log_k.max().detach()).exp() + eps
        weights = phi_q @ phi_k.T
        heads.append(weights / weights.sum(dim=1, keepdim=True) @ vh)
    return torch.stack(heads).view_as(q)


CASES = [
    Case("performer", performer_twin, exact_gradients="performer:eps=0"),
    Case("performer:kernel=relu,num_features=24", partial(performer_twin, kernel="relu")),
]


def make_performer(features: int, seed: int, width: int = 64, redraw_interval: int = 4) -> PerformerAttention:
    core = PerformerAttention(width, features, "softmax", redraw_interval, eps=1e-4)
    core.reset_random_state(seed)
    return core


def test_performer_nears_softmax_as_features_grow() -> None:
    q, k, v = make_qkv(64, width=64, std=0.5)
    wanted = softmax_twin(nn.Identity(), q, k, v)

    def mean_error(features: int) -> float:
        return sum(relative(make_performer(features, seed)(q, k, v), wanted) for seed in range(4)) / 4

    assert 2.5 < mean_error(128) / mean_error(2048) < 6  # m^-1/2 makes it 4


def test_performer_estimates_the_kernel_without_bias() -> None:
    """E[phi(q) phi(k)] = exp(q k) for x' = x, over draws, with eps = 0 and without the stabiliser."""
    generator = torch.Generator().manual_seed(0)
    q, k = 0.4 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
    estimates = []
    for _ in range(400):
        w = orthogonal_gaussian(64, 8, generator)
        estimates.append(((w @ q - q @ q / 2).exp() * (w @ k - k @ k / 2).exp()).mean())
    spread = torch.stack(estimates).std() / 400**0.5
    assert abs(torch.stack(estimates).mean() - (q @ k).exp()) < 4 * spread


def test_performer_draws_orthogonal_blocks_from_its_seed() -> None:
    core = make_performer(features=40, seed=7, width=16)
    assert torch.equal(core.projection, make_performer(40, seed=7, width=16).projection)
    assert not torch.equal(core.projection, make_performer(40, seed=8, width=16).projection)
    for block in core.projection.split(16):
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-4
    norms = make_performer(features=4096, seed=0, width=16).projection.square().sum(dim=1)  # chi-squared of 16
    assert norms.mean() == pytest.approx(16, rel=0.05)
    assert norms.var() == pytest.approx(32, rel=0.15)


def test_performer_redraws_by_optimizer_steps() -> None:
    core = make_performer(features=32, seed=7, redraw_interval=4).train()
    q, k, v = make_qkv(8, width=64, dtype=torch.float32)
    first = core.projection.clone()
    for _ in range(10):
        core(q, k, v)
    changed = []
    for _ in range(9):
        before = core.projection.clone()
        core.after_optimizer_step()
        changed.append(not torch.equal(before, core.projection))
    assert changed == [False, False, False, True, False, False, False, True, False]
    assert not torch.equal(core.projection, first)
    fixed = make_performer(features=32, seed=7, redraw_interval=0)
    for _ in range(5):
        fixed.after_optimizer_step()
    assert torch.equal(fixed.projection, first)


def test_performer_goes_on_from_its_state() -> None:
    core, fresh = make_performer(features=32, seed=7), make_performer(features=32, seed=1)
    for _ in range(6):
        core.after_optimizer_step()
    fresh.load_state_dict(core.state_dict())
    assert torch.equal(fresh.projection, core.projection)
    for _ in range(2):
        core.after_optimizer_step()
        fresh.after_optimizer_step()
    assert torch.equal(fresh.projection, core.projection)
    assert not torch.equal(make_performer(features=32, seed=7).projection, core.projection)


def test_performer_warns_where_it_cannot_win() -> None:
    with pytest.warns(DegenerateWarning, match="64 features for 17 tokens"):
        attention.load("performer:num_features=64").build(make_layer())


@pytest.mark.parametrize("spec", ["performer:num_features=0", "performer:redraw_interval=-1,num_features=4"])
def test_performer_refuses_impossible_sizes(spec: str) -> None:
    with pytest.raises(AttentionError, match="num_features"):
        attention.load(spec).build(make_layer())
