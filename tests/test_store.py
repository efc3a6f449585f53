"""The results store: what is written is read, whatever dies beside it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitcmp import store
from vitcmp.configs import UserError


def make_record(**fields: Any) -> store.Record:
    defaults: dict[str, Any] = {
        "kind": "train", "status": "ok", "key": "k", "config": {"attention": "softmax", "lr": 1e-3},
        "hardware": {"device": "cpu"}, "versions": {"torch": "2"}, "metrics": {"top1_pct": 91.5},
    }  # fmt: skip
    return store.new_record(**{**defaults, **fields})


def records_file(results: Path) -> Path:
    (path,) = (results / "records").glob("*.jsonl")
    return path


def read_with_warnings(results: Path) -> tuple[list[store.Record], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = store.read(results)
    assert all(w.category is store.StoreWarning for w in caught)
    return records, [str(w.message) for w in caught]


def test_round_trip(tmp_path: Path) -> None:
    record = make_record(warnings=["a note"], error=None, commit="abc+", metrics={"x": 1, "text": "é\n"})
    store.append(tmp_path, record)
    assert store.read(tmp_path) == [record]
    assert len(records_file(tmp_path).read_bytes().splitlines()) == 1


def test_the_table_has_configs_and_metrics_under_their_names(tmp_path: Path) -> None:
    store.append(tmp_path, make_record(id="a"))
    store.append(tmp_path, make_record(id="b", status="oom", metrics={}, error="out of memory"))
    table = store.load(tmp_path).set_index("id")
    assert table.index.tolist() == ["a", "b"]
    assert table["top1_pct"].tolist() == pytest.approx([91.5, math.nan], nan_ok=True)
    assert table["status"].tolist() == ["ok", "oom"]
    columns = table[["attention", "hardware_device", "versions_torch"]]
    assert columns.to_numpy().tolist() == [["softmax", "cpu", "2"]] * 2
    assert len(store.load(tmp_path / "nothing")) == 0


def test_a_torn_last_line_is_skipped_and_the_next_append_works(tmp_path: Path) -> None:
    for name in "ab":
        store.append(tmp_path, make_record(id=name))
    path = records_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-25])
    records, messages = read_with_warnings(tmp_path)
    assert [r.id for r in records] == ["a"]
    assert messages == [f"{path.name}, line 2: a torn line; skipped"]
    store.append(tmp_path, make_record(id="c"))
    records, messages = read_with_warnings(tmp_path)
    assert {r.id for r in records} == {"a", "c"}
    assert len(messages) == 1


@pytest.mark.parametrize("damage", [b"garbage", b'{"id": ', b"\xff\xfe\x00", b"[]", b'{"schema_version": 99}'])
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, damage: bytes) -> None:
    for name in "abc":
        store.append(tmp_path, make_record(id=name))
    path = records_file(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2]]) + b"\n")
    records, messages = read_with_warnings(tmp_path)
    assert {r.id for r in records} == {"a", "c"}
    assert len(messages) == 1
    assert f"{path.name}, line 2" in messages[0]


def test_concurrent_appends_lose_nothing(tmp_path: Path) -> None:
    code = """
import sys
from vitcmp import store
for i in range(50):
    config = {"pad": "x" * 3000}
    store.append(sys.argv[1], store.new_record(
        id=f"{sys.argv[2]}-{i}", kind="bench", status="ok", key="k", config=config, hardware={}, versions={}))
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(4)]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    records, messages = read_with_warnings(tmp_path)
    assert messages == []
    assert {r.id for r in records} == {f"{n}-{i}" for n in range(4) for i in range(50)}


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    metrics = {"nan": math.nan, "inf": -math.inf, "deep": [{"x": math.inf}, 1.5], "whole": 3}
    store.append(tmp_path, make_record(metrics=metrics))
    assert store.read(tmp_path)[0].metrics == {"nan": None, "inf": None, "deep": [{"x": None}, 1.5], "whole": 3}


