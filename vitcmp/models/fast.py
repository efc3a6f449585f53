"""The model that trains quickly: fast blocks in place of plain ones, with the same parameters and the same results.

`fast(model)` leaves the model as it is and returns one that shares its modules, in which `FastBlock` computes what
`Block` says by the operators of `vitcmp.kernels`. A block's own modules are then not called one by one, so a block
stays plain where that would show: where someone has put a hook, a parametrisation or another module in it.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from vitcmp.attention import MultiHead
from vitcmp.kernels import mode
from vitcmp.kernels._torch import has_global_hooks, is_watched
from vitcmp.kernels.ops import add_linear, layer_norm, norm_linear, norm_mlp
from vitcmp.kernels.tensors import Thirds
from vitcmp.models.vit import MLP, Block, DropPath, ViT


def fast(model: ViT) -> ViT:
    """The same model with fast blocks where its own are untouched; modules and parameters are shared.

    With VITCMP_KERNELS=off, or a hook on all modules, it is the model itself.
    """
    if mode() == "off" or has_global_hooks():
        return model
    found = copy.copy(model)
    found._modules = dict(model._modules)
    blocks = [fast_block(block) for block in model.blocks]
    if model.config.pool == "cls" and isinstance(blocks[-1], FastBlock):
        blocks[-1].first_alone = True
    found.blocks = nn.ModuleList(blocks).train(model.training)
    return found


def fast_block(block: nn.Module) -> nn.Module:
    """A fast block with the modules of a plain one that is untouched; any other one itself."""
    return FastBlock(cast(Block, block)) if mode() != "off" and is_untouched(block) else block


def kind_of(model: nn.Module) -> str:
    """What a record says of a model's blocks: fast, plain, or how many of them are fast."""
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    num_fast = sum(isinstance(block, FastBlock) for block in blocks)
    return "plain" if not num_fast else "fast" if num_fast == len(blocks) else f"{num_fast} of {len(blocks)} fast"


class FastBlock(Block):
    """A plain block's modules, and its results: [B, N, dim] -> [B, N, dim].

    With `first_alone`, of the class token alone in training, [B, 1, dim]: the head reads no other, so what follows the
    attention needs no other. In evaluation all tokens go on.
    """

    def __init__(self, block: Block, first_alone: bool = False) -> None:
        nn.Module.__init__(self)
        for name, module in block.named_children():
            self.add_module(name, module)
        self.first_alone = first_alone
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        in_bf16 = autocasts(torch.bfloat16)
        if autocasts(torch.float16):
            return super().forward(x)
        first_alone = self.first_alone and self.training and torch.is_grad_enabled()
        if self.training and (self.dropout.p or self.drop_path.probability or self.mlp[2].p):
            mixed = self.attention(layer_norm(x, *_of_norm(self.norm1), in_bf16))
            x = _first(x + self.drop_path(self.dropout(mixed)), first_alone)
            return x + self.drop_path(self.dropout(self.mlp(layer_norm(x, *_of_norm(self.norm2), in_bf16))))
        mixer = self.attention
        if type(mixer) is MultiHead:
            mixed = _first(mixer.mix(*self._projected(x, mixer, in_bf16)), first_alone)
            x = add_linear(_first(x, first_alone), mixed, mixer.out.weight, mixer.out.bias, in_bf16)
        else:
            x = _first(x + mixer(layer_norm(x, *_of_norm(self.norm1), in_bf16)), first_alone)
        w1, b1, w2, b2 = self.mlp.parameters()
        weight, bias, eps = _of_norm(self.norm2)
        return norm_mlp(x, weight, bias, w1, b1, w2, b2, eps, in_bf16)

    def _projected(self, x: Tensor, mixer: MultiHead, in_bf16: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [B, N, dim] each."""
        weight, bias, eps = _of_norm(self.norm1)
        if not mixer.merged:
            return mixer.project(layer_norm(x, weight, bias, eps, in_bf16))
        qkv = norm_linear(x, weight, bias, mixer.qkv.weight, mixer.qkv.bias, eps, in_bf16)
        if torch.compiler.is_compiling() or is_watched() or type(qkv) is not Tensor:
            q, k, v = qkv.chunk(3, dim=-1)
        else:
            q, k, v = Thirds.apply(qkv)
        return q, k, v


def is_untouched(block: nn.Module) -> bool:
    """Whether nobody has put anything into a block, or around one of the modules that a fast one does not call."""
    if type(block) is not Block or type(block.mlp) is not MLP or len(block.mlp) != 4:
        return False
    mixer, (first, gelu, dropout, second) = block.attention, block.mlp
    types = [
        (block, Block), (block.norm1, nn.LayerNorm), (block.norm2, nn.LayerNorm), (block.mlp, MLP),
        (first, nn.Linear), (gelu, nn.GELU), (dropout, nn.Dropout), (second, nn.Linear),
        (block.dropout, nn.Dropout), (block.drop_path, DropPath),
    ]  # fmt: skip
    if type(mixer) is MultiHead:
        # Others are called whole, so what is inside them is their own.
        types += [(m, nn.Linear) for m in (mixer.qkv if mixer.merged else None, mixer.out) if m is not None]
        types.append((mixer, MultiHead))
    if any(type(module) is not kind or is_heard(module) for module, kind in types):
        return False
    parameters = [block.norm1.weight, block.norm1.bias, block.norm2.weight, block.norm2.bias, first.bias, second.bias]
    return gelu.approximate == "none" and all(p is not None for p in parameters)


def is_heard(module: nn.Module) -> bool:
    """Whether a hook waits for the module's calls, or its forward has been put in its place."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or bool({"forward", "project", "mix"} & vars(module).keys())


def autocasts(dtype: torch.dtype) -> bool:
    """Whether autocast takes products to this number format on the CPU now."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype


def _of_norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _first(x: Tensor, alone: bool) -> Tensor:
    """The first token alone, [B, 1, D], if asked for; else all."""
    return x[:, :1] if alone else x
