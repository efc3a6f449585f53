"""Tables of records: what may share a row, what must be said beside it, and how numbers look."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from vitcmp.configs import resolve_run
from vitcmp.render import tables

MACHINE = {"hardware_device": "cpu", "hardware_cpu": "Fast 9000", "hardware_threads": 2}
MODEL = ("preset", "image_size", "patch_size", "dim", "depth", "num_heads", "mlp_dim", "pool", "stem", "qkv_bias")


class Records:
    """A store's records in memory, a minute apart."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def _add(self, **fields: Any) -> None:
        count = len(self.rows)
        base = {"id": f"id{count}", "time": f"2026-01-01T00:{count:02}:00+00:00", "commit": "abc", "warnings": [],
                "error": None, "status": "ok", **MACHINE}  # fmt: skip
        self.rows.append({**base, **fields})

    def train(self, attention: str = "softmax", seed: int = 0, top1: float = 90.0, **fields: Any) -> None:
        names = {"epochs", "dim", "dataset", "image_size", "lr"} & set(fields)
        settings = {name: fields.pop(name) for name in names}
        config = resolve_run({"dataset": "digits", "attention": attention, "seed": seed, **settings}).flat()
        metrics = {
            "top1_pct": top1, "top5_pct": 99.0, "validation_top1_pct": top1 + 1, "params_m": 0.0254,
            "macs_g": 0.00195, "attention_macs_g": 0.0005, "throughput_img_s": 2000.0, "seconds_per_epoch": 0.5,
            "train_seconds": 7.5, "peak_memory_mib": 200.0, "precision_used": "fp32",
        }  # fmt: skip
        if fields.get("status", "ok") != "ok":
            metrics = {}
        key = f"{attention} {seed} {settings}"
        self._add(kind="train", **{"key": key, **config, **metrics, **fields})

    def bench(self, attention: str = "softmax", latency: float | None = 2.0, **fields: Any) -> None:
        config = resolve_run({"dataset": "digits", "attention": attention}).flat()
        cell = {name: config[name] for name in MODEL}
        cell |= {
            "attention": attention, "level": "model", "mode": "forward", "tokens": 64, "batch_size": 8,
            "precision": "fp32", "peak_memory_mib": 10.0, "latency_iqr_ms": 0.1, "latency_ms": latency,
        }  # fmt: skip
        self._add(kind="bench", key="k", **{**cell, **fields})

    @property
    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


@pytest.fixture
def records() -> Records:
    return Records()


def test_mean_and_sample_deviation_over_seeds_best_first(records: Records) -> None:
    for seed, top1 in enumerate([90.0, 92.0, 94.0]):
        records.train("softmax", seed, top1)
    records.train("linear", 0, 95.0)
    (found,) = tables.comparison(records.table)
    assert found.title == "digits, tiny, 20 epochs"
    assert found.table["attention"].tolist() == ["linear", "softmax"]
    softmax = found.table.iloc[1]
    assert (softmax["seeds"], softmax["top1_pct"], softmax["top1_std_pct"]) == (3, 92.0, 2.0)
    assert found.table.iloc[0].isna()["top1_std_pct"]
    assert found.runs == {"softmax": ("id0", "id1", "id2"), "linear": ("id3",)}


def test_seeds_that_differ_are_said(records: Records) -> None:
    records.train("softmax", 0)
    records.train("softmax", 1)
    records.train("linear", 0)
    (found,) = tables.comparison(records.table)
    assert "Seeds differ: linear: 0; softmax: 0, 1." in found.notes


def test_conditions_that_differ_never_share_a_table(records: Records) -> None:
    records.train(lr=0.1)
    records.train("linear", lr=0.1)
    records.train(lr=0.2)
    records.train(epochs=3)
    found = tables.comparison(records.table)
    assert [c.title for c in found] == [
        "digits, tiny, 20 epochs, lr 0.1", "digits, tiny, 20 epochs, lr 0.2", "digits, tiny, 3 epochs",
    ]  # fmt: skip
    assert [len(c.table) for c in found] == [2, 1, 1]


