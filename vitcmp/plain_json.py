"""JSON that every parser reads: NaN and infinity, which JSON does not have, become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """`value` in JSON's own types: paths become text, mappings dicts, and tuples, ranges and arrays lists."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return [plain(part) for part in value]


def to_json(value: Any, indent: int | None = None) -> str:
    """The JSON text of `value`."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)
