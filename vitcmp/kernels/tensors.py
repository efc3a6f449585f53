"""How tensors lie in memory: what operators ask of their inputs, and how their results are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MIN_SCORES = 2**15
"""Scores below which a second thread costs more than it brings."""


def wide(x: Tensor) -> Tensor:
    """`x` in fp32 at least: half precisions are promoted, fp32 and fp64 kept."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def memory(x: Tensor) -> np.ndarray:
    """The memory from the first to the last number of a tensor, for a kernel; bf16 as int16."""
    flat = x.detach()
    if not x.is_contiguous():
        last = sum((size - 1) * line for size, line in zip(x.shape, x.stride(), strict=True))
        flat = flat.as_strided((last + 1,), (1,))
    return (flat.view(torch.int16) if x.dtype == torch.bfloat16 else flat).numpy().reshape(-1)


# Of [B, H, N, K].


def side_by_side(x: Tensor) -> Tensor:
    """The same, with the numbers of each token side by side in memory, and no number shared by two tokens."""
    return x if x.stride(-1) == 1 and min(x.stride()[:-1]) > 0 else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """Memory for a result as the output projection reads it: the heads of a token side by side."""
    batch, heads, tokens, width = x.shape
    return x.new_empty(batch, tokens, heads, width).transpose(1, 2)


def sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    """Heads, queries, keys, and the width of a head."""
    _, heads, tokens, width = q.shape
    return heads, tokens, k.shape[2], width


def lines_of(*tensors: Tensor) -> np.ndarray:
    """How far apart images, heads and tokens lie, [tensors, 3]."""
    return np.array([x.stride()[:3] for x in tensors])


def num_threads(q: Tensor, k: Tensor) -> int:
    """Threads that share the heads of all images."""
    heads = q.shape[0] * q.shape[1]
    return min(torch.get_num_threads(), heads, max(1, heads * q.shape[2] * k.shape[2] // MIN_SCORES))


# Of [..., D].


def num_rows(x: Tensor) -> int:
    """Rows of the last axis."""
    return x.numel() // x.shape[-1]


def empty_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for as many numbers, row after row, however x lies in memory."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def flat(x: Tensor) -> np.ndarray:
    """The numbers, row after row, for a kernel."""
    return memory(x.contiguous())


# A projection to q, k and v at once, and its gradient.


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose equal chunks along the last axis these are, in the same memory; None if they are not."""
    first, width = parts[0], parts[0].shape[-1]
    if torch.compiler.is_compiling() or type(first) is not Tensor:
        return None  # what is traced lies nowhere yet
    facts = {(x.untyped_storage().data_ptr(), x.storage_offset() - i * width, x.shape, x.stride())
             for i, x in enumerate(parts)}  # fmt: skip
    tokens, line = first.shape[-2], len(parts) * width
    if len(facts) > 1 or first.stride() != (tokens * line, line, 1):
        return None
    return first.as_strided((len(first), tokens, line), first.stride())


class Thirds(torch.autograd.Function):
    """[B, N, 3 D] -> three of [B, N, D], whose gradients are copied together only where they do not lie so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Views of x."""
        return x.chunk(3, dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """One gradient, [B, N, 3 D]."""
        whole = None if torch.is_grad_enabled() else joined(gradients)
        return torch.cat(gradients, dim=-1) if whole is None else whole
