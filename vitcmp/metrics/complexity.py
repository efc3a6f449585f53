"""What a model computes: parameters, multiply-adds (MACs; 1 MAC = 2 FLOPs), and the bytes that it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from vitcmp import attention
from vitcmp.kernels._torch import TorchDispatchMode, tree_leaves

if TYPE_CHECKING:
    from vitcmp.models.vit import ViT

TOLERANCE = 0.02
"""Share by which two ways of counting may differ and still agree."""


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


# Beside views and what torch tags as element-wise. Sums, maxima, sorting, copying, updates: no multiply-adds.
FREE = frozenset(
    """
    _softmax _log_softmax _to_copy _unsafe_view amax amin any arange argsort as_strided bernoulli_ bincount cat clone
    constant_pad_nd copy_ cumsum div_ empty empty_like empty_strided eye fill_ fill_diagonal_ full full_like gather
    index index_add index_copy index_select layer_norm lift_fresh linalg_vector_norm logsumexp max mean min
    native_dropout native_layer_norm new_empty new_empty_strided new_full new_ones new_zeros norm ones ones_like
    rand randn roll scalar_tensor scatter scatter_ scatter_add slice_scatter sort stack sum topk unbind where zero_
    zeros zeros_like _adaptive_avg_pool2d avg_pool2d _local_scalar_dense index_put_ index_put repeat detach flip
    upsample_bicubic2d _upsample_bicubic2d_aa resize_ select_scatter argmax floor_divide masked_fill_ embedding
    nll_loss_forward _fused_rms_norm
    _softmax_backward_data _log_softmax_backward_data nll_loss_backward native_layer_norm_backward select_backward
    slice_backward embedding_dense_backward avg_pool2d_backward _adaptive_avg_pool2d_backward unfold_backward
    upsample_bicubic2d_backward _upsample_bicubic2d_aa_backward native_dropout_backward _fused_rms_norm_backward
    _fused_adamw_ _record_function_enter_new _record_function_exit
    layer_norm_backward
    """.split()  # noqa: SIM905
)
_OVERWRITES = frozenset("copy_ fill_ zero_ bernoulli_ resize_".split())  # noqa: SIM905
"""Operations in place that do not read what they write to."""
_UNTOUCHED = frozenset("empty empty_like empty_strided new_empty new_empty_strided resize_".split())  # noqa: SIM905


@dataclass(frozen=True)
class Count:
    """What the operations of one call do, forward and backward, for the whole batch."""

    macs: int
    moved_bytes: int
    """Each operation that is no view reads its inputs once and writes its results once: the traffic of eager
    execution, but for what stays in caches. Repeats of a broadcast tensor are not read twice."""
    by_operation: dict[str, int] = field(default_factory=dict)
    """MACs by the name of the operation, such as aten.bmm."""
    biases: int = 0
    """Additions of biases within the products, which are not among the MACs."""


def count(call: Callable[[], object]) -> Count:
    """MACs, by the formulas of torch's counter, and bytes moved by one eager call.

    Raises: UncountedError in inference mode (use no_grad), and for an operation that is neither counted nor known to be
    free: no silent zeros.
    """
    with _Counter() as counter:
        call()
    return Count(counter.macs.total(), counter.moved_bytes, dict(counter.macs), counter.biases)


def counted_macs(model: nn.Module, *inputs: Tensor) -> int:
    """MACs of one forward pass as torch's counter sees them, for the whole batch.

    Raises: UncountedError for an operation that is neither counted nor known to be free.
    """
    with torch.no_grad():
        return count(lambda: model(*inputs)).macs


def ptflops_macs(model: nn.Module, *inputs: Tensor) -> int | None:
    """MACs of one forward pass as ptflops counts them on aten operations; None where it fails.

    It adds biases as MACs, and does not know every operation: `disagreement` says what that comes to.
    """
    # The function around its engine leaves hooks on the model, and prints.
    from ptflops.aten_engine import FlopCounterMode

    counter = FlopCounterMode()
    try:
        with torch.no_grad(), counter:
            model(*inputs)
    except Exception:
        return None
    return int(counter.complexity)


def disagreement(closed: int, found: Count, ptflops: int | None) -> list[str]:
    """Which ways of counting a forward pass depart from its closed form by more than 2 %, and why where known.

    All three for the same batch. The causes are those that `found` shows: operations that ptflops lacks, and biases.
    """
    from ptflops.aten_ops import ATEN_OPS_MAPPING

    lines = []
    if excess := _excess(found.macs, closed):
        lines.append(f"torch's counter finds {excess} than the closed form")
    if ptflops is None:
        lines.append("ptflops failed")
    elif excess := _excess(ptflops, closed):
        known = {str(name) for name in ATEN_OPS_MAPPING}
        unseen = {name: macs for name, macs in found.by_operation.items() if macs and name not in known}
        causes = []
        if ptflops < closed and unseen:
            causes.append(f"it does not see {', '.join(unseen)}")
        if ptflops > closed and found.biases:
            causes.append("it counts biases as MACs")
        if _excess(ptflops, found.macs - sum(unseen.values()) + found.biases) or not causes:
            causes.append("a cause is not known")
        lines.append(f"ptflops finds {excess} than the closed form: {', and '.join(causes)}")
    return lines


def _excess(found: int, wanted: int) -> str:
    """By how much a count departs, as `3.1 % more`; empty where it agrees."""
    if abs(found - wanted) <= TOLERANCE * wanted:
        return ""
    share = f"{abs(found / wanted - 1):.1%}".replace("%", " %") if wanted else f"{found:,} MACs"
    return f"{share} {'more' if found > wanted else 'less'}"


class _Counter(TorchDispatchMode):
    """Adds up MACs, bytes and biases; raises UncountedError for what may multiply and is counted nowhere.

    torch's own counter follows modules too, for which it needs gradients, and counts 0 where it knows no formula.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs: Counter[str] = Counter()
        self.moved_bytes = self.biases = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation, name, kwargs = func.overloadpacket, func.overloadpacket.__name__, kwargs or {}
        if torch.is_inference_mode_enabled():
            raise UncountedError("in inference mode, operations come before they are taken apart: count in no_grad")
        formula = _FORMULAS.get(operation) or flop_registry.get(operation)
        free = name in FREE or name.startswith("_foreach_") or func.is_view or torch.Tag.pointwise in func.tags
        if formula is None and not free:
            raise UncountedError(
                f"{func} is neither counted nor known to cost no multiply-adds: register its formula with "
                "torch.utils.flop_counter.register_flop_formula"
            )
        result = func(*args, **kwargs)
        if formula is not None:
            self.macs[str(operation)] += formula(*args, **kwargs, out_val=result) // 2
        if operation is torch.ops.aten.addmm or (operation is torch.ops.aten.convolution and args[2] is not None):
            self.biases += result.numel()
        if not func.is_view and name not in _UNTOUCHED:
            self.moved_bytes += _moved_bytes(func, args, kwargs, result)
        return result


