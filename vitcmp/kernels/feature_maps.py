"""Attention by feature maps: tokens are summed once, and no N x N matrix is formed.

    out_i = phi(q_i) S / max(phi(q_i) z + eps, least),   S = sum_j psi(k_j) v_j^T,   z = sum_j psi(k_j)

Features take several element-wise passes. On a CPU they are made a block of tokens at a time, so that all passes but
the first find a block in the cache and the products after it, too; the backward pass is in closed form and goes by the
same blocks. Compilers, other devices and second derivatives get the same in one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitcmp.kernels.tensors import wide
from vitcmp.kernels.torch_operator import differentiable

BLOCK = 2**19
"""Features of a block on the CPU: what stays in its caches, and is long against the time that a call takes."""


class FeatureMap:
    """phi of queries, or psi of keys: [B, H, n, K] -> [B, H, n, F], for n tokens that stand together."""

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        """The features of x, in its number format; differentiable."""
        raise NotImplementedError

    def together(self, parts: Iterable[Tensor]) -> Iterable[Tensor]:
        """The features of all tokens from those of its blocks, where they depend on each other; may change `parts`."""
        return parts

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        """The gradient of x from that of its features, `upstream`, which may be changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Products:
    """q, k, v of [B, H, N, K] -> [B, H, N, K], in the number format of v; inside, fp32 at least.

    There may be more keys than queries, or fewer.
    """

    query: FeatureMap
    key: FeatureMap
    num_features: int
    eps: float = 0.0
    """Added to the normaliser."""
    least: float = 0.0
    """The normaliser's least value."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            if torch.compiler.is_compiling() or not q.numel() * k.numel():
                return self.in_one_block(q, k, v)
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
                return _Products.apply(q, k, v, self)
            return self.forward(q, k, v, keep=False)[0]

    def in_one_block(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All in one block, differentiable any number of times."""
        (b,) = self.key.together([self.key(wide(k), slice(None))])
        a = self.query(wide(q), slice(None))
        numerator, total = a @ (b.transpose(-2, -1) @ wide(v)), _dot(a, b.sum(dim=-2, keepdim=True))
        return (numerator / self.normaliser(total)).to(v.dtype)

    def normaliser(self, total: Tensor) -> Tensor:
        """From phi(q_i) z, [..., 1]."""
        total = total + self.eps if self.eps else total
        return total.clamp(min=self.least) if self.least else total

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[Tensor, list[list[Tensor]]]:
        """The output; with `keep`, of each chunk of images: S, z, and each block's features and normaliser."""
        out, kept = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype), []
        for images, query_blocks, key_blocks in self.blocks(q, k):
            summed = total = torch.zeros((), dtype=wide(q[:0]).dtype, device=q.device)
            parts = self.key.together(self.key(_rows(k, images, t), t) for t in key_blocks)
            keys, queries, normalisers = [], [], []
            for t, b in zip(key_blocks, parts, strict=True):
                summed = summed + b.transpose(-2, -1) @ _rows(v, images, t)  # [B, H, F, K]
                total = total + b.sum(dim=-2, keepdim=True)  # [B, H, 1, F]
                if keep:
                    keys.append(b)
            for t in query_blocks:
                a = self.query(_rows(q, images, t), t)
                normaliser = self.normaliser(_dot(a, total))
                torch.div(a @ summed, normaliser, out=out[images, :, t])
                if keep:
                    queries.append(a)
                    normalisers.append(normaliser)
            kept.append([summed, total, *keys, *queries, *normalisers])
        return out, kept

    def blocks(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, list[slice], list[slice]]]:
        """Chunks of images, each with the blocks of its queries and of its keys."""
        batch, heads = q.shape[:2]
        longest = max(q.shape[-2], k.shape[-2])
        length = max(1, BLOCK // (heads * self.num_features)) if q.device.type == "cpu" else batch * longest
        images = max(1, length // longest)
        for i in range(0, batch, images):
            queries, keys = ([slice(t, t + length) for t in range(0, x.shape[-2], length)] for x in (q, k))
            yield slice(i, i + images), queries, keys


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, products: Products) -> Tensor:
        out, kept = products.forward(q, k, v, keep=True)
        ctx.products = products
        ctx.save_for_backward(q, k, v, *(x for chunk in kept for x in chunk))
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        products, (q, k, v, *kept) = ctx.products, ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable(products.in_one_block, (q, k, v), upstream), None
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        saved = iter(kept)
        for images, query_blocks, key_blocks in products.blocks(q, k):
            summed, total = next(saved), next(saved)
            keys, queries, normalisers = (
                [next(saved) for _ in blocks] for blocks in (key_blocks, query_blocks, query_blocks)
            )
            d_summed = d_total = torch.zeros((), dtype=summed.dtype, device=summed.device)
            for t, a, normaliser in zip(query_blocks, queries, normalisers, strict=True):
                d = _rows(upstream, images, t) / normaliser
                da = d @ summed.transpose(-2, -1)
                # Of the normaliser, which has none where its least value stands in its place.
                r = _dot(a, da) / -normaliser
                if products.least:
                    r = r * (normaliser > products.least)
                d_summed = d_summed + a.transpose(-2, -1) @ d
                d_total = d_total + (a * r).sum(dim=-2, keepdim=True)
                da.addcmul_(r, total)
                dq[images, :, t] = products.query.gradient(_rows(q, images, t), a, da, t)
            for t, b in zip(key_blocks, keys, strict=True):
                db = (_rows(v, images, t) @ d_summed.transpose(-2, -1)).add_(d_total)
                dv[images, :, t] = b @ d_summed
                dk[images, :, t] = products.key.gradient(_rows(k, images, t), b, db, t)
        return dq, dk, dv, None


def _rows(x: Tensor, images: slice, tokens: slice) -> Tensor:
    """A block of x, in fp32 at least. In a model, x is a view of one projection for all: each product would copy it."""
    x = wide(x[images, :, tokens])
    return x if x.stride(-2) == x.shape[-1] else x.contiguous()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner products of rows, [..., 1]: for one column, sums are quicker than a matrix product."""
    return (x * y).sum(dim=-1, keepdim=True)


class EluPlusOne(FeatureMap):
    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        return elu_plus_one(x)

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        return upstream.mul_(features.clamp(max=1))


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, without the cancellation of elu near -1, and with its slope of 1 at 0 (a clamp has none there)."""
    positive = x.relu()
    return (x - positive).exp_() + positive


def elu_products(width: int, eps: float) -> Products:
    """Linear attention, of heads of this width."""
    phi = EluPlusOne()
    return Products(phi, phi, num_features=width, eps=eps)
