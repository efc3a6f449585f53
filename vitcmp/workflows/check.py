"""The contract of a mechanism: what must be true of each, measured, with the bound it is held to.

The checks need no oracle, so they run on anyone's mechanism. Blocks are small (dim 32, 2 heads), their parameters
random; where rounding would blur the answer, they run in fp64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import DegenerateWarning, LayerConfig, Mechanism, TokenGrid, attention_map
from vitcmp.kernels._torch import forget_compiled
from vitcmp.metrics.complexity import counted_macs

DIM, HEADS = 32, 2
WIDTH = DIM // HEADS

GRIDS = (
    TokenGrid(1, 1), TokenGrid(1, 1, 1), TokenGrid(4, 4, 1), TokenGrid(8, 8), TokenGrid(8, 8, 1), TokenGrid(14, 14, 1),
    TokenGrid(32, 32, 1), TokenGrid(1, 17), TokenGrid(5, 7), TokenGrid(9, 4, 1), TokenGrid(3, 11, 2),
)  # fmt: skip
"""1, 2, 17, 64, 65, 197 and 1025 tokens; odd, narrow and non-square grids; no, one and two prefix tokens."""
SMALL = TokenGrid(4, 4, 1)


@dataclass(frozen=True)
class Finding:
    """What one check measured."""

    check: str
    measured: float | None
    """The worst error; None where the check does not apply, or failed before it could measure."""
    bound: float
    holds: bool
    note: str = ""
    """Why the bound is another than usual, why the check does not apply, or what was raised."""

    @property
    def applies(self) -> bool:
        """Whether the check says something about the mechanism."""
        return self.measured is not None or not self.holds


def run(spec: str, listen: Callable[[Finding], None] = lambda finding: None) -> list[Finding]:
    """All checks of one mechanism, given as a spec or as the path of a file; a check that raises does not hold.

    `listen` gets each finding as it comes.

    Raises: AttentionError for an unknown mechanism or option.
    """
    mechanism, findings = attention.load(spec), []
    for name in CHECKS:
        findings.append(check_one(mechanism, name))
        listen(findings[-1])
    return findings


def check_one(mechanism: Mechanism, name: str, reraise: bool = False) -> Finding:
    """One check of CHECKS. With `reraise`, an exception is not turned into a finding."""
    check, bound = CHECKS[name]
    bound, note = mechanism.bounds.get(name, (bound, ""))
    try:
        measured = check(mechanism)
    except _NotApplicable as reason:
        return Finding(name, None, bound, True, str(reason))
    except Exception as error:
        if reraise:
            raise
        return Finding(name, None, bound, False, f"{type(error).__name__}: {error}".splitlines()[0])
    return Finding(name, measured, bound, measured <= bound, note)  # NaN does not hold


class _NotApplicable(Exception):
    """A check that says nothing about this mechanism; the message tells why."""


# What the checks are made of.


def make_block(mechanism: Mechanism, grid: TokenGrid = SMALL, dim: int = DIM, heads: int = HEADS, seed: int = 0) -> Any:
    """A block in evaluation mode whose parameters are moved off their initial values, random but fixed by the seed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)
        torch.manual_seed(seed)
        block = mechanism.build(LayerConfig(dim, heads, grid))
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return block.eval()


