"""The script for a GPU, tried out on the CPU: a loan of a GPU is too short to find its mistakes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


def run(gpu: Any, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *args])
    return gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(gpu, monkeypatch) == 2
    assert capsys.readouterr().err == (
        "gpu.py: torch sees no CUDA GPU here; `--device cpu --quick` tries the script out\n"
    )


@pytest.mark.usefixtures("one_thread")
def test_all_but_triton_runs_on_the_cpu(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "QUICK", gpu.replace(gpu.QUICK, tokens=(16,), batch_tokens=16, images=2))
    monkeypatch.setattr(gpu, "MECHANISMS", ("linear", "local:window=99"))
    out = tmp_path / "new" / "gpu.jsonl"
    assert run(gpu, monkeypatch, "--device", "cpu", "--quick", "--rounds", "7", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "Triton needs CUDA: left out" in printed
    (first,) = map(json.loads, out.read_text().splitlines())
    assert [row["core"] for row in first["train_step"]] == ["vitcmp", "timm"]
    ours, theirs = (row["params_m"] for row in first["train_step"])
    assert ours == pytest.approx(theirs, rel=0.01)
    # Two formats and two passes of three cores, one of which cannot be built.
    assert len(first["cores"]) == 12
    for row in first["train_step"] + first["cores"]:
        if row["core"] == "local":
            assert "window" in row["lost"]
        else:
            assert (len(row["samples_ms"]), row["ms"] > 0, row["peak_mib"]) == (7, True, None)
    assert first["entmax"] == []
    assert first["facts"]["torch"] == torch.__version__.partition("+")[0]
