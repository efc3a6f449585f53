"""What is true of every mechanism, and of each: one table of cases, checks that all of them share, known limits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map
from vitcmp.attention.performer import PerformerAttention, orthogonal_gaussian
from vitcmp.metrics.complexity import counted_macs

Twin = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


# The slow, obvious twins, in fp64: q, k, v and the result are [B, H, N, K].


def softmax_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhik,bhjk->bhij", q, k) / q.shape[-1] ** 0.5
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.einsum("bhij,bhjk->bhik", weights, v)


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


def linear_twin(core: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def phi(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())

    weights = torch.einsum("bhik,bhjk->bhij", phi(q), phi(k))
    return torch.einsum("bhij,bhjk->bhik", weights / (weights.sum(dim=-1, keepdim=True) + 1e-6), v)


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


@dataclass(frozen=True)
class Case:
    spec: str
    equals: Twin
    key_bias_counts: bool = False
    """Whether the output depends on the keys' bias; softmax and its relatives cancel it."""


CASES = [
    Case("softmax", softmax_twin),
    Case("softmax:impl=naive", softmax_twin),
    Case("softmax:impl=merged", softmax_twin),
    Case("softmax:impl=fused", softmax_twin),
    Case("entmax", partial(entmax_twin, alpha=1.5)),
    Case("entmax:alpha=1", softmax_twin),
    Case("entmax:alpha=1.25", partial(entmax_twin, alpha=1.25)),
    Case("entmax:alpha=2", partial(entmax_twin, alpha=2)),
    Case("linear", linear_twin, key_bias_counts=True),
    Case("performer", performer_twin, key_bias_counts=True),
    Case("performer:kernel=relu,num_features=24", partial(performer_twin, kernel="relu"), key_bias_counts=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)

DIM, HEADS, WIDTH = 32, 2, 16


def make_layer(tokens: int = 17, dim: int = DIM, heads: int = HEADS, dropout: float = 0.0) -> LayerConfig:
    return LayerConfig(dim, heads, TokenGrid.squarest(tokens), dropout=dropout)


def make_block(spec: str, layer: LayerConfig | None = None, seed: int = 0) -> Any:
    """A block with random weights and biases."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)
        block = attention.load(spec).build(layer or make_layer())
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block.eval()


def make_qkv(tokens: int, width: int = WIDTH, dtype: torch.dtype = torch.float64, std: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        std * torch.randn(2, HEADS, tokens, width, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"
    ]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def test_the_table_names_what_is_available() -> None:
    assert {case.spec.partition(":")[0] for case in CASES} == set(attention.available())


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_kept(case: Case, dtype: torch.dtype) -> None:
    x = torch.randn(3, 17, DIM, dtype=dtype)
    y = make_block(case.spec).to(dtype)(x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    q, k, v = make_qkv(17, dtype=dtype)
    assert make_block(case.spec).core(q, k, v).dtype == dtype


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_cost_their_rounding_alone(case: Case, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(197, dtype=dtype)
    core = make_block(case.spec, make_layer(197)).core
    y = core(q, k, v)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert relative(y, core(q.double(), k.double(), v.double())) < 2 * eps
    # Weights that were computed in half precision would miss this by far.
    assert (attention_map(core, q, k).double().sum(dim=-1) - 1).abs().max() < eps


@every_case
def test_evaluation_is_repeatable(case: Case) -> None:
    block, x = make_block(case.spec), torch.randn(3, 17, DIM)
    assert torch.equal(block(x), block(x))


@every_case
def test_samples_of_a_batch_do_not_mix(case: Case) -> None:
    block, x = make_block(case.spec).double(), torch.randn(3, 17, DIM, dtype=torch.float64)
    together = block(x)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], block(x[i : i + 1]), rtol=1e-10, atol=1e-12)


@every_case
def test_permuted_tokens_permute_the_output(case: Case) -> None:
    block, x, order = make_block(case.spec).double(), torch.randn(2, 17, DIM).double(), torch.randperm(17)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], rtol=1e-10, atol=1e-12)


@every_case
def test_every_parameter_gets_a_gradient(case: Case) -> None:
    block = make_block(case.spec).train()
    y = block(torch.randn(2, 17, DIM))
    (y * torch.randn_like(y)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        merged = name.startswith("qkv")
        parts = zip("qkv", parameter.grad.chunk(3)) if merged else [(name[0], parameter.grad)]
        for part, gradient in parts:
            if part == "k" and name.endswith("bias") and not case.key_bias_counts:
                assert gradient.abs().max() < 1e-5, name
            else:
                assert gradient.abs().max() > 1e-4, f"{name} ({part})"


@every_case
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 197])
def test_output_and_gradients_equal_the_twin(case: Case, tokens: int) -> None:
    core = make_block(case.spec, make_layer(tokens)).core.double()
    q, k, v = (x.requires_grad_() for x in make_qkv(tokens))
    y, wanted = core(q, k, v), case.equals(core, q, k, v)
    assert relative(y, wanted) < 1e-10
    upstream = torch.randn_like(wanted)
    found = torch.autograd.grad(y, (q, k, v), upstream)
    expected = torch.autograd.grad(wanted, (q, k, v), upstream)
    scale = max(float(e.norm()) for e in expected)  # with one token, q and k have no gradient
    for name, f, e in zip("qkv", found, expected, strict=True):
        assert float((f - e).norm()) < 1e-10 * scale, name


@every_case
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 197])
def test_the_map_times_the_values_is_the_output(case: Case, tokens: int) -> None:
    core = make_block(case.spec, make_layer(tokens)).core.double()
    q, k, v = make_qkv(tokens)
    matrix = attention_map(core, q, k)
    assert matrix.shape == (2, HEADS, tokens, tokens)
    torch.testing.assert_close(matrix @ v, core(q, k, v), rtol=1e-10, atol=1e-12)


@every_case
def test_row_stochastic_maps_are_non_negative_and_sum_to_one(case: Case) -> None:
    q, k, _ = make_qkv(65)
    matrix = attention_map(make_block(case.spec).core.double(), q, k)
    assert attention.load(case.spec).row_stochastic
    assert matrix.min() >= 0
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones_like(matrix[..., 0]), rtol=0, atol=1e-6)


@every_case
@pytest.mark.parametrize(("tokens", "dim", "heads"), [(64, 48, 4), (65, 64, 8), (197, 32, 2)])
def test_macs_are_the_counted_ones(case: Case, tokens: int, dim: int, heads: int) -> None:
    layer = make_layer(tokens, dim, heads)
    counted = counted_macs(make_block(case.spec, layer), torch.randn(1, tokens, dim)) - 4 * tokens * dim**2
    assert attention.load(case.spec).macs(layer) == pytest.approx(counted, rel=1e-3)


@every_case
def test_a_state_dict_brings_the_same_output(case: Case) -> None:
    block, other, x = make_block(case.spec), make_block(case.spec, seed=1), torch.randn(2, 17, DIM)
    assert not torch.equal(block(x), other(x))
    other.load_state_dict(block.state_dict())
    assert torch.equal(block(x), other(x))


@every_case
@pytest.mark.parametrize("tokens", [17, 197])
def test_bf16_autocast_stays_near_fp32(case: Case, tokens: int) -> None:
    block, x = make_block(case.spec, make_layer(tokens)), torch.randn(2, tokens, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.isfinite().all()
    assert relative(y, block(x)) < 2e-2


@every_case
def test_large_scores_stay_finite(case: Case) -> None:
    q, k, v = (x.requires_grad_() for x in make_qkv(17, dtype=torch.float32, std=30))
    y = make_block(case.spec).core(q, k, v)
    y.sum().backward()
    for x in (y, q.grad, k.grad, v.grad):
        assert x is not None
        assert x.isfinite().all()


@pytest.mark.parametrize("tokens", [17, 197])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_forms_of_softmax_agree(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    naive = make_block("softmax:impl=naive").to(dtype)
    state = naive.state_dict()
    for end in ("weight", "bias"):
        state[f"qkv.{end}"] = torch.cat([state.pop(f"{part}.{end}") for part in "qkv"])
    x = torch.randn(2, tokens, DIM, dtype=dtype)
    for form in ("merged", "fused", "auto"):
        other = make_block(f"softmax:impl={form}").to(dtype)
        other.load_state_dict(state)
        assert relative(other(x), naive(x)) < tolerance


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


@pytest.mark.parametrize("spec", ["softmax:impl=naive", "softmax:impl=fused", "entmax"])
def test_attention_dropout_keeps_the_expectation(spec: str) -> None:
    core = make_block(spec, make_layer(dropout=0.25)).core
    q, k, v = (x[:1] for x in make_qkv(17, dtype=torch.float32))
    draws = core.train()(*(x.expand(1000, -1, -1, -1) for x in (q, k, v)))
    assert not torch.equal(draws[0], draws[1])
    assert relative(draws.mean(dim=0, keepdim=True), core.eval()(q, k, v)) < 0.05


@pytest.mark.parametrize("spec", ["linear", "performer:num_features=8"])
def test_attention_dropout_needs_weights_to_drop(spec: str) -> None:
    with pytest.raises(AttentionError, match="attention_dropout"):
        attention.load(spec).build(make_layer(dropout=0.1))


def test_the_layer_must_divide_into_heads() -> None:
    with pytest.raises(AttentionError, match=r"dim \(30\) must be divisible by num_heads \(4\)"):
        LayerConfig(dim=30, num_heads=4, grid=TokenGrid(8, 8))


def test_the_grid_counts_its_tokens() -> None:
    assert TokenGrid(8, 7, num_prefix_tokens=1).num_tokens == 57
    assert TokenGrid.squarest(48) == TokenGrid(6, 8)
    assert TokenGrid.squarest(17) == TokenGrid(1, 17)


# Performer: random features.


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
