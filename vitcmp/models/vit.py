"""A pre-norm Vision Transformer (Dosovitskiy et al., 2021) that differs in its attention alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import LayerConfig, TokenGrid, attention_map
from vitcmp.configs import PRESETS, ModelConfig, UserError, choose, split


class PatchEmbedding(nn.Module):
    """Images [B, C, height, width] to patch tokens [B, N, dim], row by row.

    The stem `conv` is Vision Xformers' (arXiv 2107.02239): 3 x 3 convolutions C -> dim/4 -> dim/2 -> dim at full
    resolution with nothing between them; `conv-relu` puts a ReLU between. Patches of one pixel then need no
    projection of their own.
    """

    def __init__(self, channels: int, dim: int, patch: int, stem: str) -> None:
        super().__init__()
        self.patch = patch
        self.stem: nn.Module = nn.Identity()
        if stem != "linear":
            widths = (channels, dim // 4, dim // 2, dim)
            layers: list[nn.Module] = []
            for i, (before, after) in enumerate(pairwise(widths)):
                layers += [nn.ReLU()] if i and stem == "conv-relu" else []
                layers += [nn.Conv2d(before, after, kernel_size=3, padding=1)]
            self.stem = nn.Sequential(*layers)
            channels = dim
        needs_projection = stem == "linear" or patch > 1
        self.proj = nn.Linear(channels * patch * patch, dim) if needs_projection else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        batch, channels, height, width = x.shape
        p = self.patch
        x = x.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return self.proj(x.flatten(3).flatten(1, 2))


class DropPath(nn.Module):
    """Skips a residual branch for a random part of the samples (Huang et al., 2016); a no-op in evaluation."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class MLP(nn.Sequential):
    """Linear, GELU, dropout, linear: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)): [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int, mlp_dim: int, mixer: nn.Module, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, mlp_dim, dropout)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.dropout(self.attention(self.norm1(x))))
        return x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """Images [B, channels, height, width] to logits [B, num_classes].

    Every parameter's initial value depends on (seed, its name) alone, so two models that differ in the mechanism
    start from the same weights wherever they share a name. `models.fast` computes the same in less time.

    Raises: AttentionError where a mechanism cannot work with these sizes.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        if config.channels is None or config.num_classes is None:
            raise UserError("channels and num_classes are not known: give them, or take them from a data set")
        height, width = config.image_hw
        patch, prefix = config.patch, int(config.pool == "cls")
        self.config = replace(config, patch_size=patch)
        self.grid = TokenGrid(height // patch, width // patch, num_prefix_tokens=prefix)
        self.patches = PatchEmbedding(config.channels, config.dim, patch, config.stem)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim)) if prefix else None
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid.num_tokens, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(
                config.dim, config.mlp_dim, attention.load(spec).build(layer), config.dropout,
                config.drop_path * layer.index / max(1, config.depth - 1),
            )
            for spec, layer in zip(config.attention_specs, self.layer_configs(), strict=True)
        )  # fmt: skip
        self.norm = nn.LayerNorm(config.dim, eps=1e-6) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.dim, config.num_classes)
        initialise(self, config.init_std, seed)

    def layer_configs(self) -> list[LayerConfig]:
        """What each layer's mechanism is built from."""
        c = self.config
        return [
            LayerConfig(c.dim, c.num_heads, self.grid, c.qkv_bias, c.out_bias, c.attention_dropout, index)
            for index in range(c.depth)
        ]

    @property
    def no_map(self) -> str:
        """Why there is no attention map, and in which layer of a mixed model; empty where all have one."""
        mixed = isinstance(self.config.attention, tuple)
        for layer, (spec, block) in enumerate(zip(self.config.attention_specs, self.blocks, strict=True)):
            reason = attention.load(spec).no_map
            if not reason and not hasattr(block.attention, "core"):
                reason = "its block has no core (q, k, v) -> out; its file should say why in NO_MAP"
            if reason:
                return f"no attention map{f' in layer {layer} ({spec})' if mixed else ''}: {reason}"
        return ""

    def forward(self, images: Tensor, return_maps: bool = False) -> Any:
        """Logits; with `return_maps`, logits and a list of attention maps [B, H, N, N], one a layer."""
        if return_maps:
            return self._forward_with_maps(images)
        if images.shape[1:] != (self.config.channels, *self.config.image_hw):
            wanted = (self.config.channels, *self.config.image_hw)
            raise UserError(f"images of shape {tuple(images.shape[1:])} do not fit a model made for {wanted}")
        x = self.patches(images)  # [B, N, dim]
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        x = self.dropout(x + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, 0] if self.config.pool == "cls" else x)
        return self.head(x if self.config.pool == "cls" else x.mean(dim=1))

    def _forward_with_maps(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        if reason := self.no_map:
            raise UserError(f"{self.config.attention_name} has {reason}")
        queries_and_keys: list[tuple[Tensor, Tensor]] = []
        cores: list[nn.Module] = [block.get_submodule("attention.core") for block in self.blocks]
        hooks = [core.register_forward_pre_hook(lambda _, x: queries_and_keys.append(x[:2])) for core in cores]
        try:
            logits = self(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits, [attention_map(core, q, k) for core, (q, k) in zip(cores, queries_and_keys, strict=True)]


def initialise(model: nn.Module, std: float | Literal["auto"], seed: int) -> None:
    """Set every parameter and random buffer from (seed, name).

    Linear weights: truncated normal of `std`, auto 1 / sqrt(2 fan-in), which at small widths learns far quicker than
    the 0.02 of large ViTs; positions and the class token: of 0.02; convolutions: of 1 / sqrt(fan-in), as nothing
    between them restores the scale; biases 0. Norms and what a mechanism adds keep the values that they were
    built with, except that linear layers inside a mechanism are treated like any other.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            _truncated_normal(f"{name}.weight", module.weight, module.weight[0].numel() ** -0.5, seed)
        elif isinstance(module, nn.Linear):
            width = (2 * module.in_features) ** -0.5 if std == "auto" else std
            _truncated_normal(f"{name}.weight", module.weight, width, seed)
        elif hasattr(module, "reset_random_state"):
            module.reset_random_state(seed_of(seed, name))
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for name in ("cls_token", "pos_embed"):
        if getattr(model, name, None) is not None:
            _truncated_normal(name, getattr(model, name), 0.02, seed)


def _truncated_normal(name: str, parameter: Tensor, std: float, seed: int) -> None:
    # A merged projection starts as the three separate ones would.
    prefix, merged, suffix = name.rpartition("qkv")
    names = [f"{prefix}{part}{suffix}" for part in "qkv"] if merged else [name]
    for part, rows in zip(names, parameter.data.chunk(len(names)), strict=True):
        generator = torch.Generator().manual_seed(seed_of(seed, part))
        values = torch.empty(rows.shape)
        rows.copy_(nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=generator))


def seed_of(seed: int, name: str) -> int:
    """A stream's own seed, below 2^62, from the run's seed and the stream's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 2


def build_model(preset: str = ModelConfig.preset, seed: int = 0, **settings: Any) -> ViT:
    """A ViT from a preset's name and settings of ModelConfig; images are 32 x 32 in colour, 10 classes, unless given.

        >>> model = build_model("vit", attention="performer", num_classes=10)

    Raises: UserError or AttentionError for anything unknown or that does not fit.
    """
    values = {"image_size": 32, "channels": 3, "num_classes": 10, **PRESETS[choose(preset, PRESETS, "preset")]}
    (config,) = split({**values, **settings, "preset": preset}, ModelConfig)
    return ViT(config, seed)


def resized(model: ViT, image_size: int) -> ViT:
    """The same model for images of another size, its position embedding interpolated (bicubic).

    A module of a mechanism that has parameters for each token brings `resized_state(old)`: what its state should be,
    by name, given the same module built for the old grid.

    Raises: UserError where the patch size does not divide the new size, or a mechanism's parameters cannot follow.
    """
    config = replace(model.config, image_size=image_size)
    other = ViT(config)
    positions = model.grid.resample(model.pos_embed.transpose(1, 2), other.grid).transpose(1, 2)
    state = {**model.state_dict(), "pos_embed": positions}
    for name, module in other.named_modules():
        if hasattr(module, "resized_state"):
            old = model.get_submodule(name)
            for key, _ in old.named_parameters(recurse=False):
                del state[f"{name}.{key}"]
            state.update({f"{name}.{key}": value for key, value in module.resized_state(old).items()})
    try:
        other.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"{config.attention_name} has parameters for {model.grid.num_tokens} tokens and cannot take {image_size} "
            "pixels"
        ) from None
    return other.to(model.pos_embed).train(model.training)
