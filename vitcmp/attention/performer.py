"""Performer (FAVOR+): softmax attention estimated with positive orthogonal random features.

    out = phi(q) (phi(k)^T v) / (phi(q) sum_j phi(k_j)),
    phi(x)_i = (exp(w_i . x' - |x'|^2 / 2 - c) + eps) / sqrt(m),   x' = x / K^(1/4)

The constant c keeps exp finite and cancels: for a query, its own maximum over the features; for the keys, one maximum
over features and tokens (a maximum for each key would reweight the keys). The rows w are drawn in orthogonal blocks
with the norms of Gaussian vectors, and drawn again every `redraw_interval` optimizer steps (Choromanski et al., 2021,
equations 5 to 7, and section 2.4). Rows that all have the norm sqrt(K), the paper's regularised softmax kernel, give up
the exact expectation for less noise. The ReLU kernel, phi(x) = (relu(w x') + eps) / sqrt(m), estimates no softmax: its
distance from softmax is no error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitcmp.attention import AttentionError, DegenerateWarning
from vitcmp.attention._multihead import LayerConfig, MultiHead, wide
from vitcmp.kernels.feature_maps import FeatureMap, Products

PAPER = "https://arxiv.org/abs/2009.14794"
COST = "O(N m K)"
ROW_STOCHASTIC = True
BOUNDS = {"gradients": (math.inf, "the stabilising constant counts as one, and with eps > 0 moves the output a little")}


@dataclass(frozen=True)
class Config:
    num_features: int | Literal["auto"] = "auto"
    """Random features, m; auto: the paper's K ln K, rounded down."""
    kernel: Literal["softmax", "relu"] = "softmax"
    """softmax: an estimate of softmax attention; relu: the paper's generalised attention."""
    redraw_interval: int = 1000
    """Optimizer steps between draws of the features (0: never)."""
    eps: float = 1e-4
    """Added to each feature, so that the normaliser is never zero."""
    feature_norms: Literal["chi", "sqrt"] = "chi"
    """Norms of the drawn rows: chi, as Gaussian vectors have (no bias); sqrt: sqrt(K) for all (less noise)."""


def APPROXIMATES(config: Config) -> str | None:
    return "softmax" if config.kernel == "softmax" else None


class PerformerAttention(nn.Module):
    """Shapes: q, k, v and the result are [B, H, N, K]. Features are computed in fp32 at least."""

    projection: Tensor
    num_steps: Tensor
    seed: Tensor

    def __init__(
        self, head_dim: int, num_features: int, kernel: str, redraw_interval: int, eps: float, norms: str = "chi"
    ) -> None:
        super().__init__()
        self.kernel, self.redraw_interval, self.eps, self.norms = kernel, redraw_interval, eps, norms
        # Buffers, so that a resumed run goes on with the same features.
        self.register_buffer("projection", torch.empty(num_features, head_dim))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_read_steps)
        self.reset_random_state(int(torch.randint(2**62, ())))

    def reset_random_state(self, seed: int) -> None:
        """Draw the features from `seed` and count steps from 0."""
        self.seed.fill_(seed)
        self.num_steps.zero_()
        self.steps = 0  # num_steps as a number: to read the buffer would wait for the device at each step
        self._draw()

    def after_optimizer_step(self) -> None:
        """Count the step; draw new features when the interval is over."""
        self.num_steps += 1
        self.steps += 1
        if self.redraw_interval and self.steps % self.redraw_interval == 0:
            self._draw()

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed((int(self.seed) + self.steps) % 2**63)
        num_features, head_dim = self.projection.shape
        self.projection.copy_(orthogonal_rows(num_features, head_dim, self.norms, generator))

    def feature_maps(self, dtype: torch.dtype) -> tuple[FeatureMap, FeatureMap]:
        """sqrt(m) phi of queries and of keys, in a number format. The factor cancels in the quotient."""
        w = self.projection.to(dtype).T * self.projection.shape[1] ** -0.25
        if self.kernel == "relu":
            return ReluFeatures(w, self.eps), ReluFeatures(w, self.eps)
        return QueryFeatures(w, self.eps), KeyFeatures(w, self.eps)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi, psi = self.feature_maps(wide(q[:0]).dtype)
        return Products(phi, psi, num_features=len(self.projection))(q, k, v)


