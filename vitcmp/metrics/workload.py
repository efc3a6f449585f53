"""What is measured: a cell of a bench, built and ready to be called, and all that a worker process does with it."""

from __future__ import annotations

import math
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcmp import attention, kernels, machine
from vitcmp.attention import AttentionError, DegenerateWarning, LayerConfig, TokenGrid
from vitcmp.configs import BenchConfig, ModelConfig, RuntimeConfig
from vitcmp.data.datasets import load_data
from vitcmp.kernels import forms
from vitcmp.kernels._torch import keep_compiled_buffers
from vitcmp.kernels.ops.rows import MIN_NUMBERS
from vitcmp.metrics import approximation, complexity, memory
from vitcmp.metrics.latency import Call, Timer
from vitcmp.metrics.roofline import Ceilings, ceilings
from vitcmp.models.checkpoint import load_run
from vitcmp.models.fast import fast, fast_block, kind_of
from vitcmp.models.vit import Block, ViT, initialise

IMAGES = 4
"""Test images on which errors are measured."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    model: ModelConfig
    """With the attention spec; at the level model also with the image size that gives the tokens."""
    bench: BenchConfig
    """With one value for each setting that may have several."""

    def __str__(self) -> str:
        b = self.bench
        return f"{self.name}, {b.level}, {b.mode}, N = {b.tokens}, batch {b.batch_size}, {b.precision}, {b.execution}"

    @property
    def name(self) -> str:
        """The mechanism."""
        return self.model.attention_name

    @property
    def tokens(self) -> int:
        """Patches, without the class token."""
        return cast(int, self.bench.tokens)

    @property
    def batch_size(self) -> int:
        """Images at a time."""
        return cast(int, self.bench.batch_size)

    @property
    def grid(self) -> TokenGrid:
        """The squarest grid of the tokens, with the model's class token."""
        return TokenGrid.squarest(self.tokens, num_prefix_tokens=int(self.model.pool == "cls"))

    @property
    def layer(self) -> LayerConfig:
        """What the mechanism is built from; at the level model, every layer's."""
        m = self.model
        return LayerConfig(m.dim, m.num_heads, self.grid, m.qkv_bias, m.out_bias)

    def dtype(self, device: torch.device) -> torch.dtype:
        """The number format of products on a device."""
        return DTYPES[machine.precision(cast(str, self.bench.precision), device)]


class Workload:
    """A cell's module and inputs on a device; every process builds the same from the same cell.

    Inputs are normal with standard deviation 1: [B, N, D] tokens, [B, H, N, K] queries, keys and values at the level
    core, images at the level model. In lower precision they run under autocast, as in training.

    Raises: AttentionError where the mechanism cannot take these sizes, or has no core to measure.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device, self.dtype = cell, device, cell.dtype(device)
        module, shared_qk = build_module(cell)
        module = quick(module, device, self.dtype)
        self.module = module.to(device).train(cell.bench.mode == "train-step")
        self.inputs = _inputs(cell, device, self.dtype, shared_qk)
        self.constants = tuple(x.detach() for x in self.inputs)
        self.optimizer = None
        if parameters := list(self.module.parameters()):
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.called: Callable[..., Tensor] = self.module
        if cell.bench.execution == "compiled":
            self.called = _compiled(self.module)
        self.output: Tensor | None = None

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The output."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.called(*inputs)

    def inference(self) -> None:
        """A forward pass without gradients."""
        with torch.inference_mode():
            self.forward(self.constants)

    def loss(self) -> Tensor:
        """Cross-entropy at the level model, elsewhere the mean square of the output."""
        y = self.forward(self.inputs).float()
        if self.cell.bench.level != "model":
            return y.square().mean()
        return F.cross_entropy(y, torch.arange(len(y), device=self.device) % y.shape[1])

    def keep_graph(self) -> None:
        """The forward pass that `backward` goes back through."""
        self.output = self.loss()

    def backward(self, again: bool = True) -> None:
        """The gradients of all parameters and, but for images, of the inputs; `again`: it can be called once more."""
        assert self.output is not None
        torch.autograd.grad(self.output, self._differentiable(), retain_graph=again, allow_unused=True)

    def forget(self) -> None:
        """Drop what calls have left: graph, gradients and the optimizer's state."""
        self.output = None
        for tensor in self._differentiable():
            tensor.grad = None
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def train_step(self) -> None:
        """Forward, backward and AdamW; without parameters, nothing is to be updated."""
        self.finish_step(self.loss())

    def finish_step(self, loss: Tensor) -> None:
        """What a step of the cell's mode does after the forward pass."""
        if self.cell.bench.mode == "backward":
            self.output = loss
            self.backward(again=False)
            return
        self.module.zero_grad()
        for x in self.inputs:
            x.grad = None
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def call(self) -> Call:
        """What is timed, and what goes before it."""
        return {
            "forward": Call(self.inference),
            "backward": Call(self.backward, prepare=self.keep_graph),
            "train-step": Call(self.train_step),
        }[cast(str, self.cell.bench.mode)]

    def _differentiable(self) -> list[Tensor]:
        return [t for t in (*self.inputs, *self.module.parameters()) if t.requires_grad]


