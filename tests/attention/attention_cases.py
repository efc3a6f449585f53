"""What the tests of mechanisms share: the table's rows, and small inputs.

Each `test_<mechanism>.py` holds a slow, obvious fp64 twin, the rows of its mechanism (`CASES`) and its known limits;
`test_contract.py` runs the shared checks on every row.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import DegenerateWarning, LayerConfig, TokenGrid
from vitcmp.kernels import mode, no_numba
from vitcmp.kernels.forms import Profile, kept
from vitcmp.workflows.check import relative as relative

DIM, HEADS, WIDTH = 32, 2, 16


needs_kernels = pytest.mark.skipif(bool(no_numba()) or mode() == "off", reason="compiled kernels are switched off")


class Always(Profile):
    """Measurements that find the same forms the quickest everywhere."""

    def __init__(self, *forms: str) -> None:
        super().__init__("+".join(forms))

    def order(self, *args: Any) -> tuple[str, ...]:
        return tuple(self.kind.split("+"))


def taking(*forms: str) -> AbstractContextManager[None]:
    """Every operator takes the first of these forms that it has and that can run."""
    return kept(Always(*forms))


@dataclass(frozen=True)
class Case:
    """A mechanism with options, and the twins that it must equal in output and gradients."""

    spec: str
    core: Callable[..., Tensor] | None = None
    """twin(core, q, k, v) of the core, all [B, H, N, K]; it reads the core's parameters and random state."""
    block: Callable[..., Tensor] | None = None
    """twin(block, x) of the whole block, [B, N, D]: for what has no core, or acts after it."""
    exact_gradients: str | None = None
    """Another spec whose gradients equal finite differences, where this one's do not by design."""


def all_cases() -> list[Case]:
    """The rows of all `test_<mechanism>.py`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    own = [name for name in names if name.removeprefix("test_").replace("_", "-") in attention.available(own=True)]
    return [case for name in own for case in importlib.import_module(name).CASES]


def make_layer(tokens: int | TokenGrid = 17, dim: int = DIM, heads: int = HEADS, dropout: float = 0.0) -> LayerConfig:
    grid = TokenGrid.squarest(tokens) if isinstance(tokens, int) else tokens
    return LayerConfig(dim, heads, grid, dropout=dropout)


def make_block(spec: str, layer: LayerConfig | None = None, seed: int = 0) -> Any:
    """A block in evaluation mode, its parameters moved off their initial values."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)
        block = attention.load(spec).build(layer or make_layer())
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block.eval()


def make_qkv(tokens: int, width: int = WIDTH, dtype: torch.dtype = torch.float64, std: float = 1.0) -> list[Tensor]:
    """q, k and v of [2, HEADS, tokens, width]."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        std * torch.randn(2, HEADS, tokens, width, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"
    ]


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    """[B, N, D] -> [B, H, N, K]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, K] -> [B, N, D]."""
    return x.transpose(1, 2).flatten(2)


def project(block: nn.Module, x: Tensor) -> list[Tensor]:
    """q, k and v of a MultiHead block, [B, H, N, K] each."""
    return [split_heads(part, block.num_heads) for part in block.qkv(x).chunk(3, dim=-1)]
