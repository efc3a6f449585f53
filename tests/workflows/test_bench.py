"""Bench: every sample kept, what fails is a record and costs no other, memory from a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from vitcmp import store
from vitcmp.attention import AttentionError
from vitcmp.configs import MODES, BenchConfig, ModelConfig, RuntimeConfig, UserError, resolve_run
from vitcmp.metrics.memory import PeakMemory
from vitcmp.workflows import bench

MODEL = resolve_run({"dataset": "fake"}).model
QUICK = BenchConfig(tokens=64, rounds=6, max_seconds=0.2, batch_size=2, memory=False, errors=False)

PLUGIN = """
\"\"\"{text}\"\"\"
import time
from dataclasses import dataclass
import torch
from torch import nn
from vitcmp.attention import MultiHead

@dataclass(frozen=True)
class Config:
    pass

class Core(nn.Module):
    def forward(self, q, k, v):
        {body}
        return v

def build(layer, config):
    return MultiHead(layer, Core())

def macs(layer, config):
    return 0
"""


def plugin(folder: Path, name: str, body: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.format(text=name, body=body))
    return str(path)


def measure(
    folder: Path, specs: list[str], config: BenchConfig = QUICK, model: ModelConfig = MODEL, **options: Any
) -> list[store.Record]:
    return bench.run(bench.cells_of(specs, model, config), RuntimeConfig(results=str(folder), threads=1), **options)


def names(records: list[store.Record]) -> list[str]:
    return [Path(r.config["attention"]).stem for r in records]


@pytest.mark.parametrize("level", ["core", "attention", "block", "model"])
def test_levels_and_modes(tmp_path: Path, level: str) -> None:
    records = measure(tmp_path, ["softmax", "linformer"], replace(QUICK, level=level, mode=MODES))
    assert [r.config["mode"] for r in records[::2]] == list(MODES)
    for record in records:
        assert record.status == "ok", record.error
        m = record.metrics
        assert len(m["latency_samples_ms"]) >= 6
        assert min(m["latency_samples_ms"]) == m["latency_min_ms"] <= m["latency_low_ms"] <= m["latency_ms"]
        assert m["throughput_img_s"] == pytest.approx(2e3 / m["latency_ms"])
        assert m["macs_g"] == pytest.approx(m["counted_macs_g"], rel=0.02)
        assert 0 < m["fraction_of_peak"] < 1.5
    blocks = 4 if level == "model" else 1
    # 65 tokens of width 48: the mechanism's own 2 N^2 D, a block's projections 4 N D^2, its MLP 8 N D^2.
    own, projections, mlp = 2 * 65**2 * 48, 4 * 65 * 48**2, 8 * 65 * 48**2
    wanted = {"core": own, "attention": own + projections, "block": own + projections + mlp}
    # Gradients cost twice the forward pass, but for those of an input that nobody asks for.
    ranges = {"forward": (1, 1), "backward": (1.5, 2.6), "train-step": (2.5, 3.6)}
    for record in records[::2]:
        m, (low, high) = record.metrics, ranges[record.config["mode"]]
        assert m["attention_macs_g"] * 1e9 == pytest.approx(blocks * own)
        if level != "model":
            assert m["macs_g"] * 1e9 == pytest.approx(wanted[level])
        assert low * 0.999 <= m["work_gflop"] / (2 * 2 * m["counted_macs_g"]) <= high * 1.001


def test_without_counts_closed_forms_and_times_are_left(tmp_path: Path) -> None:
    counted, bare = (measure(tmp_path, ["softmax"], replace(QUICK, counts=c))[0].metrics for c in (True, False))
    assert bare["latency_ms"] > 0
    assert bare["macs_g"] == counted["macs_g"] > 0
    lost = {"counted_macs_g", "ptflops_macs_g", "work_gflop", "moved_mib", "intensity_flop_byte"}
    assert lost <= counted.keys()
    assert not lost & bare.keys()


def test_settings_with_several_values_are_measured_in_every_combination(tmp_path: Path) -> None:
    several = replace(QUICK, tokens="16,32", batch_size="1,2", precision="fp32,bf16", mode="forward,backward")
    cells = bench.cells_of(["softmax", "linear"], MODEL, several)
    assert len(cells) == 2**5
    assert len(bench._groups(cells)) == 2**4
    records = measure(tmp_path, ["linear"], several)
    kinds = {tuple(r.config[n] for n in ("tokens", "batch_size", "precision", "mode")) for r in records}
    assert kinds == set(product((16, 32), (1, 2), ("fp32", "bf16"), ("forward", "backward")))
    assert {r.metrics["precision_used"] for r in records if r.config["precision"] == "bf16"} == {"bf16"}


def test_grids_are_the_squarest_and_images_give_tokens(tmp_path: Path) -> None:
    (cell,) = bench.cells_of(["linear"], MODEL, replace(QUICK, level="model", tokens=32))
    assert cell.model.image_hw == (16, 32)
    (record,) = bench.run([cell], RuntimeConfig(results=str(tmp_path), threads=1))
    assert (record.status, record.config["tokens"]) == ("ok", 32)
    cells = bench.cells_of(["linear"], MODEL, replace(QUICK, level="model", image_sizes="32,64"))
    assert [(cell.tokens, cell.model.image_hw) for cell in cells] == [(64, (32, 32)), (256, (64, 64))]
    with pytest.raises(UserError, match=r"image_size \(33\) must be divisible by patch_size \(4\)"):
        bench.cells_of(["linear"], MODEL, replace(QUICK, image_sizes=33))


def test_a_group_is_timed_together_against_a_noise_floor(tmp_path: Path) -> None:
    records = measure(tmp_path, ["softmax", "linear"], replace(QUICK, tokens="16,64"))
    groups = [r.metrics["group"] for r in records]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    for first, second in (records[:2], records[2:]):
        assert first.metrics["noise_floor_pct"] == second.metrics["noise_floor_pct"] >= 0


def test_what_dies_hangs_or_eats_all_memory_is_one_record_and_the_others_are_whole(tmp_path: Path) -> None:
    specs = [
        "softmax",
        plugin(tmp_path, "eats", "kept = [v]\n        while True: kept.append(torch.ones(2**24))"),
        plugin(tmp_path, "hangs", "while True: time.sleep(0.01)"),
        plugin(tmp_path, "dies", "import os; os.abort()"),
        plugin(tmp_path, "raises", "raise RuntimeError('not today')"),
        "linear",
    ]
    records = measure(tmp_path / "results", specs, replace(QUICK, timeout=10, memory_limit=2000))
    found = {name: (record.status, record.error) for name, record in zip(names(records), records, strict=True)}
    assert {name: status for name, (status, _) in found.items()} == {
        "softmax": "ok", "eats": "oom", "hangs": "timeout", "dies": "failed", "raises": "failed", "linear": "ok",
    }  # fmt: skip
    assert found["hangs"][1] == "no answer in 10 s; --timeout gives it longer"
    assert found["dies"][1] == "the process was ended by SIGABRT"
    assert found["raises"][1] == "RuntimeError: not today"
    for record in records:
        assert record.status != "ok" or len(record.metrics["latency_samples_ms"]) >= 6
    assert len(store.read(tmp_path / "results")) == 6


def test_a_worker_killed_from_outside_costs_the_cell_it_was_running(tmp_path: Path) -> None:
    victim = []

    def listen(event: dict[str, Any]) -> None:
        if event.get("text") == "sample 11":
            victim.append(event["cell"].name)
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()

    specs = ["softmax", "linear", "performer", "xca"]
    records = measure(tmp_path, specs, listen=listen)
    assert len(records) == 4
    for record in records:
        if record.config["attention"] == victim[0] and record.status != "ok":
            assert (record.status, record.error) == ("failed", "the process was ended by SIGKILL (out of memory?)")
        else:
            assert record.status == "ok"
            assert len(record.metrics["latency_samples_ms"]) >= 6
    lost = [r for r in records if r.status != "ok"]
    # The sample may have been of the first mechanism's copy, whose loss costs the noise floor alone.
    assert lost or records[0].metrics["noise_floor_pct"] is None


def test_a_mechanism_that_fits_no_size_is_refused(tmp_path: Path) -> None:
    runtime = RuntimeConfig(results=str(tmp_path))
    bench.check(bench.cells_of(["linear", "softmax"], MODEL, QUICK), runtime)
    # Too many landmarks for 16 tokens, not for 64: that is a record.
    some = ["nystromformer:num_landmarks=64"]
    bench.check(bench.cells_of(some, MODEL, replace(QUICK, tokens="16,64")), runtime)
    with pytest.raises(AttentionError, match="num_landmarks"):
        bench.check(bench.cells_of(["linear", *some], MODEL, replace(QUICK, tokens=16)), runtime)
    with pytest.raises(AttentionError, match=r"xca has no core from queries, keys and values on: .* --level attention"):
        bench.check(bench.cells_of(["xca"], MODEL, replace(QUICK, level="core")), runtime)
    assert not list(tmp_path.iterdir())


def test_a_mixed_model_is_one_cell_however_it_is_written(tmp_path: Path) -> None:
    whole = replace(QUICK, level="model")
    cells = bench.cells_of(["softmax,2-=linear:eps=1e-6", "softmax:impl=auto,2+3=linear"], MODEL, whole)
    assert [cell.name for cell in cells] == ["softmax,2-=linear"]
    (record,) = bench.run(cells, RuntimeConfig(results=str(tmp_path), threads=1))
    assert record.status == "ok", record.error
    assert record.config["attention"] == ("softmax", "softmax", "linear", "linear")
    alone = measure(tmp_path, ["softmax", "linear"], whole)
    macs = [r.metrics["attention_macs_g"] for r in alone]
    assert record.metrics["attention_macs_g"] == pytest.approx(sum(macs) / 2)
    with pytest.raises(UserError, match=r"'softmax,2-=linear' mixes mechanisms over layers: .* --level model"):
        bench.cells_of(["softmax,2-=linear"], MODEL, QUICK)


def test_finished_cells_are_skipped_unless_forced(tmp_path: Path) -> None:
    assert len(measure(tmp_path, ["softmax"])) == 1
    assert names(measure(tmp_path, ["softmax", "linear"], force=False)) == ["linear"]
    assert names(measure(tmp_path, ["softmax", "linear"])) == ["softmax", "linear"]


@pytest.mark.skipif(
    PeakMemory(torch.device("cpu")).mib() is None, reason="this system does not tell a process's peak memory"
)
def test_memory_of_explicit_weights_grows_with_the_square_of_the_tokens(tmp_path: Path) -> None:
    config = replace(QUICK, level="core", tokens="1024,2048", memory=True)
    model = replace(MODEL, dim=512, num_heads=1, pool="mean")
    records = measure(tmp_path, ["softmax:impl=naive", "softmax:impl=fused"], config, model)
    naive, fused = ([r.metrics["peak_memory_mib"] for r in records][i::2] for i in (0, 1))
    # Scaled queries, scores and weights, at two token counts.
    assert naive == pytest.approx([4 + 8 + 8, 8 + 32 + 32], rel=0.25)
    assert fused == pytest.approx([4, 8], rel=0.5)


def test_training_holds_activations_that_inference_does_not(tmp_path: Path) -> None:
    config = replace(QUICK, level="core", tokens=1024, memory=True, mode="forward,train-step")
    inference, step = (r.metrics for r in measure(tmp_path, ["softmax:impl=naive"], config))
    assert step["inference_memory_mib"] == pytest.approx(inference["peak_memory_mib"], rel=0.2)
    # The weights, 2 x 4 heads x 1,025^2 x 4 bytes, stay for the backward pass.
    assert step["activation_memory_mib"] == pytest.approx(2 * 4 * 1025**2 * 4 / 2**20, rel=0.3)
    assert step["peak_memory_mib"] > step["activation_memory_mib"]


def test_errors_of_what_approximates_softmax(tmp_path: Path) -> None:
    records = measure(tmp_path, ["softmax", "performer", "reformer"], replace(QUICK, errors=True, tokens="16,64"))
    for record in records:
        wanted = {"softmax": None, "performer": "softmax", "reformer": "shared-qk"}[record.config["attention"]]
        assert record.metrics.get("error_target") == wanted
        if wanted:
            assert record.metrics["output_error"] > 0
            assert record.metrics["error_on"].startswith("random q, k of standard deviation 1")


@pytest.mark.compiler
def test_compiled_cells_in_every_mode_are_compiled(tmp_path: Path) -> None:
    # More of them than the compiler's limit of versions of one function.
    specs = ["softmax", *(f"linear:eps={i}e-6" for i in range(2, 11))]
    for name, several in (("softmax", replace(QUICK, mode=MODES, memory=True)), ("all", QUICK)):
        records = measure(tmp_path, ["softmax"] if name == "softmax" else specs, replace(several, execution="compiled"))
        assert [(r.status, r.error) for r in records] == [("ok", None)] * (3 if name == "softmax" else 10)
        for record in records:
            assert record.metrics.get("peak_memory_mib", 0) < 8, "without what compiling takes"