def test_auto_precision_that_became_two_things_is_two_conditions(records: Records) -> None:
    records.train(precision_used="fp32")
    records.train("linear", precision_used="bf16")
    titles = {c.title for c in tables.comparison(records.table)}
    assert titles == {"digits, tiny, 20 epochs, precision fp32", "digits, tiny, 20 epochs, precision bf16"}


def test_a_cell_that_ran_twice_counts_once_the_newest(records: Records) -> None:
    records.train(top1=50.0)
    records.train(top1=90.0)
    records.train(top1=91.0, key="after a change of the code")
    row = tables.comparison(records.table)[0].table.iloc[0]
    assert (row["seeds"], row["top1_pct"]) == (1, 91.0)


def test_failures_are_listed_until_the_cell_ends_well(records: Records) -> None:
    records.train("softmax")
    records.train("linear", 0, status="failed", error="boom", precision_used="fp32")
    records.train("entmax", 0, status="interrupted", error="KeyboardInterrupt", precision_used="fp32")
    records.train("entmax", 0)
    (found,) = tables.comparison(records.table)
    assert [note for note in found.notes if "Not in the table" in note] == [
        "Not in the table: linear, seed 0: failed: boom"
    ]
    assert set(found.table["attention"]) == {"softmax", "entmax"}


def test_a_failure_after_success_is_listed_and_the_success_kept(records: Records) -> None:
    records.train()
    records.train(status="oom", precision_used="fp32")
    (found,) = tables.comparison(records.table)
    assert len(found.table) == 1
    assert "Not in the table: softmax, seed 0: oom" in found.notes


def test_a_group_of_failures_alone_is_still_shown(records: Records) -> None:
    records.train(status="diverged", error="the loss is nan")
    (found,) = tables.comparison(records.table)
    assert found.table.empty
    assert "Not in the table: softmax, seed 0: diverged: the loss is nan" in found.notes
    text = _printed(tables.to_rich(found.table, found.title, found.notes))
    assert "digits, tiny" in text
    assert "diverged" in text


def test_an_early_failure_that_was_repeated_is_gone(records: Records) -> None:
    # It failed before its precision was known, so that only its key connects the two.
    records.train(status="failed")
    records.train(precision_used="bf16")
    (found,) = tables.comparison(records.table)
    assert not any("Not in the table" in note for note in found.notes)


def test_latency_comes_from_the_same_model(records: Records) -> None:
    records.train("softmax")
    records.train("linear")
    records.bench("softmax", 3.0)
    records.bench("softmax", 2.0)
    records.bench("linear", 9.0, dim=64)
    records.bench("linear", 9.0, image_size=16)
    records.bench("linear", 9.0, level="attention")
    records.bench("linear", 9.0, mode="train-step")
    # The same patches, once as `auto` and once in pixels.
    records.bench("linear", 1.0, patch_size=1, image_size=[8, 8])
    (found,) = tables.comparison(records.table)
    latency = dict(zip(found.table["attention"], found.table["latency_ms"], strict=True))
    assert latency == {"linear": 1.0, "softmax": 2.0}
    assert found.table["forward_peak_memory_mib"].tolist() == [10.0, 10.0]


def test_latencies_of_several_batch_sizes_never_share_a_table(records: Records) -> None:
    for name in ("softmax", "linear", "entmax"):
        records.train(name)
    records.bench("softmax", 1.0)
    records.bench("linear", 2.0)
    records.bench("entmax", 50.0, batch_size=64)
    records.bench("entmax", None, status="oom")
    (found,) = tables.comparison(records.table)
    latency = dict(zip(found.table["attention"], found.table["latency_ms"], strict=True))
    assert (latency["softmax"], latency["linear"]) == (1.0, 2.0)
    assert pd.isna(latency["entmax"])
    assert "No latency: entmax: oom" in found.notes
    assert any("batch size 8, fp32, eager, on cpu (Fast 9000, 2 threads)" in note for note in found.notes)


