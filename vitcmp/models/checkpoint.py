"""Checkpoints: weights in safetensors, with all that is needed to use them in the file's own metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vitcmp import attention, store
from vitcmp.attention import AttentionError
from vitcmp.configs import RunConfig, RuntimeConfig, UserError, attention_name
from vitcmp.data.datasets import Data
from vitcmp.models.vit import ViT
from vitcmp.plain_json import to_json


@dataclass(frozen=True)
class RunInfo:
    """What a run is: it stands in config.json and in each of the run's checkpoints."""

    id: str
    name: str | None
    key: str
    config: dict[str, Any]
    """RunConfig.flat()."""
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    """Of the data."""
    logging: dict[str, Any] = field(default_factory=dict)
    """save_every, log_every, tracker and kernels, which a resumed run keeps."""
    mechanisms: dict[str, str] = field(default_factory=dict)
    """Digests of the files of mechanisms that are not part of vitcmp, by spec."""

    @classmethod
    def of(cls, id: str, runtime: RuntimeConfig, key: str, config: RunConfig, data: Data) -> RunInfo:
        """The information of a new run."""
        logging = {name: getattr(runtime, name) for name in ("save_every", "log_every", "tracker", "kernels")}
        digests = {spec: attention.load(spec).digest for spec in config.model.attention_specs}
        foreign = {spec: digest for spec, digest in digests.items() if digest}
        return cls(
            id, runtime.name, key, config.flat(), data.class_names, data.mean, data.std, data.digest, logging, foreign
        )

    @property
    def run_config(self) -> RunConfig:
        """The full configuration."""
        return RunConfig.from_flat(self.config)

    @property
    def label(self) -> str:
        """What tables and pictures call the run: its mechanism."""
        return self.name or attention_name(self.config["attention"])


@dataclass(frozen=True)
class Run:
    """A trained model and what it was trained as."""

    model: ViT
    info: RunInfo
    folder: Path
    """Where the checkpoint lies."""


def save_weights(path: Path, model: ViT, info: RunInfo) -> None:
    """Write parameters and buffers; whole, or not at all."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    store.write_atomic(path, lambda temporary: save_file(state, temporary, {"vitcmp": to_json(asdict(info))}))


def load_info(run: Path) -> RunInfo:
    """The information in a run folder's config.json.

    Raises: UserError where the file is damaged.
    """
    try:
        return _info((run / "config.json").read_text())
    except (OSError, KeyError, ValueError, TypeError):
        raise UserError(f"{run / 'config.json'} is missing or damaged; the run cannot be read") from None


def load_run(run: str, results: str | Path = "results") -> Run:
    """A trained model by its run (id, the beginning of one, folder) or checkpoint file, ready to evaluate.

    Raises: UserError where there is none, or the file does not fit.
    """
    if run.endswith(".safetensors"):
        path = Path(run)
        if not path.is_file():
            raise UserError(f"no checkpoint '{run}'; give a .safetensors file of vitcmp, or a run (`vitcmp runs`)")
    else:
        folder = store.find_run(results, run)
        path = folder / "model.safetensors"
        if not path.is_file():
            raise UserError(f"run '{folder.name}' has no model.safetensors yet; finish it with "
                            f"`vitcmp train --resume {folder.name}`")  # fmt: skip
    return Run(*load_weights(path), path.parent)


def load_weights(path: Path) -> tuple[ViT, RunInfo]:
    """The model in a checkpoint file, in evaluation mode on the CPU.

    Raises: UserError where it is damaged, is not ours, has another shape than its configuration says, or was trained
    with another version of someone's own mechanism.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        info = _info(metadata["vitcmp"])
        state = load_file(path)
    except (SafetensorError, OSError):
        raise UserError(f"{path} is damaged or no safetensors file; give another checkpoint, or train again") from None
    except (KeyError, ValueError, TypeError):
        raise UserError(
            f"{path} was not written by this version of vitcmp: it does not say what model it is; train again"
        ) from None
    try:
        changed = [spec for spec, digest in info.mechanisms.items() if attention.load(spec).digest != digest]
        model = ViT(info.run_config.model)
    except AttentionError as error:
        hint = "; a mechanism's file is looked for where it was when the run was trained" if info.mechanisms else ""
        raise UserError(f"{path}: {error}{hint}") from None
    if changed:
        raise UserError(f"{changed[0]} has changed since {info.id} was trained: restore the file, or train again")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(
            f"{path} does not fit the model that it describes: {reason}; give another checkpoint, or train again"
        ) from None
    return model.eval(), info


def _info(text: str) -> RunInfo:
    values = json.loads(text)
    for name in ("class_names", "mean", "std"):
        values[name] = tuple(values[name])
    return RunInfo(**values)
