"""Sparsemax attention: the Euclidean projection of the scores onto the simplex, with many exact zeros.

    A = sparsemax(q k^T / sqrt(K)),   p_i = [z_i - tau]_+, tau such that sum p = 1

(Martins and Astudillo, 2016, equation 2). It is `entmax` with alpha = 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitcmp.attention import entmax
from vitcmp.attention._multihead import LayerConfig

PAPER = "https://arxiv.org/abs/1602.02068"
COST = "O(N^2 K)"
ROW_STOCHASTIC = True


@dataclass(frozen=True)
class Config:
    impl: entmax.Impl = "auto"
    """auto: numba on the CPU, torch elsewhere; triton: on CUDA, memory grows with N, but it has not run on a GPU yet;
    package: the entmax package (sorting)."""


def build(layer: LayerConfig, config: Config) -> nn.Module:
    return entmax.build(layer, entmax.Config(alpha=2.0, impl=config.impl))


def macs(layer: LayerConfig, config: Config) -> int:
    return entmax.macs(layer, entmax.Config(alpha=2.0))
