"""What this machine has, and what to install."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import torch

from vitcmp import machine
from vitcmp.configs import RuntimeConfig

EXTRAS = {
    "Grad-CAM": ("pytorch_grad_cam", "pip install 'vitcmp[viz]'"),
    "TensorBoard": ("tensorboard", "pip install 'vitcmp[track]'"),
}
DATA = {
    "mnist": "**/train-images-idx3-ubyte*",
    "cifar10": "**/cifar-10-*",
    "cifar100": "**/cifar-100-*",
}


def run(runtime: RuntimeConfig) -> dict[str, str]:
    """One line a fact, in the order to read them."""
    device = machine.pick_device(runtime.device)
    facts = machine.hardware(device)
    results = Path(runtime.results).absolute()
    disk = shutil.disk_usage(next(p for p in (results, *results.parents) if p.exists()))
    found = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
        "commit": machine.commit() or "not a checkout",
        "device": f"{facts['device']} (--device auto)" if runtime.device == "auto" else facts["device"],
        "CPU": f"{facts['cpu']}, {facts['cores']} cores, torch uses {facts['threads']}",
        "memory": f"{facts['memory_gib']} GiB",
        "native bf16": "yes: --precision auto trains in bf16"
        if facts["native_bf16"]
        else "no: --precision auto is fp32",
        "CUDA": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "C++ compiler": machine.compiler() or "none: --compile runs eagerly; install g++ or clang for it",
        "disk": f"{disk.free / 2**30:.1f} GiB free for {runtime.results}",
    }
    for name, (module, remedy) in EXTRAS.items():
        found[name] = "installed" if importlib.util.find_spec(module) else f"not installed: {remedy}"
    root = Path(runtime.data_dir or os.environ.get("VITCMP_DATA") or "~/.cache/vitcmp").expanduser()
    here = [name for name, pattern in DATA.items() if root.is_dir() and next(root.glob(pattern), None)]
    found["data"] = f"digits, fake (always); in {root}: {', '.join(here) or 'none'}"
    return found