def make_inputs(grid: TokenGrid = SMALL, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """Tokens of standard deviation 1, [batch, N, DIM]."""
    generator = torch.Generator().manual_seed(grid.num_tokens)
    return torch.randn(batch, grid.num_tokens, DIM, generator=generator, dtype=torch.float64).to(dtype)


def make_qkv(
    mechanism: Mechanism, grid: TokenGrid = SMALL, dtype: torch.dtype = torch.float64, std: float = 1.0, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of [batch, HEADS, N, WIDTH]; keys are the queries where the mechanism shares them."""
    generator = torch.Generator().manual_seed(grid.num_tokens)
    shape = (3, batch, HEADS, grid.num_tokens, WIDTH)
    q, k, v = (std * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    return q, (q if mechanism.num_projections == 3 else k), v


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


def _worst(errors: Iterable[float]) -> float:
    """The largest, or NaN where one is: Python's max would pass it over."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())


def _core(mechanism: Mechanism, grid: TokenGrid = SMALL) -> nn.Module:
    if mechanism.no_map:
        raise _NotApplicable(f"no map: {mechanism.no_map}")
    block = make_block(mechanism, grid)
    if not hasattr(block, "core"):
        raise AttributeError("the block has no .core; build it with MultiHead, or say in NO_MAP why there is no map")
    return block.core


# The checks: each returns the worst error that it measured.


def _sizes(mechanism: Mechanism) -> float:
    """Grids on which the output has another shape or type than the input, or is not finite."""
    wrong = 0
    for dtype in (torch.float32, torch.float64):
        for grid in GRIDS:
            x = make_inputs(grid, dtype)
            y = make_block(mechanism, grid).to(dtype)(x)
            wrong += not (y.shape == x.shape and y.dtype == dtype and bool(y.isfinite().all()))
    return wrong


def _repeatable(mechanism: Mechanism) -> float:
    """The same block twice, and a block built anew from the same seed."""
    x = make_inputs(dtype=torch.float32)
    with torch.no_grad():
        block = make_block(mechanism)
        first = block(x)
        return float((block(x) - first).abs().max() + (make_block(mechanism)(x) - first).abs().max())


def _batch(mechanism: Mechanism) -> float:
    """Samples alone against the same samples in a batch whose other samples are a hundred times larger."""
    block, x = make_block(mechanism).double(), make_inputs(batch=3)
    x[1] *= 100
    together = block(x)
    return _worst(relative(together[i : i + 1], block(x[i : i + 1])) for i in range(3))


def _permutation(mechanism: Mechanism) -> float:
    if not mechanism.equivariant:
        raise _NotApplicable("knows where its tokens lie")
    block, x = make_block(mechanism).double(), make_inputs()
    order = torch.randperm(SMALL.num_tokens, generator=torch.Generator().manual_seed(0))
    return relative(block(x[:, order]), block(x)[:, order])


def _map(mechanism: Mechanism) -> float:
    errors = []
    for grid in GRIDS:
        core = _core(mechanism, grid).double()
        q, k, v = make_qkv(mechanism, grid, batch=1)
        with torch.no_grad():
            errors.append(relative(attention_map(core, q, k) @ v, core(q, k, v)))
    return _worst(errors)


def _rows(mechanism: Mechanism) -> float:
    """How far rows of the map are from weights: the most negative entry, or the worst sum."""
    core = _core(mechanism).double()
    if not mechanism.row_stochastic:
        raise _NotApplicable("says that its rows are no weights")
    with torch.no_grad():
        matrix = attention_map(core, *make_qkv(mechanism)[:2])
    return _worst([float(-matrix.min()), float((matrix.sum(dim=-1) - 1).abs().max())])


def _parameters(mechanism: Mechanism) -> float:
    """Parameters without a gradient, or with one that is all zero or not finite."""
    block = make_block(mechanism).train()
    y = block(make_inputs(dtype=torch.float32))
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    gradients = [p.grad for p in block.parameters()]
    return sum(g is None or not bool(g.isfinite().all()) or not bool(g.any()) for g in gradients)


def _gradients(mechanism: Mechanism) -> float:
    """Derivatives along random directions against central differences, of the input and of the parameters."""
    grid = TokenGrid(2, 4, 1)
    block, x = make_block(mechanism, grid).double(), make_inputs(grid).requires_grad_()
    leaves = [x, *block.parameters()]
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return (block(x) * upstream).sum()

    # One that is not used is another check's business; its derivative is 0.
    gradients = torch.autograd.grad(loss(), leaves, materialize_grads=True)
    step, errors = 1e-6, []
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            leaf.add_(direction, alpha=step)
            above = loss()
            leaf.add_(direction, alpha=-2 * step)
            below = loss()
            leaf.add_(direction, alpha=step)
            # Against the gradient's size, not its component: that may happen to be near zero.
            scale = gradient.norm() + 1e-3 * gradients[0].norm()
            errors.append(float(abs((above - below) / (2 * step) - (gradient * direction).sum()) / scale))
    return _worst(errors)


def _half(mechanism: Mechanism) -> float:
    """Under bf16 and fp16 autocast, against fp32 on the same rounded inputs."""
    grid, errors = TokenGrid(14, 14, 1), []
    for dtype in (torch.bfloat16, torch.float16):
        block = make_block(mechanism, grid)
        module = block.core if mechanism.has_map else block
        inputs = make_qkv(mechanism, grid, dtype) if mechanism.has_map else (make_inputs(grid, dtype),)
        with torch.no_grad():
            with torch.autocast("cpu", dtype):
                y = module(*inputs)
            errors.append(relative(y, module(*(x.float() for x in inputs))))
    return _worst(errors)


def _large(mechanism: Mechanism) -> float:
    """Entries of output and gradients that are not finite where q and k have standard deviation 30."""
    if mechanism.no_map:
        block, inputs = make_block(mechanism), [30 * make_inputs(dtype=torch.float32).requires_grad_()]
    else:
        block, inputs = make_block(mechanism).core, list(make_qkv(mechanism, dtype=torch.float32, std=30))
    for x in inputs:
        x.requires_grad_() if x.is_leaf else x.retain_grad()
    y = block(*inputs)
    y.sum().backward()
    return sum(int((~g.isfinite()).sum()) for g in [y, *(x.grad for x in inputs)] if g is not None)


def _macs(mechanism: Mechanism) -> float:
    """Closed-form MACs against those that torch counts, projections subtracted; both at least a token's width."""
    errors = []
    for grid, dim, heads in (
        (TokenGrid(8, 8), 48, 4), (TokenGrid(8, 8, 1), 64, 8), (TokenGrid(14, 14, 1), 32, 2), (TokenGrid(5, 9), 64, 4),
    ):  # fmt: skip
        block = make_block(mechanism, grid, dim, heads)
        counted = counted_macs(block, torch.randn(1, grid.num_tokens, dim))
        counted -= mechanism.num_projections * grid.num_tokens * dim**2
        errors.append(abs(mechanism.macs(LayerConfig(dim, heads, grid)) - counted) / max(counted, dim))
    return _worst(errors)


def _state(mechanism: Mechanism) -> float:
    """A fresh block that takes another's state against that other."""
    block, x = make_block(mechanism), make_inputs(dtype=torch.float32)
    other = make_block(mechanism, seed=1)
    other.load_state_dict(block.state_dict())
    with torch.no_grad():
        return float((other(x) - block(x)).abs().max())


def _compiled(mechanism: Mechanism, backend: str = "aot_eager") -> float:
    """The compiled block against the eager one, forward and gradient."""
    errors = []
    with _fresh_compiler():
        block, x = make_block(mechanism).double(), make_inputs()
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        results = []
        for form in (block, compiled):
            leaf = x.clone().requires_grad_()
            y = form(leaf)
            leaves = [leaf, *block.parameters()]
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)))
        errors = [relative(found, wanted) for wanted, found in zip(*results, strict=True) if not wanted.norm() <= 1e-6]
    return _worst(errors)


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    forget_compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        yield
    forget_compiled()