def _moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operation reads and writes."""
    given = [(a, kwargs.get(a.name, args[i] if i < len(args) else None)) for i, a in enumerate(func._schema.arguments)]
    changed = {id(t) for a, value in given if a.alias_info and a.alias_info.is_write for t in _tensors(value)}
    read = {id(t): t for a, value in given for t in _tensors(value)}
    written = {id(t): t for t in _tensors(result)} | {key: t for key, t in read.items() if key in changed}
    if not changed and {*map(_storage, written.values())} & {*map(_storage, read.values())}:
        return 0  # a view that is not declared as one
    if func.overloadpacket.__name__ in _OVERWRITES or any(a.is_out for a, _ in given):
        read = {key: t for key, t in read.items() if key not in changed}
    return sum(map(_bytes, read.values())) + sum(map(_bytes, written.values()))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(values) if isinstance(x, Tensor))


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Bytes of memory behind a tensor: a dimension of stride 0 repeats the same ones, as may overlapping windows."""
    numbers = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return min(numbers * x.element_size(), x.untyped_storage().nbytes())


def _fused_on_cpu(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _fused_on_cpu_backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient.shape, q.shape, k.shape, v.shape)


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: tuple[Tensor | None, ...]
) -> int:
    """The forward pass's products once for the input's gradient, once for the weight's."""
    transposed = args[4]
    places = (x if transposed else gradient)[:, :1].numel()
    return 2 * places * weight.numel() * sum(wanted is not None for wanted in out_val[:2])


_FORMULAS: dict[Any, Callable[..., int]] = {
    # Older torch does not know the fused attention of the CPU.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_on_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_on_cpu_backward,
    # torch's counts the weight's gradient as if there were one group.
    torch.ops.aten.convolution_backward: _convolution_backward,
}
"""FLOP of operations that torch's counter lacks, or has wrong."""
if hasattr(torch.ops.aten, "_scaled_dot_product_attention_math_for_mps"):
    _FORMULAS[torch.ops.aten._scaled_dot_product_attention_math_for_mps] = _fused_on_cpu
