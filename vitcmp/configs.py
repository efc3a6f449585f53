"""Every setting of vitcmp: frozen dataclasses, one per concern, and how they are filled.

The line under a field is its help text on the command line, and its default is the command line's default:
both are written here, once. Precedence: command line > environment > file > preset and recipe > data set > default.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_type_hints


class UserError(ValueError):
    """Bad input. The command line prints it as one line, which names the remedy, and exits with 2."""


class Diverged(Exception):
    """Numbers of a model are not finite. The command line prints it as one line, and exits with 1."""


def _check(config: object, positive: str = "", not_negative: str = "", fraction: str = "", below_one: str = "") -> None:
    """Raise UserError where a number is out of range; each argument is a list of field names."""
    for names, holds, wanted in (
        (positive, lambda x: x > 0, "must be above 0"),
        (not_negative, lambda x: x >= 0, "must be 0 or more"),
        (fraction, lambda x: 0 <= x <= 1, "must be between 0 and 1"),
        (below_one, lambda x: 0 <= x < 1, "must be at least 0 and below 1"),
    ):
        for name in names.split():
            value = getattr(config, name)
            if isinstance(value, int | float) and not (math.isfinite(value) and holds(value)):
                raise UserError(f"{name} ({value}) {wanted}")


def usable_cores() -> int:
    """CPU cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int | None) -> None:
    """Raise UserError for more threads than can be of use: OpenMP ends the process where it cannot start them all."""
    most = 4 * usable_cores()
    if threads is not None and threads > most:
        raise UserError(
            f"threads ({threads}) must be at most {most}, four for each core that this process may use; "
            "about one a core is the quickest"
        )