CHECKS: dict[str, tuple[Callable[[Mechanism], float], float]] = {
    "sizes": (_sizes, 0),
    "repeatable": (_repeatable, 0),
    "batch": (_batch, 1e-10),
    "permutation": (_permutation, 1e-10),
    "map": (_map, 1e-6),
    "rows": (_rows, 1e-6),
    "parameters": (_parameters, 0),
    "gradients": (_gradients, 1e-6),
    "half precision": (_half, 2e-2),
    "large inputs": (_large, 0),
    "macs": (_macs, 1e-3),
    "state": (_state, 0),
    "compiled": (_compiled, 1e-10),
}
"""Name: the check, and the bound of its error."""

MEANING = {
    "sizes": "any token count and grid; shape and type are kept",
    "repeatable": "evaluation is deterministic",
    "batch": "a sample's output does not depend on its neighbours",
    "permutation": "permuted tokens permute the output",
    "map": "attention_map @ v is the output",
    "rows": "rows of the map are weights: not negative, sum 1",
    "parameters": "every parameter gets a finite gradient",
    "gradients": "gradients equal finite differences",
    "half precision": "bf16 and fp16 autocast stay near fp32",
    "large inputs": "finite for q and k of standard deviation 30",
    "macs": "closed-form MACs equal the counted ones",
    "state": "a state_dict brings the same output",
    "compiled": "torch.compile (aot_eager, one graph) equals eager",
}
"""Name: what the check says, in words."""