@pytest.mark.parametrize("value", [np.float64("nan"), np.float32(2.5), np.int64(3), np.array([1.0])])
def test_what_is_no_plain_value_never_half_writes(tmp_path: Path, value: Any) -> None:
    """It is written as JSON, or refused with nothing written."""
    store.append(tmp_path, make_record(id="a"))
    try:
        store.append(tmp_path, make_record(id="b", metrics={"x": value}))
    except (TypeError, ValueError):
        assert [r.id for r in store.read(tmp_path)] == ["a"]
    else:
        assert store.read(tmp_path)[1].metrics["x"] == (None if value != value else value)


def test_records_refuse_unknown_fields() -> None:
    with pytest.raises(ValueError, match="extra"):
        make_record(colour="red")
    with pytest.raises(ValueError, match="status"):
        make_record(status="fine")


def test_merged_folders_count_a_record_once(tmp_path: Path) -> None:
    store.append(tmp_path, make_record(id="a"))
    path = records_file(tmp_path)
    (path.parent / "ffffffff.jsonl").write_bytes(path.read_bytes())
    assert [r.id for r in store.read(tmp_path)] == ["a"]


def test_records_come_oldest_first(tmp_path: Path) -> None:
    for name, time in (("b", "2026-01-02"), ("a", "2026-01-01"), ("c", "2026-01-03")):
        record = make_record(id=name)
        store.append(tmp_path, record.model_copy(update={"time": time}))
    assert [r.id for r in store.read(tmp_path)] == ["a", "b", "c"]


def make_run(results: Path, name: str) -> Path:
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_runs_are_found(tmp_path: Path) -> None:
    first, longer, other = (make_run(tmp_path, name) for name in ("digits-a", "digits-a-2", "mnist-b"))
    assert store.find_run(tmp_path, "digits-a") == first
    assert store.find_run(tmp_path, "digits-a-") == longer
    assert store.find_run(tmp_path, "mn") == other
    assert store.find_run(tmp_path / "elsewhere", str(other)) == other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "'digits' could be digits-a, digits-b; give more of the name"),
        ("cifar", "no run 'cifar' in .*vitcmp runs"),
        ("half", "no run 'half'"),
    ],
)
def test_runs_that_are_not_found(tmp_path: Path, name: str, message: str) -> None:
    make_run(tmp_path, "digits-a")
    make_run(tmp_path, "digits-b")
    (tmp_path / "runs" / "half").mkdir()  # without a config.json
    with pytest.raises(UserError, match=message):
        store.find_run(tmp_path, name)


def test_a_log_keeps_the_later_line_of_an_epoch(tmp_path: Path) -> None:
    for epoch, value in ((1, 10.0), (2, 20.0), (2, 25.0), (3, math.nan)):
        store.append_log(tmp_path, {"epoch": epoch, "validation_top1_pct": value})
    store.append_log(tmp_path, {"epoch": 4, "step": 1, "loss": 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 4, "valid')
    with pytest.warns(store.StoreWarning, match="torn line"):
        log = store.read_log(tmp_path)
    assert [(line["epoch"], line["validation_top1_pct"]) for line in log] == [(1, 10), (2, 25), (3, None)]
    assert store.read_log(tmp_path / "nothing") == []


def test_a_log_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "valid')
    store.append_log(tmp_path, {"epoch": 1, "validation_top1_pct": 10.0})
    with pytest.warns(store.StoreWarning, match="torn line"):
        assert [line["validation_top1_pct"] for line in store.read_log(tmp_path)] == [10]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    store.write_json(path, {"a": [1, math.nan]})
    assert json.loads(path.read_text()) == {"a": [1, None]}

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write_atomic(path, fail)
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_keys_tell_cells_apart() -> None:
    key = store.cell_key("train", {"lr": 1, "seed": 0}, "data")
    assert key == store.cell_key("train", {"seed": 0, "lr": 1}, "data")
    assert len(key) == 16
    others = [
        store.cell_key("train", {"lr": 1, "seed": 1}, "data"),
        store.cell_key("train", {"lr": 1, "seed": 0}, "other data"),
        store.cell_key("train", {"lr": 1, "seed": 0}, "data", "plug-in"),
    ]
    assert len({key, *others}) == 4
