"""What a model computes: parameters and multiply-adds (MACs; 1 MAC = 2 FLOPs)."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vitcmp import attention

if TYPE_CHECKING:
    from vitcmp.models.vit import ViT


def parameters_m(model: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def attention_macs(model: ViT) -> int:
    """Closed-form MACs of the mechanisms of all layers for one image: all but the four projections of each."""
    specs = model.config.attention_specs
    return sum(attention.load(s).macs(layer) for s, layer in zip(specs, model.layer_configs(), strict=True))


def model_macs(model: ViT) -> int:
    """MACs of the whole model for one image: matrix products and convolutions, mechanisms by their closed form."""
    tokens, patches = model.grid.num_tokens, model.grid.height * model.grid.width
    height, width = model.config.image_hw
    total = attention_macs(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.startswith("patches."):
            total += module.weight.numel() * height * width
        elif isinstance(module, nn.Linear):
            rows = patches if name.startswith("patches.") else 1 if name == "head" else tokens
            total += module.weight.numel() * rows
    return total


def _cpu_fused(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The counter knows the GPU's fused attention but not the CPU's, and would count 0 for it."""
    return sdpa_flop_count(query, key, value)


def counted_macs(model: nn.Module, *inputs: Tensor) -> int:
    """MACs of one forward pass as torch's counter sees them, for the whole batch."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={operator: _cpu_fused}) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


def ptflops_macs(model: nn.Module, sample: Tensor) -> int | None:
    """MACs of one forward pass as ptflops counts them on aten operations; None where it fails.

    It counts element-wise work too, and does not know every fused operation.
    """
    from ptflops import get_model_complexity_info

    # It prints to stdout, and feeds uninitialised memory unless given an input.
    with contextlib.redirect_stdout(io.StringIO()):
        macs, _ = get_model_complexity_info(
            model, tuple(sample.shape[1:]), input_constructor=lambda _: {"images": sample},
            backend="aten", as_strings=False, print_per_layer_stat=False, verbose=False,
        )  # fmt: skip
    return None if macs is None else int(macs)
