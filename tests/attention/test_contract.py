"""What is true of every mechanism: the contract of `vitcmp check`, and equality with the twins."""

from __future__ import annotations

import warnings

import pytest
import torch
from attention_cases import DIM, HEADS, WIDTH, Case, all_cases, make_block, make_layer, relative
from torch import Tensor

from vitcmp import attention
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid, attention_map
from vitcmp.workflows import check

CASES = all_cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.spec)
every_default = pytest.mark.parametrize("name", attention.available(own=True))

GRIDS = [
    TokenGrid(1, 1), TokenGrid(1, 1, 1), TokenGrid(4, 4, 1), TokenGrid(5, 7), TokenGrid(8, 8), TokenGrid(8, 8, 1),
    TokenGrid(14, 14, 1),
]  # fmt: skip


def test_every_mechanism_has_a_row() -> None:
    assert {case.spec.partition(":")[0] for case in CASES} == set(attention.available(own=True))
    assert all(case.core or case.block for case in CASES)


@every_case
@pytest.mark.parametrize("name", [name for name in check.CHECKS if name != "gradients"])
def test_the_contract_holds(case: Case, name: str) -> None:
    finding = check.check_one(attention.load(case.spec), name, reraise=True)
    assert finding.holds, finding


@every_case
def test_gradients_equal_finite_differences(case: Case) -> None:
    finding = check.check_one(attention.load(case.exact_gradients or case.spec), "gradients", reraise=True)
    assert finding.measured is not None
    assert finding.measured < 1e-6, finding


@every_case
def test_gradcheck(case: Case) -> None:
    """torch's own check of every entry, N = 9, head width 4; of the core, or of the block without one."""
    grid = TokenGrid(2, 4, 1)
    block = make_block(case.exact_gradients or case.spec, LayerConfig(8, 2, grid)).double()
    module = block.core if case.core else block
    parameters = list(module.parameters())
    shape = (1, 2, 9, 4) if case.core else (1, 9, 8)
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3 if case.core else 1)]
    # Changed in place, so that the module sees them.
    assert torch.autograd.gradcheck(lambda *leaves: module(*leaves[: len(inputs)]), [*inputs, *parameters])


@every_default
def test_what_a_mechanism_does_not_claim_is_not_so(name: str) -> None:
    """A claim withheld is a claim too: a map, rows that are weights, equivariance."""
    mechanism = attention.load(name)
    q, k, _ = check.make_qkv(mechanism)
    q[..., 0, :] = -q[..., 0, :].abs()  # a query without a positive feature
    block = check.make_block(mechanism).double()
    if not mechanism.row_stochastic and mechanism.has_map:
        matrix = attention_map(block.core, q, k).detach()
        assert max(float(-matrix.min()), float((matrix.sum(dim=-1) - 1).abs().max())) > 1e-6
    if not mechanism.equivariant:
        x, order = check.make_inputs(), torch.randperm(check.SMALL.num_tokens)
        assert relative(block(x[:, order]), block(x)[:, order]) > 1e-6
    if mechanism.no_map:
        assert not hasattr(block, "core")


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], leaves: list[Tensor], tolerance: float) -> None:
    """Outputs equal, and the gradients of all leaves."""
    (y,), (expected,) = found, wanted
    assert relative(y, expected) < tolerance
    upstream = torch.randn_like(expected)
    pairs = [torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (y, expected)]
    # With one token, q and k have no gradient: the scale is the largest one.
    scale = max(float(e.norm()) for e in pairs[1] if e is not None)
    for leaf, f, e in zip(leaves, *pairs, strict=True):
        f, e = (torch.zeros_like(leaf) if g is None else g for g in (f, e))
        assert float((f - e).norm()) <= tolerance * scale, tuple(leaf.shape)


@pytest.mark.parametrize("case", [case for case in CASES if case.core], ids=lambda case: case.spec)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_core_equals_its_twin(case: Case, grid: TokenGrid) -> None:
    core = make_block(case.spec, make_layer(grid)).core.double()
    generator = torch.Generator().manual_seed(grid.num_tokens)
    shape = (3, 2, HEADS, grid.num_tokens, WIDTH)
    q, k, v = (x.clone().requires_grad_() for x in torch.randn(shape, generator=generator, dtype=torch.float64))
    if attention.load(case.spec).num_projections == 3:
        k = q
    leaves = [*dict.fromkeys((q, k, v)), *core.parameters()]
    assert case.core is not None
    agree((core(q, k, v),), (case.core(core, q, k, v),), leaves, tolerance=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if case.block], ids=lambda case: case.spec)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_block_equals_its_twin(case: Case, grid: TokenGrid) -> None:
    block = make_block(case.spec, make_layer(grid)).double()
    x = torch.randn(2, grid.num_tokens, DIM, dtype=torch.float64, requires_grad=True)
    assert case.block is not None
    agree((block(x),), (case.block(block, x),), [x, *block.parameters()], tolerance=1e-10)


@pytest.mark.compiler
@every_default
def test_the_real_compiler_agrees(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check._compiled(attention.load(name), backend="inductor") < 1e-10


@every_case
def test_attention_dropout_keeps_the_expectation_or_is_refused(case: Case) -> None:
    try:
        block = make_block(case.spec, make_layer(TokenGrid(4, 4, 1), dropout=0.25))
    except AttentionError as error:
        assert "attention_dropout" in str(error)  # noqa: PT017
        return
    q, k, v = check.make_qkv(attention.load(case.spec), dtype=torch.float32, batch=1)
    draws = block.core.train()(*(x.expand(1000, -1, -1, -1) for x in (q, k, v)))
    assert not torch.equal(draws[0], draws[1])
    assert relative(draws.mean(dim=0, keepdim=True), block.core.eval()(q, k, v)) < 0.05


@every_default
def test_a_default_never_warns_about_its_own_sizes(name: str) -> None:
    """Sizes below the token count are `auto`; the features of a Performer follow its paper, and do warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DegenerateWarning)
        for grid in check.GRIDS:
            if name != "performer":
                attention.load(name).build(LayerConfig(DIM, HEADS, grid))


def test_the_layer_must_divide_into_heads() -> None:
    with pytest.raises(AttentionError, match=r"dim \(30\) must be divisible by num_heads \(4\)"):
        LayerConfig(dim=30, num_heads=4, grid=TokenGrid(8, 8))


def test_the_grid_counts_its_tokens() -> None:
    assert TokenGrid(8, 7, num_prefix_tokens=1).num_tokens == 57
    assert TokenGrid.squarest(48) == TokenGrid(6, 8)
    assert TokenGrid.squarest(17) == TokenGrid(1, 17)