class ReluFeatures(FeatureMap):
    """relu(x w) + eps, for w of [K, m] that has the factor of x' in it."""

    def __init__(self, w: Tensor, eps: float) -> None:
        self.w, self.eps = w, eps

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        return (x @ self.w).relu() + self.eps

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        return upstream.mul_(features > self.eps) @ self.w.T


class KeyFeatures(ReluFeatures):
    """exp(x w - |x'|^2 / 2 - c) + eps, c the maximum over features and tokens."""

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        return (x @ self.w).sub_(x.square().sum(dim=-1, keepdim=True) * (x.shape[-1] ** -0.5 / 2))

    def together(self, parts: Iterable[Tensor]) -> Iterable[Tensor]:
        exponents = list(parts)
        maxima = [x.amax(dim=(-2, -1), keepdim=True).detach() for x in exponents]
        c = torch.stack(maxima).amax(dim=0)
        return [self._raised(x.sub_(c)) for x in exponents]

    def _raised(self, exponent: Tensor) -> Tensor:
        raised = exponent.exp_()
        # Its gradient needs what exp gave.
        return raised + self.eps if raised.requires_grad else raised.add_(self.eps)

    def gradient(self, x: Tensor, features: Tensor, upstream: Tensor, tokens: slice) -> Tensor:
        upstream.mul_(features - self.eps)
        return (upstream @ self.w.T).addcmul_(x, upstream.sum(dim=-1, keepdim=True), value=-(x.shape[-1] ** -0.5))


class QueryFeatures(KeyFeatures):
    """The same, c each query's own maximum over the features."""

    def __call__(self, x: Tensor, tokens: slice) -> Tensor:
        exponent = super().__call__(x, tokens)
        return self._raised(exponent.sub_(exponent.amax(dim=-1, keepdim=True).detach()))


def _read_steps(core: PerformerAttention, _: object) -> None:
    core.steps = int(core.num_steps)


def orthogonal_rows(num_rows: int, dim: int, norms: str, generator: torch.Generator) -> Tensor:
    """[num_rows, dim]: orthogonal within blocks of `dim` rows; norms as of Gaussian vectors, or sqrt(dim)."""
    blocks = -(-num_rows // dim)
    gaussian = torch.randn(blocks, dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    # Without the signs of R's diagonal, Q is not uniform over the orthogonal matrices.
    directions = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).transpose(-2, -1).reshape(-1, dim)
    if norms == "sqrt":
        return directions[:num_rows] * dim**0.5
    lengths = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return directions[:num_rows] * lengths


def num_features(layer: LayerConfig, config: Config) -> int:
    """m, with `auto` resolved."""
    if config.num_features == "auto":
        return max(1, int(layer.head_dim * math.log(layer.head_dim)))
    return config.num_features


def build(layer: LayerConfig, config: Config) -> nn.Module:
    features, tokens = num_features(layer, config), layer.grid.num_tokens
    if features < 1 or config.redraw_interval < 0 or not 0 <= config.eps < math.inf:
        raise AttentionError(f"performer: num_features ({features}) must be above 0, redraw_interval "
                             f"({config.redraw_interval}) and eps ({config.eps}) 0 or more")  # fmt: skip
    if features >= tokens:
        warnings.warn(
            f"performer: {features} features for {tokens} tokens cost more than full attention", DegenerateWarning, 2
        )
    core = PerformerAttention(
        layer.head_dim, features, config.kernel, config.redraw_interval, config.eps, config.feature_norms
    )
    return MultiHead(layer, core)


def macs(layer: LayerConfig, config: Config) -> int:
    return 4 * layer.grid.num_tokens * layer.dim * num_features(layer, config)
