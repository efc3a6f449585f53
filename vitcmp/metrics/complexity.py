"""What a model computes: parameters and multiply-adds (MACs; 1 MAC = 2 FLOPs)."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from vitcmp import attention

if TYPE_CHECKING:
    from vitcmp.models.vit import ViT


def parameters_m(model: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for p in model.parameters()) / 1e6


def attention_macs(model: ViT) -> int:
    """Closed-form MACs of the mechanisms of all layers for one image: all but the projections of each."""
    specs = model.config.attention_specs
    return sum(attention.load(s).macs(layer) for s, layer in zip(specs, model.layer_configs(), strict=True))


def model_macs(model: ViT) -> int:
    """MACs of the whole model for one image: matrix products and convolutions, mechanisms by their closed form."""
    tokens, patches = model.grid.num_tokens, model.grid.height * model.grid.width
    height, width = model.config.image_hw
    specs = model.config.attention_specs
    total = sum(attention.load(s).block_macs(layer) for s, layer in zip(specs, model.layer_configs(), strict=True))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.startswith("patches."):
            total += module.weight.numel() * height * width
        elif isinstance(module, nn.Linear) and ".attention." not in name:
            rows = patches if name.startswith("patches.") else 1 if name == "head" else tokens
            total += module.weight.numel() * rows
    return total


class UncountedError(RuntimeError):
    """An operation that the counter does not know, and that is not known to multiply nothing."""


# Beside views and what torch tags as element-wise. Sums, maxima, sorting, copying: no multiply-adds.
FREE = frozenset(
    """
    _softmax _log_softmax _to_copy _unsafe_view amax amin any arange argsort as_strided bernoulli_ bincount cat clone
    constant_pad_nd copy_ cumsum div_ empty empty_like empty_strided eye fill_ fill_diagonal_ full full_like gather
    index index_add index_copy index_select layer_norm lift_fresh linalg_vector_norm logsumexp max mean min
    native_dropout native_layer_norm new_empty new_empty_strided new_full new_ones new_zeros norm ones ones_like
    rand randn roll scalar_tensor scatter scatter_ scatter_add slice_scatter sort stack sum topk unbind where zero_
    zeros zeros_like _adaptive_avg_pool2d avg_pool2d _local_scalar_dense index_put_ index_put repeat detach flip
    upsample_bicubic2d _upsample_bicubic2d_aa resize_ select_scatter argmax floor_divide masked_fill_
    """.split()  # noqa: SIM905
)


class _Audit(TorchDispatchMode):
    """Raises UncountedError for an operation that may multiply and is counted nowhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        free = name in FREE or func.is_view or torch.Tag.pointwise in func.tags
        if not free and func.overloadpacket not in flop_registry and func.overloadpacket not in _COUNTED_HERE:
            raise UncountedError(
                f"{func} is neither counted nor known to cost no multiply-adds: register its formula with "
                "torch.utils.flop_counter.register_flop_formula"
            )
        return func(*args, **(kwargs or {}))


def _cpu_fused(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The counter knows the GPU's fused attention but not the CPU's, and would count 0 for it."""
    return sdpa_flop_count(query, key, value)


_COUNTED_HERE = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_fused}


def counted_macs(model: nn.Module, *inputs: Tensor) -> int:
    """MACs of one forward pass as torch's counter sees them, for the whole batch.

    Raises: UncountedError for an operation that is neither counted nor known to be free: no silent zeros.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_COUNTED_HERE) as counter, _Audit():
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