@dataclass(frozen=True)
class ModelConfig:
    """The Vision Transformer. What is None comes from the data set."""

    preset: str = "vit-48x4"
    """Named sizes: vit, vitl, vitx, vit-48x4, tiny, vit-tiny-16-224, vit-small-16-224, vit-base-16-224."""
    attention: str | tuple[str, ...] = "softmax"
    """Mechanism, as a spec (`performer:num_features=64`), or one a layer (`softmax,4-=performer`, or a tuple)."""
    image_size: int | tuple[int, int] | None = None
    """Side of the image in pixels; images of another size are resized to it (default: the data's own)."""
    channels: int | None = None
    """Colour channels (default: the data's own)."""
    num_classes: int | None = None
    """Number of classes (default: the data's own)."""
    patch_size: int | Literal["auto"] = "auto"
    """Side of a patch in pixels; auto: the divisor of the image size whose grid is nearest to 8 x 8."""
    dim: int = 48
    """Width of a token."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Attention heads; must divide dim."""
    mlp_dim: int = 192
    """Hidden width of the MLP."""
    pool: Literal["cls", "mean"] = "cls"
    """What the head reads: a class token, or the mean of the patch tokens."""
    stem: Literal["linear", "conv", "conv-relu"] = "linear"
    """How pixels become tokens: linear patches, or three 3 x 3 convolutions first (conv: as published, linear)."""
    qkv_bias: bool = True
    """Biases in the query, key and value projections."""
    out_bias: bool = True
    """A bias in the attention's output projection."""
    final_norm: bool = True
    """A LayerNorm before the head."""
    dropout: float = 0.0
    """Dropout after the position embedding, the projections and in the MLP."""
    attention_dropout: float = 0.0
    """Dropout of attention weights; an error for a mechanism that has none."""
    drop_path: float = 0.0
    """Stochastic depth: the last block's probability of being skipped (rising linearly from 0)."""
    init_std: float | Literal["auto"] = "auto"
    """Standard deviation of the linear layers' initial weights (truncated normal); auto: 1 / sqrt(2 inputs)."""

    def __post_init__(self) -> None:
        _check(
            self,
            positive="image_size channels num_classes patch_size dim depth num_heads mlp_dim init_std",
            below_one="dropout attention_dropout drop_path",
        )
        # Read here, so that a model has one form however it was written.
        object.__setattr__(self, "attention", by_layer(self.attention, self.depth))
        if self.dim % self.num_heads:
            raise UserError(f"dim ({self.dim}) must be divisible by num_heads ({self.num_heads})")
        if self.stem != "linear" and self.dim % 4:
            raise UserError(f"dim ({self.dim}) must be divisible by 4 for the stem '{self.stem}'")
        if self.image_size is not None and isinstance(self.patch_size, int):
            for side in self.image_hw:
                if side % self.patch_size:
                    raise UserError(f"image_size ({side}) must be divisible by patch_size ({self.patch_size})")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        if self.image_size is None:
            raise UserError("image_size is not known: give it, or take it from a data set")
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def patch(self) -> int:
        """The side of a patch in pixels, with `auto` resolved."""
        if self.patch_size != "auto":
            return self.patch_size
        height, width = self.image_hw
        divisors = (p for p in range(1, min(height, width) + 1) if height % p == 0 and width % p == 0)
        return min(divisors, key=lambda p: (abs((height // p) * (width // p) - 64), p))

    @property
    def attention_specs(self) -> tuple[str, ...]:
        """One spec a layer."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,) * self.depth

    @property
    def attention_name(self) -> str:
        """The mechanism in one word, as in `attention_name`."""
        return attention_name(self.attention)


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are split."""

    dataset: str = "digits"
    """digits, mnist, fashion-mnist, cifar10, cifar100 or fake."""
    invert: bool = False
    """Swap black and white."""
    validation: float = 0.1
    """Share of the training images held out for selection."""
    train_samples: int | None = None
    """Train on this many images only (default: all)."""

    def __post_init__(self) -> None:
        _check(self, positive="train_samples validation", below_one="validation")


@dataclass(frozen=True)
class AugmentConfig:
    """Changes to the training images."""

    crop_padding: int | Literal["auto"] = "auto"
    """Random crops after padding by this many pixels; auto: an eighth of the image's side."""
    flip: bool | Literal["auto"] = "auto"
    """Random horizontal flips; auto: not for digits, MNIST and Fashion-MNIST."""
    rand_augment: int = 0
    """RandAugment-like policy: operations an image (0: off)."""
    rand_magnitude: float = 9.0
    """Strength of those operations, 0 to 30."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle."""
    mixup: float = 0.0
    """Mixup's Beta parameter (0: off)."""
    cutmix: float = 0.0
    """CutMix's Beta parameter (0: off); with mixup on, each batch takes one of the two."""

    def __post_init__(self) -> None:
        _check(self, not_negative="crop_padding rand_augment rand_magnitude mixup cutmix", fraction="random_erasing")
        if self.rand_magnitude > 30:
            raise UserError(f"rand_magnitude ({self.rand_magnitude}) must be at most 30")


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    recipe: Literal["plain", "strong"] = "plain"
    """plain: crop, flip and label smoothing; strong: RandAugment, erasing, mixup, cutmix, drop path and EMA too."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images an optimizer step."""
    micro_batch: int | Literal["auto"] = "auto"
    """Images a forward pass; gradients are accumulated to the whole batch. auto: by device and model size."""
    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """Decay of the weight matrices; biases, norms, positions and the class token have none."""
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up."""
    label_smoothing: float = 0.1
    """Label smoothing."""
    grad_clip: float = 1.0
    """Largest norm of the gradient (0: no clipping)."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then what is evaluated (0: off)."""
    early_stopping: int = 0
    """Stop after this many epochs without a better validation accuracy (0: never)."""
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast where the device computes in it natively, else fp32."""
    compile: bool = False
    """Compile the model with torch.compile (needs a C++ compiler on the CPU)."""

    def __post_init__(self) -> None:
        _check(
            self,
            positive="epochs batch_size micro_batch lr",
            not_negative="min_lr weight_decay warmup_epochs grad_clip early_stopping seed",
            below_one="label_smoothing ema",
        )


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how a run happens. None of it changes a result, so none of it is part of a record's key."""

    results: str = "results"
    """Folder of the results store (environment: VITCMP_RESULTS)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    data_dir: str | None = None
    """Folder of the data sets (environment: VITCMP_DATA; default: ~/.cache/vitcmp)."""
    threads: int | None = None
    """CPU threads, at most four a core (default: torch's own choice)."""
    kernels: Literal["auto", "off", "strict"] | None = None
    """auto: compiled kernels where they run and are quick; off: plain torch; strict: fail where a kernel can't run
    (environment: VITCMP_KERNELS)."""
    name: str | None = None
    """Name of the run, for its folder and the tables."""
    save_every: int = 0
    """Keep a checkpoint every N epochs, beside the best and the last (0: none)."""
    log_every: int = 0
    """Log the loss every N steps, beside the line an epoch (0: never)."""
    tracker: Literal["none", "tensorboard"] = "none"
    """Also write curves for this tracker (needs the extra 'track')."""

    def __post_init__(self) -> None:
        _check(self, positive="threads", not_negative="save_every log_every")
        check_threads(self.threads)
        if self.name is not None and not re.fullmatch(r"[\w+-][\w.+-]*", self.name):
            raise UserError(f"name '{self.name}' must be letters, digits and . _ + - alone: it becomes a folder's name")


@dataclass(frozen=True)
class GridConfig:
    """What a study varies."""

    attention: str | tuple[str, ...] = "softmax"
    """Mechanism, as a spec such as performer:num_features=64; repeat it for several, or all."""
    attention_layers: str | tuple[str, ...] = ()
    """Layers with another mechanism, such as 4-=performer or 0,2=linear; from 0; repeat it, the last one counts."""
    seeds: int | str | tuple[int, ...] = 0
    """Seeds, such as 0-2 or 0,5."""


MODES = ("forward", "backward", "train-step")
PRECISIONS = ("fp32", "bf16", "fp16", "auto")
EXECUTIONS = ("eager", "compiled")


@dataclass(frozen=True)
class BenchConfig:
    """What is measured, and how long. Where several values are given, every combination is measured."""

    level: Literal["core", "attention", "block", "model"] = "attention"
    """core: from queries, keys and values on; attention: with the projections; block: with norms and MLP; model."""
    mode: str | tuple[str, ...] = "forward"
    """forward: inference; backward: the gradients alone; train-step: forward, backward and AdamW; or several."""
    tokens: tuple[int, ...] | int | str = "64,256,1024"
    """Token counts without the class token: a list (64,256) or a range of powers of two (64..4096)."""
    image_sizes: tuple[int, ...] | int | str | None = None
    """Sides of square images in pixels, in place of token counts."""
    batch_size: tuple[int, ...] | int | str = 4
    """Images at a time, or several such numbers (1,8,64)."""
    precision: str | tuple[str, ...] = "fp32"
    """Number format: fp32, bf16, fp16 or auto (bf16 where the device computes in it), or several."""
    execution: str | tuple[str, ...] = "eager"
    """eager, compiled (by torch.compile), or both (eager,compiled)."""
    rounds: int = 15
    """At least so many timed samples of each mechanism; more until the median is known to 2 %."""
    max_seconds: float = 2.0
    """But no more samples once those of a cell have taken this long."""
    timeout: float = 120.0
    """Seconds that one step of a cell (building it with the warm-up, one sample, its memory) may take."""
    memory_limit: int | Literal["auto"] = "auto"
    """MiB that measuring may use on a CPU before a cell counts as out of memory; auto: half of the machine's."""
    memory: bool = True
    """Measure peak memory, in a process of its own a cell."""
    counts: bool = True
    """Count multiply-adds with torch's counter and ptflops, too, and the bytes moved."""
    errors: bool = True
    """Measure the error of mechanisms that approximate another."""
    run: str | None = None
    """Trained run whose queries and keys those errors are measured on (default: random ones), with its sizes."""

    def __post_init__(self) -> None:
        _check(self, positive="rounds max_seconds timeout memory_limit")
        if self.timeout > 86_400:
            raise UserError(f"timeout ({self.timeout:g}) must be at most 86400 seconds, a day")
        for name, known in (("mode", MODES), ("precision", PRECISIONS), ("execution", EXECUTIONS)):
            for value in self.several(name):
                choose(value, known, name)
        for name in ("tokens", "batch_size", "image_sizes"):
            for number in self.several(name):
                if number < 1:
                    raise UserError(f"{name} ({number}) must be above 0")

    def several(self, name: str) -> tuple[Any, ...]:
        """The values of a setting that may have several, with texts split and ranges spelt out.

        Raises: UserError where there is none.
        """
        value = getattr(self, name)
        if value is None:
            return ()
        if name in ("tokens", "batch_size", "image_sizes"):
            values: tuple[Any, ...] = integers(value)
        else:
            parts = value.split(",") if isinstance(value, str) else value
            values = tuple(dict.fromkeys(part.strip() for part in parts))
        if not values:
            raise UserError(f"{name} must name at least one")
        return values


@dataclass(frozen=True)
class RunConfig:
    """All that defines one training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def flat(self) -> dict[str, Any]:
        """All settings under their own names, as a record holds them."""
        return {name: value for part in dataclasses.asdict(self).values() for name, value in part.items()}

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `flat`; unknown names are an error, absent ones take their defaults."""
        parts = split(values, ModelConfig, DataConfig, AugmentConfig, TrainConfig)
        return cls(*parts)


PRESETS: dict[str, dict[str, Any]] = {
    "vit": dict(dim=128, depth=4, num_heads=8, mlp_dim=512, patch_size=2),
    "vitl": dict(
        dim=128, depth=4, num_heads=8, mlp_dim=512, patch_size=1, attention="linear", qkv_bias=False, out_bias=False
    ),
    "vit-48x4": dict(),
    "tiny": dict(dim=32, depth=2, num_heads=4, mlp_dim=64, pool="mean", stem="conv-relu"),
    "vit-tiny-16-224": dict(dim=192, depth=12, num_heads=3, mlp_dim=768, patch_size=16, image_size=224),
    "vit-small-16-224": dict(dim=384, depth=12, num_heads=6, mlp_dim=1536, patch_size=16, image_size=224),
    "vit-base-16-224": dict(dim=768, depth=12, num_heads=12, mlp_dim=3072, patch_size=16, image_size=224),
}
PRESETS["vitx"] = {**PRESETS["vitl"], "stem": "conv"}

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "strong": dict(rand_augment=2, random_erasing=0.25, mixup=0.2, cutmix=1.0, drop_path=0.1, ema=0.998),
}

DATASETS: dict[str, dict[str, Any]] = {
    "digits": dict(
        image_size=8, channels=1, num_classes=10, preset="tiny", epochs=20, batch_size=64, lr=3e-3, flip=False
    ),
    "mnist": dict(
        image_size=28, channels=1, num_classes=10, epochs=5, batch_size=64, lr=3e-3, warmup_epochs=0.5, flip=False
    ),
    "fashion-mnist": dict(
        image_size=28, channels=1, num_classes=10, epochs=10, batch_size=64, lr=3e-3, warmup_epochs=0.5, flip=False
    ),
    "cifar10": dict(image_size=32, channels=3, num_classes=10, flip=True, lr=3e-3, validation=0.05),
    "cifar100": dict(image_size=32, channels=3, num_classes=100, flip=True, lr=3e-3, validation=0.05),
    "fake": dict(image_size=32, channels=3, num_classes=10, epochs=1, flip=True),
}

Config = TypeVar("Config")

LAYERS = re.compile(r",(\d[\d,+-]*)=")
"""What in a spec begins other layers' mechanism; the names of options begin with a letter."""


def by_layer(attention: str | tuple[str, ...], depth: int) -> str | tuple[str, ...]:
    """`softmax,4-=performer` as one spec a layer, of `depth`; one spec alone where all are equal.

    Layers count from 0: `0`, `6-11`, `4-` (to the last), `0,2` or `0+2`. What comes later wins.

    Raises: UserError for a layer that the model has not, an empty range, or another number of specs than layers.
    """
    if isinstance(attention, str):
        first, *rest = LAYERS.split(attention)
        specs = [first] * depth
        for text, spec in zip(rest[::2], rest[1::2], strict=True):
            for layer in _layers(text, depth):
                specs[layer] = spec
        attention = tuple(specs)
    elif len(attention) != depth:
        raise UserError(f"{len(attention)} attention specs were given for {depth} layers; give one, or one a layer")
    return attention[0] if len(set(attention)) == 1 else attention


def _layers(text: str, depth: int) -> list[int]:
    """The layers that `0`, `6-11`, `4-` or `0,2` names."""
    layers: list[int] = []
    for part in re.split("[,+]", text):
        match = re.fullmatch(r"(\d+)(-(\d*))?", part)
        if match is None:
            raise UserError(f"attention_layers: '{text}' names no layers; write 0, 6-11, 4- or 0,2")
        low, last = int(match[1]), depth - 1
        high = low if match[2] is None else int(match[3] or last)
        if max(low, high) > last:
            raise UserError(f"attention_layers: '{text}' goes beyond the last layer, {last} (they count from 0)")
        if high < low:
            raise UserError(f"attention_layers: the range '{part}' is empty; write the lower layer first")
        layers += range(low, high + 1)
    return layers


def attention_name(attention: str | Sequence[str]) -> str:
    """How tables and figures call a mechanism: by its spec; of one a layer, the first layer's and what differs.

    Equal models have equal names, and `by_layer` reads them: `softmax,4-=performer`, `softmax,1+3=linear`.
    """
    if isinstance(attention, str):
        return attention
    places: dict[str, list[int]] = {}
    for layer, spec in enumerate(attention):
        places.setdefault(spec, []).append(layer)
    (first, _), *others = places.items()
    return ",".join([first, *(f"{_ranges(layers, len(attention))}={spec}" for spec, layers in others)])


def _ranges(layers: list[int], depth: int) -> str:
    """Ascending layers as `0+2-4+7-`."""
    starts = [n for n in layers if n - 1 not in layers]
    ends = [n for n in layers if n + 1 not in layers]
    return "+".join(
        f"{low}" if low == high else f"{low}-" if high == depth - 1 else f"{low}-{high}"
        for low, high in zip(starts, ends, strict=True)
    )


def choose(value: str, known: Iterable[str], what: str) -> str:
    """`value` if it is known, else UserError with the nearest one."""
    known = list(known)
    if value in known:
        return value
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"unknown {what} '{value}'; {hint}available: {', '.join(known)}")


def resolve_run(given: Mapping[str, Any]) -> RunConfig:
    """A run's full configuration from the settings a user gave, the rest from recipe, preset, data set and defaults.

    Raises: UserError for unknown names, wrong types and values out of range.
    """
    dataset = DATASETS[choose(given.get("dataset", DataConfig.dataset), DATASETS, "dataset")]
    preset = given.get("preset", dataset.get("preset", ModelConfig.preset))
    recipe = given.get("recipe", TrainConfig.recipe)
    values = {
        **dataset,
        **PRESETS[choose(preset, PRESETS, "preset")],
        **RECIPES[choose(recipe, RECIPES, "recipe")],
        **given,
        "preset": preset,
    }
    if values.get("crop_padding", "auto") == "auto":
        values["crop_padding"] = dataset["image_size"] // 8
    if values.get("flip", "auto") == "auto":
        values["flip"] = dataset["flip"]
    run = RunConfig.from_flat(values)
    for name in ("channels", "num_classes"):
        wanted = getattr(run.model, name)
        if run.data.dataset != "fake" and wanted != dataset[name]:
            raise UserError(f"{name} ({wanted}) does not fit {run.data.dataset}, which has {dataset[name]}")
    return run


def split(values: Mapping[str, Any], *classes: type[Any], strict: bool = False) -> list[Any]:
    """One instance of each class, filled from one flat mapping by field name.

    Raises: UserError for a name that no class has, or a value of a wrong type.
    """
    fields = {f.name: cls for cls in classes for f in dataclasses.fields(cls)}
    for name in values:
        choose(name, fields, "setting")
    return [cls(**typed({k: v for k, v in values.items() if fields[k] is cls}, cls, strict=strict)) for cls in classes]


def typed(values: Mapping[str, Any], cls: type[Any], strict: bool = False) -> dict[str, Any]:
    """`values` converted to the types of the fields of `cls`; strict: as a YAML file has them, no text for numbers."""
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(cls)
    result = {}
    for name, value in values.items():
        try:
            value = tuple(value) if isinstance(value, list) else value
            result[name] = TypeAdapter(hints[name]).validate_python(value, strict=strict)
        except ValidationError as error:
            texts = [e["msg"].lower().partition(", unable")[0] for e in error.errors()]
            wanted = [text.removeprefix("input should be ") for text in texts]
            raise UserError(f"{name}: {value!r} must be {' or '.join(dict.fromkeys(wanted))}") from None
    return result


def help_texts(cls: type[Any]) -> dict[str, str]:
    """The line under each field of a config class."""
    return _help_texts(cls.__module__)[cls.__name__]


@functools.cache
def _help_texts(module: str) -> dict[str, dict[str, str]]:
    """The lines under the fields of all classes of a module, which is parsed once."""
    return {
        cls.name: {
            a.target.id: b.value.value
            for a, b in pairwise(cls.body)
            if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant) and isinstance(b.value.value, str)
        }
        for cls in ast.parse(inspect.getsource(sys.modules[module])).body
        if isinstance(cls, ast.ClassDef)
    }  # fmt: skip


def integers(value: int | str | Iterable[int]) -> tuple[int, ...]:
    """One whole number, a text such as `0-2` or `64..1024`, or several numbers."""
    if isinstance(value, str):
        return parse_integers(value)
    return (value,) if isinstance(value, int) else tuple(value)


def parse_integers(text: str) -> tuple[int, ...]:
    """`0,2,5`, `0-2` (each integer) or `64..1024` (each doubling) as integers.

    Raises: UserError for anything else.
    """
    numbers: list[int] = []
    try:
        for part in text.replace(" ", "").split(","):
            if ".." in part:
                low, high = map(int, part.split(".."))
                if not 0 < low <= high:
                    raise ValueError
                while low <= high:
                    numbers.append(low)
                    low *= 2
            elif "-" in part[1:]:
                low, high = map(int, part.split("-"))
                if high < low:
                    raise ValueError
                numbers += range(low, high + 1)
            else:
                numbers.append(int(part))
    except ValueError:
        raise UserError(f"'{text}' is not a list of whole numbers such as 0,1,2 or 0-2 or 64..1024") from None
    return tuple(dict.fromkeys(numbers))
