"""Bench: every sample kept, what fails is a record, memory from a process of its own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitcmp import store
from vitcmp.configs import BenchConfig, RuntimeConfig, UserError, resolve_run
from vitcmp.metrics.latency import interleaved_ms, median_and_iqr
from vitcmp.workflows import bench

MODEL = resolve_run({"dataset": "fake"}).model
QUICK = BenchConfig(tokens=(64,), rounds=3, batch_size=2, memory=False)


def test_levels_and_modes(tmp_path: Path):
    runtime = RuntimeConfig(results=str(tmp_path))
    for level in ("attention", "model"):
        for mode in ("forward", "train-step"):
            (record,) = bench.run(bench.cells_of(["softmax"], MODEL, replace(QUICK, level=level, mode=mode)), runtime)
            assert record.status == "ok", record.error
            m = record.metrics
            assert len(m["latency_samples_ms"]) == 3
            assert m["throughput_img_s"] == pytest.approx(2e3 / m["latency_ms"])
            # 65 tokens of width 48: the mechanism's own 2 N^2 D, a block's projections 4 N D^2.
            blocks = 4 if level == "model" else 1
            assert m["attention_macs_g"] * 1e9 == pytest.approx(blocks * 2 * 65**2 * 48)
            assert m["macs_g"] * 1e9 >= blocks * (2 * 65**2 * 48 + 4 * 65 * 48**2)


def test_model_level_takes_the_squarest_grid(tmp_path: Path):
    (cell,) = bench.cells_of(["linear"], MODEL, replace(QUICK, level="model", tokens=(32,)))
    assert cell.model.image_hw == (16, 32)
    (record,) = bench.run([cell], RuntimeConfig(results=str(tmp_path)))
    assert (record.status, record.config["tokens"]) == ("ok", 32)


def test_a_failing_cell_is_a_record_and_the_others_are_whole(tmp_path: Path):
    mine = tmp_path / "broken.py"
    mine.write_text(
        "from dataclasses import dataclass\nimport torch\n"
        "@dataclass(frozen=True)\nclass Config:\n    pass\n"
        "def build(layer, config):\n    raise MemoryError('too much')\n"
        "def macs(layer, config):\n    return 0\n"
    )
    runtime = RuntimeConfig(results=str(tmp_path / "results"))
    records = bench.run(bench.cells_of([str(mine), "linear"], MODEL, QUICK), runtime)
    assert [(r.status, r.error) for r in records] == [("oom", "MemoryError: too much"), ("ok", None)]
    assert len(store.read(tmp_path / "results")) == 2


def test_a_mixed_model_is_one_cell_however_it_is_written(tmp_path: Path):
    whole = replace(QUICK, level="model")
    cells = bench.cells_of(["softmax,2-=linear:eps=1e-6", "softmax:impl=auto,2+3=linear"], MODEL, whole)
    assert [cell.name for cell in cells] == ["softmax,2-=linear"]
    (record,) = bench.run(cells, RuntimeConfig(results=str(tmp_path)))
    assert record.status == "ok", record.error
    assert record.config["attention"] == ("softmax", "softmax", "linear", "linear")
    alone = [bench.cells_of([spec], MODEL, whole)[0] for spec in ("softmax", "linear")]
    macs = [r.metrics["attention_macs_g"] for r in bench.run(alone, RuntimeConfig(results=str(tmp_path)))]
    assert record.metrics["attention_macs_g"] == pytest.approx(sum(macs) / 2)
    with pytest.raises(UserError, match=r"'softmax,2-=linear' mixes mechanisms over layers: .* --level model"):
        bench.cells_of(["softmax,2-=linear"], MODEL, QUICK)


def test_finished_cells_are_skipped_unless_forced(tmp_path: Path):
    runtime = RuntimeConfig(results=str(tmp_path))
    cells = bench.cells_of(["softmax", "linear"], MODEL, QUICK)
    assert len(bench.run(cells[:1], runtime)) == 1
    assert [r.config["attention"] for r in bench.run(cells, runtime, force=False)] == ["linear"]


@pytest.mark.skipif(not bench._can_fork_a_server(), reason="this system does not tell a process's peak memory")
def test_memory_of_explicit_weights_grows_with_the_square_of_the_tokens(tmp_path: Path):
    measure = replace(QUICK, tokens=(1024, 2048), rounds=1, memory=True)
    records = bench.run(bench.cells_of(["softmax:impl=naive"], MODEL, measure), RuntimeConfig(results=str(tmp_path)))
    small, large = (r.metrics["peak_memory_mib"] for r in records)
    # Scores and weights at once: 2 x batch 2 x 4 heads x N^2 x 4 bytes are 64 MiB at 1,024 tokens.
    assert 60 < small < 110
    assert 3.3 < large / small < 4.3


def test_calls_are_interleaved_and_all_samples_kept():
    order = []
    calls = {name: (lambda name=name: order.append(name) or torch.zeros(200, 200).exp().sum()) for name in "ab"}
    samples = interleaved_ms(calls, rounds=9, device=torch.device("cpu"))
    assert [len(samples[name]) for name in "ab"] == [9, 9]
    turns = [a for a, b in zip(order, [*order[1:], ""]) if a != b]
    assert len(turns) > 6, "the calls take turns"
    assert median_and_iqr([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0)
