"""Train one model: keeps the best state on validation and the last one, and reads the test images once, at the end.

A run's folder holds config.json, log.jsonl (a line an epoch), model.safetensors (the best on validation),
last.safetensors, state.pt and kernel_profile.json (all that a resumed run needs to be the same run) and
predictions.npz (of the test images).
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vitcmp import attention, kernels, machine, store
from vitcmp.attention import DegenerateWarning
from vitcmp.configs import Diverged, ModelConfig, RunConfig, RuntimeConfig, TrainConfig, UserError, resolve_run
from vitcmp.data.augment import Batch, Normalise, TrainPipeline
from vitcmp.data.datasets import Data, load_data
from vitcmp.kernels import forms
from vitcmp.kernels._torch import add_all
from vitcmp.kernels.threads import pool
from vitcmp.metrics import accuracy, complexity
from vitcmp.metrics.inference import logits_of, micro_batch
from vitcmp.metrics.memory import NotKnown, exact_peak
from vitcmp.models.checkpoint import RunInfo, load_info, load_weights, save_weights
from vitcmp.models.fast import fast, kind_of
from vitcmp.models.vit import ViT, seed_of

Listener = Callable[[dict[str, Any]], None]
Track = Callable[[str, float, int], None]
PROFILE = "kernel_profile.json"
"""In a run's folder: the measurements by which forms were chosen when it began."""


def train(**settings: Any) -> store.Record:
    """Train from Python, with the settings of the command line (results, device and data_dir among them).

    >>> record = train(attention="performer", dataset="digits", epochs=15)
    >>> record.metrics["top1_pct"]
    """
    names = {f.name for f in fields(RuntimeConfig)}
    runtime = RuntimeConfig(**{name: settings.pop(name) for name in list(settings) if name in names})
    return run(resolve_run(settings), runtime)