def test_of_batch_sizes_that_cover_as_much_the_newest_counts(records: Records) -> None:
    records.train()
    records.bench(latency=5.0, batch_size=64)
    records.bench(latency=1.0, batch_size=8)
    records.bench(latency=6.0, batch_size=64)
    assert tables.comparison(records.table)[0].table.iloc[0][["latency_ms", "latency_batch_size"]].tolist() == [6.0, 64]


def test_warnings_of_runs_and_mixed_machines_are_notes(records: Records) -> None:
    records.train("softmax", warnings=["a copy of the data"])
    records.train("linear", hardware_cpu="Slow 1", commit="def")
    notes = "\n".join(tables.comparison(records.table)[0].notes)
    assert "softmax: a copy of the data" in notes
    assert "several machines" in notes
    assert "abc, def" in notes


def test_no_records_no_tables() -> None:
    assert tables.comparison(pd.DataFrame()) == []


def test_compiled_and_eager_latencies_never_share_a_table(records: Records) -> None:
    for name in ("softmax", "linear"):
        records.train(name)
        records.bench(name, 1.0)
    records.bench("softmax", 0.5, execution="compiled")
    (found,) = tables.comparison(records.table)
    assert found.table["latency_ms"].tolist() == [1.0, 1.0]
    assert any("fp32, eager, on cpu" in note for note in found.notes)


def test_bold_cells_are_bold_in_latex_too() -> None:
    text = tables.to_latex(pd.DataFrame({"Mechanism": ["a_b"], "N = 64": ["**1.5**"]}))
    assert r"a\_b & \textbf{1.5} \\" in text


def test_numbers_have_sensible_digits_and_units(records: Records) -> None:
    records.train(seed=0, top1=91.0)
    records.train(seed=1, top1=92.0)
    text = tables.formatted(tables.comparison(records.table)[0].table).iloc[0]
    assert text["Top-1 (%)"] == "91.5 ± 0.7"
    assert text["Params (k)"] == "25.4"
    assert text["MACs (M)"] == "1.95"
    assert text["Train img/s"] == "2000"
    assert text["Latency (ms)"] == tables.MISSING


def test_markdown_has_no_deviation_for_one_seed_and_no_broken_cell(records: Records) -> None:
    records.train(top1=91.11)
    table = tables.comparison(records.table)[0].table.assign(attention="my|file.py")
    head, line, row = tables.to_markdown(table).splitlines()
    assert "±" not in row
    assert "91.1" in row
    assert "my\\|file.py" in row
    assert row.replace("\\|", "").count("|") == head.count("|") == line.count("|")


def test_csv_has_raw_numbers(records: Records) -> None:
    records.train(seed=0, top1=91.123456)
    records.train(seed=1, top1=92.0)
    found = tables.comparison(records.table)[0].table
    again = pd.read_csv(io.StringIO(tables.to_csv(found)))
    assert again.columns.tolist() == found.columns.tolist()
    assert again["top1_pct"][0] == pytest.approx((91.123456 + 92) / 2, abs=1e-12)


def test_latex_is_escaped(records: Records) -> None:
    records.train("performer:num_features=64", 0, 91.0)
    records.train("performer:num_features=64", 1, 92.0)
    text = tables.to_latex(tables.comparison(records.table)[0].table, "a_title")
    assert r"performer:num\_features=64 & 2 & 91.5 $\pm$ 0.7" in text
    assert text.count(" & ") == 2 * 14
    assert text.isascii()


def test_terminal_table_fits_in_100_columns(records: Records) -> None:
    for seed in range(3):
        records.train("performer:num_features=64", seed, 90.0 + seed)
    records.bench("performer:num_features=64", 12.3)
    found = tables.comparison(records.table)[0]
    text = _printed(tables.to_rich(found.table, "[title]", found.notes))
    assert "91.0 ± 1.0" in text
    assert "12.3" in text
    assert "[title]" in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_narrow_terminal_keeps_the_mechanisms(records: Records) -> None:
    records.train(attention="performer:num_features=64")
    (found,) = tables.comparison(records.table)
    text = _printed(tables.to_rich(found.table, found.title, (), width=80), width=80)
    assert "performer:num_" in text
    assert "90.0" in text


def _printed(table: Any, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]
