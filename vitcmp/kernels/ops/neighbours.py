"""Attention of each query to its own few keys: by torch, or by kernels that go pair by pair and copy nothing.

The keys of each query are the same for all images and heads: `Links` lists the pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitcmp.kernels.operator import Operator
from vitcmp.kernels.shapes import ShapeError
from vitcmp.kernels.tensors import wide
from vitcmp.kernels.threads import share_out
from vitcmp.kernels.torch_operator import torch_operator

MIN_RESULTS = 2**13
"""Numbers in a result below which a second thread costs more than it brings."""


def links_of(keys: Tensor, num_tokens: int) -> dict[str, Tensor]:
    """The pairs of `keys`, [P, J], the tokens that each query attends to; and the same once more, sorted by key:

    query, place among its keys, and where the pairs of each key begin, `ends`, [num_tokens + 1].
    """
    order = keys.flatten().argsort(stable=True)
    ends = F.pad(keys.flatten().bincount(minlength=num_tokens).cumsum(0), (1, 0))
    links = {"keys": keys, "query": order // keys.shape[1], "place": order % keys.shape[1], "ends": ends}
    return {name: link.int().contiguous() for name, link in links.items()}


def gathered(q: Tensor, k: Tensor, v: Tensor, links: list[Tensor], dropout: float) -> Tensor:
    """(q of [B, H, P, K], k and v of [B, H, N, K]) -> the answers, [B, H, P, K], in fp32 at least.

    Each query's keys and values are copied beside each other.

    Raises: ShapeError for other numbers of queries or keys than the links are for.
    """
    if (q.shape[2], k.shape[2]) != (len(links[0]), len(links[3]) - 1):
        raise ShapeError(f"neighbour_attention: q {tuple(q.shape)}, k {tuple(k.shape)} do not fit links of "
                         f"{len(links[0])} queries and {len(links[3]) - 1} keys")  # fmt: skip
    with torch.autocast(q.device.type, enabled=False):
        keys, shape = links[0].flatten(), links[0].shape
        near_k, near_v = (wide(x).index_select(2, keys).unflatten(2, shape) for x in (k, v))  # [B, H, P, J, K]
        scores = (wide(q) * q.shape[-1] ** -0.5).unsqueeze(-2) @ near_k.mT  # [B, H, P, 1, J]
        return (F.dropout(scores.softmax(dim=-1), dropout) @ near_v).squeeze(-2)


def _compiled(q: Tensor, k: Tensor, v: Tensor, links: list[Tensor], dropout: float) -> Tensor:
    images_and_heads = q.shape[:2]
    q, k, v = (x.flatten(0, 1).contiguous() for x in (wide(q) * q.shape[-1] ** -0.5, wide(k), wide(v)))
    weights = product("scores", q, k, links).softmax(dim=-1)  # [B H, P, J]
    return product("mixed", F.dropout(weights, dropout), v, links).unflatten(0, images_and_heads)


@torch_operator("listed_attention")
def product(kind: str, x: Tensor, y: Tensor, links: list[Tensor]) -> Tensor:
    """One of three products over all pairs; the derivatives of each are the other two.

    scores: queries [G, P, K], keys [G, N, K] -> [G, P, J]; mixed: weights [G, P, J], values [G, N, K] -> [G, P, K];
    spread: weights [G, P, J], what the queries hand back to their keys [G, P, K] -> [G, N, K].
    """
    from vitcmp.kernels.numba import neighbours as cpu

    out = _result(kind, x, y, links)
    kernel = {"scores": cpu.scores, "mixed": cpu.mixed, "spread": cpu.spread}[kind]
    used = links[1:] if kind == "spread" else links[:1]
    arrays = [t.detach().contiguous().numpy() for t in (x, y, *used, out)]
    # Each part fills rows of its own, so the result does not depend on the number of threads.
    threads = torch.get_num_threads() if out.numel() >= MIN_RESULTS else 1
    share_out(kernel, len(out) * out.shape[1], threads, *arrays)
    return out


@product.register_fake
def _result(kind: str, x: Tensor, y: Tensor, links: list[Tensor]) -> Tensor:
    rows = len(links[3]) - 1 if kind == "spread" else x.shape[1]
    return y.new_empty(len(x), rows, links[0].shape[1] if kind == "scores" else y.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.kind, x, y, links = inputs
    ctx.save_for_backward(x, y, *links)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, Tensor, list[None]]:
    x, y, *links = ctx.saved_tensors
    if ctx.kind == "scores":
        dx, dy = product("mixed", upstream, y, links), product("spread", upstream, x, links)
    elif ctx.kind == "mixed":
        dx, dy = product("scores", upstream, y, links), product("spread", x, upstream, links)
    else:
        dx, dy = product("scores", y, upstream, links), product("mixed", x, upstream, links)
    return None, dx, dy, [None] * len(links)


product.register_autograd(_differentiate, setup_context=_setup_context)


product.register_flops(lambda kind, x, y, links: 2 * x[0] * links[0][0] * links[0][1] * y[2])


def _accepts(q: Tensor, k: Tensor, v: Tensor, links: list[Tensor], dropout: float) -> bool:
    keys, *_, ends = links
    fits = q.shape[2] == len(keys) and k.shape[2] == len(ends) - 1 and k.shape == v.shape
    in_format = q.is_floating_point() and len({wide(x).dtype for x in (q, k, v)}) == 1
    return (
        fits
        and in_format
        and all(x.dtype == torch.int32 and x.device == q.device for x in links)
        and _are_in_range(links)
    )


def _are_in_range(links: list[Tensor]) -> bool:
    """Whether all pairs name queries, places and keys that there are; looked at once for each list's tensors."""
    if torch.compiler.is_compiling():
        return True  # what is traced has no numbers yet; the mechanism's own links are in range
    marks = tuple((id(x), x._version, x.data_ptr(), tuple(x.shape)) for x in links)
    if marks not in _in_range:
        keys, query, place, ends = links
        pairs, num_keys = keys.numel(), len(ends) - 1
        bounds = ((keys, num_keys), (query, len(keys)), (place, keys.shape[1]), (ends, pairs + 1))
        sized = query.numel() == place.numel() == pairs
        if len(_in_range) > 1000:
            _in_range.clear()
        _in_range[marks] = sized and all(int(x.min()) >= 0 and int(x.max()) < most for x, most in bounds)
    return _in_range[marks]


_in_range: dict[tuple[Any, ...], bool] = {}


def _example(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    width, tokens, few = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(1, 4096 // tokens), tokens, 3, 4, width, generator=generator).to(dtype)
    q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
    # Each token attends to those around it.
    keys = (torch.arange(tokens).unsqueeze(1) + torch.arange(few) - few // 2).clamp(0, tokens - 1)
    return q, k, v, list(links_of(keys, tokens).values()), 0.0


neighbour_attention = Operator(
    "neighbour_attention", "BHPK BHNK BHNK -> BHPK", {"gathered": gathered, "numba": _compiled},
    accepts=_accepts, unmeasured=lambda dtype, trains: ("numba", "gathered"),
    sizes=lambda q, k, v, links, dropout: (q.shape[-1], k.shape[2], links[0].shape[1]),
    example=_example, grid=[(w, n, j) for w in (12, 64) for n, j in ((64, 16), (256, 49), (1024, 49))],
)  # fmt: skip