def check(config: RunConfig) -> None:
    """Raise UserError or AttentionError where the model cannot be built, before another run spends its time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)
        ViT(config.model)


def canonical(config: RunConfig) -> RunConfig:
    """The same configuration with its attention specs in canonical form."""
    specs = tuple(map(attention.canonical, config.model.attention_specs))
    return replace(config, model=replace(config.model, attention=specs))


def run_key(config: RunConfig, data: Data) -> str:
    """What makes two runs the same cell: configuration, code, data and the files of plug-ins."""
    digests = [attention.load(spec).digest for spec in config.model.attention_specs]
    return store.cell_key("train", config.flat(), data.digest, *dict.fromkeys(digests))


def run(
    config: RunConfig,
    runtime: RuntimeConfig,
    resume: Path | None = None,
    listen: Listener = lambda event: None,
    data: Data | None = None,
) -> store.Record:
    """Train, test once, and append a record; `resume` goes on with an unfinished run's folder.

    `listen` gets a dict every few steps and at the end of each epoch. A run that diverges, runs out of memory, fails
    or is interrupted leaves a record that says so.

    Raises: UserError or AttentionError before anything is written; KeyboardInterrupt and SystemExit after recording.
    """
    with machine.kernels_as(runtime.kernels):
        begun_with = resume / PROFILE if resume else None
        profile = forms.read(begun_with) if begun_with and begun_with.exists() else forms.active()
        with forms.kept(profile):
            return _run(config, runtime, resume, listen, data, profile)


def _run(
    config: RunConfig, runtime: RuntimeConfig, resume: Path | None, listen: Listener, data: Data | None,
    profile: forms.Profile,
) -> store.Record:  # fmt: skip
    config = canonical(config)
    device = machine.pick_device(runtime.device)
    machine.set_threads(runtime.threads)
    data = data or load_data(config.data, runtime.data_dir)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DegenerateWarning)
        model = ViT(config.model, config.train.seed)
    notes = [*data.warnings, *dict.fromkeys(str(w.message) for w in caught)]
    key = run_key(config, data)
    make_tracker = _tracker(runtime)
    store.check_writable(runtime.results)
    folder = resume or new_folder(runtime, config, key)
    info = load_info(folder) if resume else RunInfo.of(folder.name, runtime, key, config, data)
    if resume and (info.key != key):
        notes.append("resumed with another version of the code or data")
    if not resume:
        store.write_json(folder / "config.json", asdict(info))
        profile.save(folder / PROFILE)
    listen({"event": "start", "run": str(folder), "notes": notes})

    kernels.forget_used()
    metrics: dict[str, Any] = {"precision_used": machine.precision(config.train.precision, device)}
    status, error = "ok", None
    interruption: BaseException | None = None
    try:
        _train_and_test(
            model, config, runtime, data, device, folder, info, listen, make_tracker(folder), metrics, notes
        )
    except Diverged as reason:
        status, error = "diverged", str(reason)
    except UserError:
        raise
    except (KeyboardInterrupt, SystemExit) as reason:
        status, error, interruption = "interrupted", type(reason).__name__, reason
    except Exception as reason:
        status, error = _status_of(reason, model), f"{type(reason).__name__}: {reason}".splitlines()[0]
        (folder / "error.txt").write_text(traceback.format_exc())
    metrics |= {"kernels_used": kernels.used(), "kernel_profile": profile.digest}
    record = store.new_record(
        id=info.id if status == "ok" else f"{info.id}.{status}.{int(time.time() * 1000)}",
        kind="train", status=status, key=key, config={**config.flat(), "name": info.name},
        hardware=machine.hardware(device), versions=machine.versions(), commit=machine.commit(),
        metrics=metrics, warnings=notes, error=error,
    )  # fmt: skip
    store.append(runtime.results, record)
    if interruption is not None:
        raise interruption
    return record


def new_folder(runtime: RuntimeConfig, config: RunConfig, key: str) -> Path:
    """A new folder under results/runs, named after what is trained."""
    # A path is cut to its file, and the key keeps apart what is cut off at the end.
    slug = re.sub(r"[^,:=]*/|\.py\b", "", config.model.attention_name)
    slug = re.sub(r"[\W_]+", "-", slug)[:60].strip("-")
    stem = f"{runtime.name or config.data.dataset}-{slug}-s{config.train.seed}-{key[:6]}"
    root = Path(runtime.results) / "runs"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 10_000):
            folder = root / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(f"cannot write to '{runtime.results}' ({error.strerror}); choose another --results") from None
    raise UserError(f"too many runs named {stem}; give this one a --name")


@dataclass
class _State:
    """All that changes while training, and so all that a resumed run needs."""

    model: ViT
    optimizer: torch.optim.Optimizer
    ema: AveragedModel | None
    epoch: int = 0
    """Epochs finished."""
    best_top1_pct: float = -1.0
    best_epoch: int = 0

    @property
    def evaluated(self) -> ViT:
        """The weights that are validated and tested."""
        return cast(ViT, self.ema.module) if self.ema is not None else self.model

    def save(self, path: Path) -> None:
        """Write everything; whole, or not at all."""
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "epoch": self.epoch, "best_top1_pct": self.best_top1_pct, "best_epoch": self.best_epoch,
        }  # fmt: skip
        store.write_atomic(path, lambda temporary: torch.save(content, temporary))

    def load(self, path: Path, device: torch.device) -> None:
        """Raises: UserError where the file is damaged or belongs to another model."""
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(content["ema"])
        except Exception as error:
            name = type(error).__name__
            raise UserError(f"{path} is damaged or of another model ({name}); start the run anew") from None
        self.epoch, self.best_top1_pct = content["epoch"], content["best_top1_pct"]
        self.best_epoch = content["best_epoch"]


@dataclass
class _EpochSums:
    """Running sums of one epoch, kept on the device."""

    loss: Tensor
    correct: Tensor
    images: int = 0
    seconds: float = 0.0


def _train_and_test(
    model: ViT, config: RunConfig, runtime: RuntimeConfig, data: Data, device: torch.device,
    folder: Path, info: RunInfo, listen: Listener, track: Track, metrics: dict[str, Any], notes: list[str],
) -> None:  # fmt: skip
    """The run itself; fills `metrics` and `notes` as it goes, so that a run which ends early keeps what it has."""
    c = config.train
    size = micro_batch(model, device, c.batch_size) if c.micro_batch == "auto" else min(c.micro_batch, c.batch_size)
    precision, in_parts = metrics["precision_used"], size < c.batch_size
    num_lanes = lanes(config, device, in_parts)
    compiled = c.compile and _has_compiler(device, listen)
    # Before training, so that nothing of the reading is in its time.
    metrics["peak_memory_mib"], reason = _step_memory(config, data, device, size, precision, num_lanes, compiled)
    notes += [f"peak memory: {reason}"] if reason else []
    model.to(device)
    if keeps_memory(device, precision, in_parts) and machine.is_ours():
        machine.keep_freed_memory()
    metrics |= {
        "params_m": complexity.parameters_m(model),
        "attention_macs_g": complexity.attention_macs(model) / 1e9,
        "macs_g": complexity.model_macs(model) / 1e9,
        "tokens": model.grid.num_tokens,
        "micro_batch_used": size, "compiled": compiled,
    }  # fmt: skip
    normalise = Normalise(data.mean, data.std, config.model.image_hw, device)
    pipeline = TrainPipeline(data.train, config.augment, normalise, device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(c.ema)) if c.ema else None
    state = _State(model, make_optimizer(model, c, device), ema)
    if (folder / "state.pt").exists():
        state.load(folder / "state.pt", device)
    trained = fast(model)
    metrics["blocks_used"] = kind_of(trained)
    step_model = cast(nn.Module, torch.compile(trained)) if compiled else trained
    counting = [module for module in model.modules() if hasattr(module, "after_optimizer_step")]
    steps_an_epoch = math.ceil(len(data.train) / c.batch_size)
    schedule = Schedule(c, steps_an_epoch)

    while state.epoch < c.epochs and not _stop_early(state, c):
        epoch = state.epoch
        # Streams are seeded an epoch, so that a resumed run draws what an uninterrupted one would have drawn.
        torch.manual_seed(seed_of(c.seed, f"epoch {epoch}"))
        sums = _EpochSums(torch.zeros((), device=device), torch.zeros((), device=device))
        trained.train()
        start = time.perf_counter()
        for step, batch in enumerate(pipeline.epoch(c.batch_size, seed_of(c.seed, f"data {epoch}"))):
            lr = schedule.set_lr(state.optimizer, epoch * steps_an_epoch + step)
            loss, correct = train_step(step_model, batch, state.optimizer, c, size, precision, num_lanes)
            for module in counting:
                cast(Any, module).after_optimizer_step()
            if state.ema is not None:
                state.ema.update_parameters(model)
            sums.loss += loss * len(batch.labels)
            sums.correct += correct
            sums.images += len(batch.labels)
            if step % 10 == 9 or step == steps_an_epoch - 1:
                mean = sums.loss.item() / sums.images
                if not math.isfinite(mean):
                    raise Diverged(f"the loss is {mean} in epoch {epoch + 1}; lower --lr or lengthen --warmup-epochs")
                seconds = time.perf_counter() - start
                listen({
                    "event": "step", "epoch": epoch, "epochs": c.epochs, "done": (step + 1) / steps_an_epoch,
                    "loss": mean, "top1_pct": 100 * sums.correct.item() / sums.images,
                    "throughput_img_s": sums.images / seconds,
                })  # fmt: skip
            if runtime.log_every and (epoch * steps_an_epoch + step) % runtime.log_every == 0:
                store.append_log(folder, {"epoch": epoch + 1, "step": step, "loss": loss.item(), "lr": lr})
        machine.synchronize(device)
        sums.seconds = time.perf_counter() - start

        logits = logits_of(state.evaluated, data.validation, normalise, device)
        if not np.isfinite(logits).all():
            raise Diverged(
                f"the weights are not finite after epoch {epoch + 1}; lower --lr or lengthen --warmup-epochs"
            )
        line = {
            "epoch": epoch + 1, "lr": lr,
            "train_loss": sums.loss.item() / sums.images,
            "train_top1_pct": 100 * sums.correct.item() / sums.images,
            "validation_loss": accuracy.nll(logits, data.validation.labels.numpy()),
            "validation_top1_pct": accuracy.top_k_pct(logits, data.validation.labels.numpy(), 1),
            "train_seconds": sums.seconds, "images": sums.images,
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        state.epoch += 1
        if line["validation_top1_pct"] > state.best_top1_pct:
            state.best_top1_pct, state.best_epoch = line["validation_top1_pct"], state.epoch
            save_weights(folder / "model.safetensors", state.evaluated, info)
        if runtime.save_every and state.epoch % runtime.save_every == 0:
            save_weights(folder / f"epoch-{state.epoch:04}.safetensors", state.evaluated, info)
        store.append_log(folder, line)
        state.save(folder / "state.pt")
        for name, value in line.items():
            track(name, value, state.epoch)
        listen({"event": "epoch", "epochs": c.epochs, **line})

    save_weights(folder / "last.safetensors", state.evaluated, info)
    metrics |= _speed(store.read_log(folder))
    metrics |= {"epochs_run": state.epoch, "best_epoch": state.best_epoch}
    tested, broken = _test(folder, data, normalise, device)
    metrics |= tested
    if broken:
        raise Diverged(broken)


def _step_memory(
    config: RunConfig, data: Data, device: torch.device, size: int, precision: str, num_lanes: int, compiled: bool
) -> tuple[float | None, str]:
    """Peak memory of a training step in MiB above weights and images, or None and why it is not known.

    Of a model of its own, and of as many images as show the peak: two micro-batches, as gradients of the first one are
    there while the second one is computed.
    """
    if compiled:
        return None, "unknown for a compiled model; measure it with `vitcmp bench --level model --mode train-step`"
    c, m = config.train, config.model
    part = data.train.take(torch.arange(min(2 * size * num_lanes, c.batch_size, len(data.train))))
    images = Normalise(data.mean, data.std, m.image_hw, device)(part.images.to(device))
    labels = part.labels.to(device)
    batch = Batch(images, labels, labels, torch.ones(len(labels), device=device))

    def step_of(model_config: ModelConfig) -> Callable[[], object]:
        model = fast(ViT(model_config, c.seed).to(device)).train()
        optimizer = make_optimizer(model, c, device)

        def step() -> None:
            # The optimizer's state, which is there from the second step on.
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            train_step(model, batch, optimizer, c, size, precision, num_lanes)
            machine.synchronize(device)

        return step

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateWarning)
            # What libraries allocate once is not the model's. The last layer computes less than the others.
            layers = (*dict.fromkeys(m.attention_specs), m.attention_specs[-1])
            step_of(replace(m, depth=len(layers), attention=layers))()
            step = step_of(m)
        beside = pool(num_lanes, max(1, torch.get_num_threads() // num_lanes)) if num_lanes > 1 else None
        with exact_peak(device, beside, num_lanes) as peak:
            step()
            return peak.mib(), ""
    except NotKnown as reason:
        return None, str(reason)
    except Exception as reason:
        # Training will come to the same error, and record it.
        return None, f"{type(reason).__name__}: {reason}".splitlines()[0]


def keeps_memory(device: torch.device, precision: str, in_parts: bool) -> bool:
    """Whether what is freed should stay with the process: on a CPU, unless fp32 comes in micro-batches.

    Those do as well without, on some machines better; in bf16 the page faults weigh more against the arithmetic.
    """
    return device.type == "cpu" and (precision == "bf16" or not in_parts)


def lanes(config: RunConfig, device: torch.device, in_parts: bool) -> int:
    """How many parts of a batch are computed beside each other, each on its share of the threads.

    Threads that share one operation wait for each other after it, those with parts of their own do not. But parts share
    Python's interpreter, which holds up many of them, and a whole batch keeps threads busy as it is. And random masks
    would depend on who draws first.
    """
    m = config.model
    is_random = m.dropout or m.attention_dropout or m.drop_path
    fits = device.type == "cpu" and 2 <= torch.get_num_threads() <= 4 and in_parts
    return 2 if fits and not is_random and not config.train.compile else 1


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    size: int,
    precision: str,
    num_lanes: int = 1,
) -> tuple[Tensor, Tensor]:
    """One optimizer step on one batch, `size` images at a time: the gradients are those of the whole batch.

    With several lanes, parts of the batch are computed at the same time. Returns the mean loss and how many predictions
    were right, on the device.
    """
    optimizer.zero_grad()
    scale = 1 / len(batch.labels)
    if num_lanes == 1:
        loss, correct = (torch.zeros((), device=batch.images.device) for _ in range(2))
        for part_loss, part_correct in _losses(model, batch, config, size, precision, scale):
            part_loss.backward()
            loss, correct = loss + part_loss.detach(), correct + part_correct
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def work(part: Batch) -> list[Tensor]:
            return _gradients(parameters, _losses(model, part, config, size, precision, scale))

        parts = batch.split(-(-len(batch.labels) // num_lanes))
        done = pool(num_lanes, max(1, torch.get_num_threads() // num_lanes)).map(work, parts)
        loss, correct, *gradients = functools.reduce(add_all, done)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    if config.grad_clip:
        # Not the model's own list of them, for which it walks through all its modules.
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, config.grad_clip)
    optimizer.step()
    return loss, correct


def _losses(
    model: nn.Module, batch: Batch, config: TrainConfig, size: int, precision: str, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of `size` images at a time: the sum of the losses times `scale`, and how many predictions are right."""
    for part in batch.split(size):
        with torch.autocast(part.images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(part.images)
        losses = mixed_cross_entropy(logits, part.labels, part.other_labels, part.share, config.label_smoothing)
        yield losses.sum() * scale, (logits.detach().argmax(dim=1) == part.labels).sum()


def _gradients(parameters: list[nn.Parameter], losses: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The sums of losses and right predictions, and of the gradients of each parameter."""
    sums: list[Tensor] = []
    for loss, correct in losses:
        found = torch.autograd.grad(loss, parameters, materialize_grads=True)
        more = [loss.detach(), correct, *found]
        sums = add_all(sums, more) if sums else more
    return sums


def mixed_cross_entropy(logits: Tensor, labels: Tensor, others: Tensor, share: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each sample, [B], with a share for `labels` and the rest for `others`; in fp32 at least."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if labels is others:
        return loss
    return share * loss + (1 - share) * F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers of these methods: they import torch's compiler, which takes long."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> AdamW:
    """AdamW with decay on weight matrices only, its update in one fused kernel."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith("weight") and parameter.ndim >= 2].append(parameter)
    return AdamW(
        [{"params": params, "weight_decay": config.weight_decay * decays} for decays, params in groups.items()],
        lr=config.lr,
        fused=True,
    )


class Schedule:
    """Linear warm-up to the peak, then a cosine down to `min_lr`, a value a step."""

    def __init__(self, config: TrainConfig, steps_an_epoch: int) -> None:
        self.config = config
        self.total = config.epochs * steps_an_epoch
        # Half of a short run at most, or it would end at the peak.
        self.warmup = min(int(config.warmup_epochs * steps_an_epoch), self.total // 2)

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        c = self.config
        if step < self.warmup:
            return c.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total - self.warmup)
        return c.min_lr + (c.lr - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set it in all groups, and return it."""
        lr = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr


def _stop_early(state: _State, config: TrainConfig) -> bool:
    return bool(config.early_stopping) and state.epoch - state.best_epoch >= config.early_stopping


def _speed(log: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Time spent in training alone: no validation, no saving. The first epoch, which warms up, is not in the median."""
    epochs = list(log)
    seconds = [line["train_seconds"] for line in epochs]
    steady = epochs[1:] or epochs
    return {
        "train_seconds": sum(seconds),
        "seconds_per_epoch": float(np.median([line["train_seconds"] for line in steady])),
        "throughput_img_s": float(np.median([line["images"] / line["train_seconds"] for line in steady])),
    }


def _test(folder: Path, data: Data, normalise: Normalise, device: torch.device) -> tuple[dict[str, Any], str]:
    """Accuracy of the best state on all three splits, and what is broken; the test images' predictions are kept."""
    model, _ = load_weights(folder / "model.safetensors")
    model.to(device)
    metrics = {}
    for name, part in (("train", data.train), ("validation", data.validation)):
        logits = logits_of(model, part, normalise, device)
        metrics[f"{name}_top1_pct"] = accuracy.top_k_pct(logits, part.labels.numpy(), 1)
    logits, labels = logits_of(model, data.test, normalise, device), data.test.labels.numpy()
    accuracy.save_predictions(folder / "predictions.npz", logits, labels)
    return metrics | accuracy.summary(logits, labels), accuracy.broken_text(logits)


def _status_of(error: Exception, model: nn.Module) -> str:
    """oom, diverged (where NaN weights made a library fail first) or failed."""
    if machine.out_of_memory(error):
        return "oom"
    broken = any(not p.isfinite().all() for p in model.parameters())
    return "diverged" if broken else "failed"


def _has_compiler(device: torch.device, listen: Listener) -> bool:
    if device.type != "cpu" or machine.compiler():
        return True
    listen({"event": "note", "text": "no C++ compiler found: --compile is ignored (install g++ or clang)"})
    return False


def _tracker(runtime: RuntimeConfig) -> Callable[[Path], Track]:
    """What makes a run's tracker from its folder: a function of (name, value, epoch)."""
    if runtime.tracker == "none":
        return lambda folder: lambda name, value, epoch: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tracker tensorboard needs TensorBoard: pip install 'vitcmp[track]'") from None
    return lambda folder: SummaryWriter(str(folder / "tensorboard")).add_scalar
