"""Profiles: which form is taken, from which file, and that a run keeps the ones that it began with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attention_cases import Always, needs_kernels

from vitcmp.configs import RuntimeConfig, resolve_run
from vitcmp.kernels import cpu, forms, operators
from vitcmp.kernels.forms import Cell, Profile
from vitcmp.kernels.measure import time_forms
from vitcmp.kernels.switch import SettingError
from vitcmp.store import Record
from vitcmp.workflows.train import run

PROFILE = Profile("a CPU", (
    Cell("softmax_attention", "fp32", "forward", (16, 64, 64), {"numba": 1.0, "fused": 2.0}),
    Cell("linear_attention", "bf16", "train", (16, 64, 64), {"torch": None, "numba": None}),
), {"cpu": cpu.info("model name"), "time": "2026-01-01"})  # fmt: skip


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "mine.json")
    found = forms.read(tmp_path / "mine.json")
    assert found == PROFILE
    assert found.digest == PROFILE.digest
    assert found.order("linear_attention", "bf16", "train", (16, 100, 100)) == ("torch", "numba")
    assert found.order("linear_attention", "bf16", "forward", (16, 64, 64)) == ()
    assert (
        found.order("softmax_attention", "fp32", "forward", (16, 64, 64 * 16)) == ()
    )  # too far from what was measured


def test_times_are_not_what_a_profile_decides_by_but_their_order() -> None:
    slower = Cell("softmax_attention", "fp32", "forward", (16, 64, 64), {"numba": 10.0, "fused": 20.0})
    other = Cell("softmax_attention", "fp32", "forward", (16, 64, 64), {"numba": 20.0, "fused": 10.0})
    assert Profile("a CPU", (slower, PROFILE.cells[1])).digest == PROFILE.digest
    assert Profile("a CPU", (other, PROFILE.cells[1])).digest != PROFILE.digest


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "a", "cells": [{}], "facts": {}}', "[1"])
def test_a_damaged_profile_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.setenv("VITCMP_PROFILE", str(tmp_path / "mine.json"))
    forms.forget()
    with pytest.raises(SettingError, match=r"cannot read the profile '.*mine.json' .*vitcmp doctor --measure"):
        forms.active()


def test_where_a_profile_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    published = forms.published(cpu.kind())
    forms.forget()
    PROFILE.save(forms.measured_file())
    monkeypatch.delenv("VITCMP_PROFILE", raising=False)
    assert forms.active() == PROFILE
    monkeypatch.setenv("VITCMP_PROFILE", "none")
    assert forms.active() is published
    monkeypatch.delenv("VITCMP_PROFILE")
    Profile("a CPU", PROFILE.cells, {"cpu": "another one"}).save(forms.measured_file())
    forms.forget()
    assert forms.active() is published
    forms.forget()


@pytest.mark.parametrize(
    "path", sorted((Path(forms.__file__).parent / "profiles").glob("*.json")), ids=lambda p: p.stem
)
def test_published_profiles_speak_of_operators_that_there_are(path: Path) -> None:
    profile = forms.read(path)
    assert profile.kind == path.stem
    known = operators()
    for cell in profile.cells:
        assert set(cell.order) <= set(known[cell.operator].choices)
        assert len(cell.sizes) == len(known[cell.operator].grid[0])


@needs_kernels
def test_every_form_is_timed() -> None:
    found = time_forms(operators()["softmax_attention"], torch.float32, (8, 32, 32), trains=True)
    assert set(found) == {"merged", "fused", "numba"}
    assert all(0 < ms < 1000 for ms in found.values())


def trained(folder: Path, profile: Profile, resume: Path | None = None, epochs_until_stopped: int = 9) -> Record | None:
    config = resolve_run({"epochs": 2, "train_samples": 256})
    told = 0

    def listen(event: dict[str, object]) -> None:
        nonlocal told
        told += event["event"] == "epoch"
        if told == epochs_until_stopped:
            raise KeyboardInterrupt

    with forms.kept(profile):
        try:
            return run(config, RuntimeConfig(results=str(folder)), resume=resume, listen=listen)
        except KeyboardInterrupt:
            return None


@needs_kernels
def test_a_resumed_run_keeps_its_forms(tmp_path: Path) -> None:
    """Stopped after an epoch, and resumed where another profile holds: the same run to the last bit."""
    first, other = Always("numba"), Always("merged", "torch")
    whole = trained(tmp_path / "whole", first)
    assert whole is not None
    assert "softmax_attention=numba" in whole.metrics["kernels_used"]
    assert whole.metrics["blocks_used"] == "fast"
    PROFILE.save(tmp_path / "profile.json")
    assert trained(tmp_path / "parts", forms.read(tmp_path / "profile.json"), epochs_until_stopped=1) is None
    (folder,) = (tmp_path / "parts" / "runs").iterdir()
    assert json.loads((folder / "kernel_profile.json").read_text())["kind"] == "a CPU"
    resumed = trained(tmp_path / "parts", other, resume=folder)
    assert resumed is not None
    assert resumed.metrics["kernel_profile"] == PROFILE.digest
    undisturbed = trained(tmp_path / "again", PROFILE)
    assert undisturbed is not None
    for name in ("top1_pct", "validation_top1_pct", "nll"):
        assert resumed.metrics[name] == undisturbed.metrics[name]


def test_a_record_without_kernels_says_so(tmp_path: Path) -> None:
    record = run(resolve_run({"epochs": 1, "attention": "linear"}), RuntimeConfig(results=str(tmp_path), kernels="off"))
    assert record.status == "ok"
    assert record.metrics["blocks_used"] == "plain"
    assert record.metrics["kernels_used"] == ["linear_attention=torch"]
