"""JSON without what JSON does not have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitcmp.console import Output
from vitcmp.plain_json import plain, to_json

NESTED = {
    "metrics": {"nll": math.nan, "top1_pct": 50.0, "bounds": (math.inf, -math.inf, 1)},
    "path": Path("results/runs"), "seeds": range(3), "holds": True, "none": None, "text": "NaN",
    "numbers": [np.float32("nan"), np.float32(0.5), np.float64("inf"), np.int64(3)],
    "array": np.array([[1.0, np.nan]]),
}  # fmt: skip
WANTED = {
    "metrics": {"nll": None, "top1_pct": 50.0, "bounds": [None, None, 1]},
    "path": "results/runs", "seeds": [0, 1, 2], "holds": True, "none": None, "text": "NaN",
    "numbers": [None, 0.5, None, 3],
    "array": [[1.0, None]],
}  # fmt: skip


def strictly(text: str) -> Any:
    """JSON as the standard has it; Python's own parser takes NaN and Infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_values_become_those_of_json() -> None:
    assert plain(NESTED) == WANTED
    assert plain(NESTED)["holds"] is True
    assert strictly(to_json(NESTED)) == WANTED
    assert to_json([1, 2.5]) == "[1, 2.5]"


def test_what_is_no_value_is_refused() -> None:
    with pytest.raises(TypeError):
        to_json(object())


def test_commands_print_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).show(NESTED, "for a person")
    assert strictly(capsys.readouterr().out) == WANTED
