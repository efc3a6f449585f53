"""A study: cells are independent, finished ones are skipped, failed ones recorded and passed over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitcmp import store
from vitcmp.configs import BenchConfig, RuntimeConfig, UserError
from vitcmp.workflows import compare

SETTINGS = {"dataset": "digits", "train_samples": 128, "epochs": 1}
BENCH = BenchConfig(tokens=16, max_seconds=0.1, batch_size=2, memory=False)


def test_a_study_trains_benches_reports_and_skips_what_is_finished(tmp_path: Path):
    runtime = RuntimeConfig(results=str(tmp_path))
    plan = compare.plan(["softmax", "linear"], [0, 1], SETTINGS, runtime, force=False)
    assert [cell.text for cell in plan[:2]] == [
        "train softmax on digits, seed 0: to do",
        "train linear on digits, seed 0: to do",
    ]
    events = []
    study = compare.run(plan, compare.bench_cells(plan, BENCH), runtime, listen=events.append)
    assert study.failed == 0
    kinds = [record.kind for record in store.read(tmp_path)]
    assert (kinds.count("train"), kinds.count("bench")) == (4, 4)
    assert [e["number"] for e in events if e["event"] == "cell"] == [0, 1, 2, 3]
    assert study.report is not None
    (comparison,) = study.report.comparisons
    assert comparison.table["seeds"].tolist() == [2, 2]
    assert comparison.table["latency_ms"].notna().all(), "the bench has the trained model's own shape"
    names = {path.name for path in [*study.report.paths, *study.pictures]}
    assert {"report.md", "table.csv", "accuracy-vs-latency.png", "accuracy-vs-macs.png", "learning-curves.png"} <= names
    assert "comparison.png" in names

    again = compare.plan(["softmax", "linear"], [0, 1], SETTINGS, runtime, force=False)
    assert all(cell.finished for cell in again)
    study = compare.run(again, compare.bench_cells(again, BENCH), runtime)
    assert (study.records, study.skipped) == ([], 4)
    forced = compare.plan(["softmax"], [0], SETTINGS, runtime, force=True)
    assert not forced[0].finished


def test_a_cell_that_cannot_be_built_is_a_record_and_the_rest_goes_on(tmp_path: Path):
    runtime = RuntimeConfig(results=str(tmp_path))
    settings = {**SETTINGS, "attention_dropout": 0.1}
    cells = compare.plan(["linear", "softmax"], [0], settings, runtime, force=False)
    study = compare.run(cells, compare.bench_cells(cells, BENCH), runtime)
    assert study.failed == 2, "its training and its bench as a whole model"
    statuses = {r.config["attention"]: (r.status, r.error) for r in store.read(tmp_path) if r.kind == "train"}
    assert statuses["softmax"] == ("ok", None)
    assert statuses["linear"][0] == "failed"
    assert "no weights to drop" in str(statuses["linear"][1])


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the child through /proc")
def test_a_killed_cell_is_a_record_and_the_rest_goes_on(tmp_path: Path):
    mine = tmp_path / "deadly.py"
    mine.write_text(
        "import os, signal\nfrom dataclasses import dataclass\n"
        "from vitcmp.attention import linear\n"
        "@dataclass(frozen=True)\nclass Config:\n    pass\n"
        "class Deadly(linear.LinearAttention):\n"
        "    def forward(self, q, k, v):\n"
        "        if self.training and q.requires_grad:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().forward(q, k, v)\n"
        "def build(layer, config):\n    return linear.MultiHead(layer, Deadly(1e-6))\n"
        "def macs(layer, config):\n    return 0\n"
    )
    runtime = RuntimeConfig(results=str(tmp_path / "results"))
    cells = compare.plan([str(mine), "linear"], [0], SETTINGS, runtime, force=False)
    study = compare.run(cells, compare.bench_cells(cells, BENCH), runtime)
    by_name = {r.config["attention"]: r for r in study.records if r.kind == "train"}
    assert by_name[str(mine)].status == "failed"
    assert "SIGKILL" in str(by_name[str(mine)].error)
    assert by_name["linear"].status == "ok"


def test_an_interrupted_study_goes_on_where_it_stopped(tmp_path: Path):
    command = [sys.executable, "-m", "vitcmp", "--results", str(tmp_path), "compare", "--attention", "softmax",
               "--attention", "linear", "--epochs", "40", "--train-samples", "256"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/state.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in printed
    assert [r.status for r in store.read(tmp_path)] == ["interrupted"]
    runtime = RuntimeConfig(results=str(tmp_path))
    settings = {"dataset": "digits", "epochs": 40, "train_samples": 256}
    first, second = compare.plan(["softmax", "linear"], [0], settings, runtime, force=False)
    assert first.unfinished is not None
    assert "resume" in first.text
    assert second.unfinished is None
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the study left processes behind")


def test_settings_that_do_not_fit_are_refused_before_anything_runs(tmp_path: Path):
    with pytest.raises(UserError, match="divisible"):
        compare.plan(["softmax"], [0], {"num_heads": 5}, RuntimeConfig(results=str(tmp_path)), force=False)
    assert not list(tmp_path.iterdir())