class Core(nn.Module):
    """A mechanism without its projections: q, k, v of [B, H, N, K] to [B, H, N, K]."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.core = cast(nn.Module, mixer.core)
        self.after = cast("nn.Module | None", getattr(mixer, "after", None))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the output projection would read."""
        mixed = self.core(q, k, v)
        return mixed if self.after is None else self.after(mixed, v)


def build_module(cell: Cell) -> tuple[nn.Module, bool]:
    """The module of the cell's level, with the same weights in every process, and whether its keys are its queries.

    Raises: AttentionError where the mechanism cannot take these sizes, or has no core to measure.
    """
    if cell.bench.level == "model":
        return ViT(cell.model), False
    mechanism = attention.load(cell.name)
    module = mechanism.build(cell.layer)
    if cell.bench.level == "block":
        module = Block(cell.model.dim, cell.model.mlp_dim, module, dropout=0.0, drop_path=0.0)
    initialise(module, "auto", seed=0)
    if cell.bench.level != "core":
        return module, False
    if not hasattr(module, "core"):
        why = mechanism.no_map or "its block has none"
        raise AttentionError(f"{cell.name} has no core from queries, keys and values on: {why}; take --level attention")
    return Core(module), getattr(module, "shared_qk", False)


def quick(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model or block as training has it: with fast blocks, but for fp16 on a CPU, which no kernel computes in."""
    if device.type == "cpu" and dtype == torch.float16:
        return module
    if isinstance(module, ViT):
        return fast(module)
    return fast_block(module) if isinstance(module, Block) else module


def _inputs(cell: Cell, device: torch.device, dtype: torch.dtype, shared_qk: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(cell.batch_size, *shape, generator=generator).to(device)

    m, layer = cell.model, cell.layer
    if cell.bench.level == "model":
        assert m.channels is not None
        return (normal(m.channels, *m.image_hw),)
    if cell.bench.level == "core":
        # Under autocast, the projections would have given them in its format.
        q, k, v = (normal(m.num_heads, layer.grid.num_tokens, layer.head_dim).to(dtype) for _ in "qkv")
        inputs = [q, q if shared_qk else k, v]
    else:
        inputs = [normal(layer.grid.num_tokens, m.dim)]
    return tuple(x.requires_grad_(cell.bench.mode != "forward") for x in inputs)


def _limit(device: torch.device, limit_mib: int) -> None:
    """A device of its own says by itself that its memory ran out."""
    if device.type == "cpu":
        memory.limit_memory(limit_mib)


class Station:
    """Lives in a worker process: holds workloads, ready to be timed, and answers what is asked about a cell.

    A cell's `copy` tells two instances of the same cell apart.
    """

    def __init__(self, device_name: str, threads: int, limit_mib: int) -> None:
        self.device = torch.device(device_name)
        torch.set_num_threads(threads)
        # As in training; what is freed and asked for again must not cost page faults of its own.
        machine.keep_freed_memory()
        _limit(self.device, limit_mib)
        warnings.simplefilter("ignore")
        self.ready: dict[tuple[Cell, int], tuple[Workload, Timer]] = {}
        self.ran: dict[Cell, dict[str, Any]] = {}

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """What the machine can do in a number format."""
        return ceilings(self.device, dtype)

    def describe(self, cell: Cell) -> tuple[dict[str, Any], list[str]]:
        """Parameters, MACs three ways, work and traffic, as far as counted; and what is to be known of them."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DegenerateWarning)
            load = Workload(_eager(cell), self.device)
        notes = [str(w.message) for w in caught if issubclass(w.category, DegenerateWarning)]
        sizes, more = _sizes(load)
        return sizes, list(dict.fromkeys([*notes, *more]))

    def prepare(self, cell: Cell, copy: int) -> None:
        """Build a cell, warm it up, and settle how many calls a sample takes."""
        load = Workload(cell, self.device)
        kernels.forget_used()
        self.ready[cell, copy] = load, Timer(load.call(), self.device)
        self.ran[cell] = {
            "blocks_used": kind_of(load.module), "kernels_used": kernels.used(),
            "kernel_profile": forms.active().digest,
        }  # fmt: skip
        load.output = None

    def what_ran(self, cell: Cell) -> dict[str, Any]:
        """Metrics of a prepared cell: fast or plain blocks, the forms of operators, and by which profile."""
        return self.ran[cell]

    def sample(self, cell: Cell, copy: int) -> tuple[float, float]:
        """Milliseconds a call, and the seconds that the sample took, without preparing what a former worker held."""
        if (cell, copy) not in self.ready:
            self.prepare(cell, copy)
        load, timer = self.ready[cell, copy]
        start = time.perf_counter()
        ms = timer.sample_ms()
        # Of all graphs of a group, one at a time is enough.
        load.output = None
        return ms, time.perf_counter() - start

    def cold_ms(self, cell: Cell, samples: int) -> list[float]:
        """On CUDA: milliseconds of calls that find the cache full of something else."""
        if (cell, 0) not in self.ready:
            self.prepare(cell, 0)
        load, timer = self.ready[cell, 0]
        taken = [timer.cold_ms() for _ in range(samples)]
        load.output = None
        return taken

    def release(self) -> None:
        """Forget all workloads, and give their memory back."""
        self.ready.clear()
        memory.give_back(self.device)

    def memory(self, cell: Cell) -> dict[str, float | None]:
        """Metrics of memory, for a device that counts its own."""
        return peak_memory(cell, self.device)

    def errors(self, cell: Cell, run: str | None, runtime: RuntimeConfig) -> dict[str, Any]:
        """How far the mechanism is from what it approximates, on a run's queries and keys or on random ones."""
        if run is None:
            inputs = approximation.random_inputs(2, cell.model.num_heads, cell.grid.num_tokens, cell.layer.head_dim)
            on_device = [(q.to(self.device), k.to(self.device), v.to(self.device)) for q, k, v in inputs.layers]
            return approximation.metrics(cell.name, replace(inputs, layers=on_device), cell.layer)
        trained = load_run(run, runtime.results)
        trained.model.to(self.device)
        images = load_data(trained.info.run_config.data, runtime.data_dir).test.images[:IMAGES]
        inputs = approximation.run_inputs(trained, images, TokenGrid.squarest(cell.tokens))
        return approximation.metrics(cell.name, inputs)


class MemoryStation:
    """Lives in a process of its own for one cell, on a CPU: what its memory peaks at."""

    def __init__(self, device_name: str, threads: int, limit_mib: int) -> None:
        memory.return_freed_memory()
        self.device = torch.device(device_name)
        torch.set_num_threads(threads)
        _limit(self.device, limit_mib)
        warnings.simplefilter("ignore")

    def memory(self, cell: Cell) -> dict[str, float | None]:
        """Metrics of memory."""
        return peak_memory(cell, self.device)


def peak_memory(cell: Cell, device: torch.device) -> dict[str, float | None]:
    """Metrics of memory of one call, above what the built module and its inputs hold."""
    load = Workload(cell, device)
    # What libraries allocate once is not the mechanism's, nor are kernels that the first call loads. A few images show
    # it, as many as the model's kernels begin with; but compiled code is for one size.
    few = min(cell.batch_size, math.ceil(MIN_NUMBERS / (cell.grid.num_tokens * cell.model.dim)))
    first = load
    if cell.bench.execution != "compiled":
        first = Workload(Cell(cell.model, replace(cell.bench, batch_size=few)), device)
    first.inference()
    if cell.bench.mode == "forward":
        return memory.measure_memory(device, load.inference)
    first.finish_step(first.loss())
    first.forget()
    return memory.measure_memory(device, load.inference, load.loss, load.finish_step)


def _compiled(module: nn.Module) -> Callable[..., Tensor]:
    """The module, compiled for one size.

    The compiler's cache belongs to a code object, and mechanisms share theirs: one of its own keeps a module from being
    searched among the others' entries, and from the limit of their number.
    """

    def call(*inputs: Tensor) -> Tensor:
        return module(*inputs)

    # A timed backward pass goes through its graph more than once.
    keep_compiled_buffers()
    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return torch.compile(own, dynamic=False)


def _eager(cell: Cell) -> Cell:
    return Cell(cell.model, replace(cell.bench, execution="eager"))


def _sizes(load: Workload) -> tuple[dict[str, Any], list[str]]:
    """MACs of one image's forward pass, three ways; FLOP and bytes of one call of the cell's mode; and notes."""
    cell, module, batch = load.cell, load.module, load.cell.batch_size
    macs, in_attention = _closed_form(cell, module)
    sizes: dict[str, Any] = {
        "params_m": complexity.parameters_m(module), "macs_g": macs / 1e9, "attention_macs_g": in_attention / 1e9,
        "precision_used": next(name for name, dtype in DTYPES.items() if dtype == load.dtype),
    }  # fmt: skip
    if not cell.bench.counts:
        return sizes, []
    try:
        with torch.no_grad():
            forward = complexity.count(lambda: load.forward(load.constants))
        whole, call = forward, load.call()
        if cell.bench.mode != "forward":
            if call.prepare:
                call.prepare()
            whole = complexity.count(call.run)
    except complexity.UncountedError as error:
        return sizes, [f"MACs: {error}"]
    found = complexity.ptflops_macs(module, *load.constants)
    sizes |= {
        "counted_macs_g": forward.macs / batch / 1e9, "ptflops_macs_g": None if found is None else found / batch / 1e9,
        "work_gflop": 2 * whole.macs / 1e9, "moved_mib": whole.moved_bytes / 2**20,
        "intensity_flop_byte": 2 * whole.macs / whole.moved_bytes,
    }  # fmt: skip
    notes = complexity.disagreement(macs * batch, forward, found)
    if notes:
        sizes["macs_note"] = "; ".join(notes)
    return sizes, []


def _closed_form(cell: Cell, module: nn.Module) -> tuple[int, int]:
    """MACs of one image at the cell's level, and of the mechanism without its projections."""
    if isinstance(module, ViT):
        return complexity.model_macs(module), complexity.attention_macs(module)
    mechanism, layer = attention.load(cell.name), cell.layer
    own = mechanism.macs(layer)
    mlp = 2 * layer.grid.num_tokens * layer.dim * cell.model.mlp_dim
    whole = mechanism.block_macs(layer)
    return {"core": own, "attention": whole, "block": whole + mlp}[cell.bench.level], own
