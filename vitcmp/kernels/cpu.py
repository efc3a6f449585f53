"""What kind of CPU this is: its maker, and the instructions that decide which form of an operator is quick."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

MAKERS = {"GenuineIntel": "intel", "AuthenticAMD": "amd"}
INSTRUCTIONS = (
    ("amx_bf16", "amx"),
    ("avx512_bf16", "avx512-bf16"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
    ("bf16", "bf16"),
)
"""A flag of /proc/cpuinfo and its short name, the most telling first; the last one is ARM's."""


def kind() -> str:
    """Maker and instructions, such as `intel-amx`, `amd-avx512-bf16` or `aarch64-bf16`."""
    maker = MAKERS.get(info("vendor_id"), platform.machine().lower())
    return "-".join(filter(None, [maker, next((name for flag, name in INSTRUCTIONS if flag in flags()), "")]))


@functools.cache
def flags() -> frozenset[str]:
    """The instructions that the CPU has, by their names in /proc/cpuinfo; empty where there is no such file."""
    return frozenset([*info("flags").split(), *info("Features").split()])


def info(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")
