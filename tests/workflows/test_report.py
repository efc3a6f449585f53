"""The report of a store: which files it writes, and that nothing in the store is lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest

from vitcmp import store
from vitcmp.configs import UserError, resolve_run
from vitcmp.workflows import report

HARDWARE = {"device": "cpu", "cpu": "Fast 9000", "threads": 2}


def add(results: Path, kind: str, config: dict[str, Any], status: str = "ok", **fields: Any) -> None:
    record = store.new_record(
        kind=kind, status=status, key=str(sorted(map(str, config.items()))), config=config, hardware=HARDWARE,
        versions={"torch": "9.9"}, commit="abc123", **fields,
    )  # fmt: skip
    store.append(results, record)


def add_run(
    results: Path, attention: str, seed: int = 0, status: str = "ok", log: bool = True, **settings: Any
) -> None:
    config = resolve_run({"dataset": "digits", "attention": attention, "seed": seed, **settings}).flat()
    name = f"{attention}-{seed}-{config['epochs']}"
    metrics = {"top1_pct": 90.0 + seed + len(attention) / 10, "top5_pct": 99.0, "macs_g": len(attention) / 1000,
               "precision_used": "fp32"}  # fmt: skip
    error = None if status == "ok" else "the <loss> is nan"
    add(results, "train", config, status, id=name, metrics=metrics, error=error)
    if log:
        (results / "runs" / name).mkdir(parents=True)
        for epoch in (1, 2):
            line = {"epoch": epoch, "train_loss": 1 / epoch, "validation_top1_pct": 90.0, "train_seconds": 1.0}
            store.append_log(results / "runs" / name, line)


def add_bench(results: Path, attention: str, side: int, status: str = "ok") -> None:
    config = resolve_run({"dataset": "digits", "attention": attention, "image_size": side}).flat()
    config |= {"patch_size": 1, "level": "model", "mode": "forward", "tokens": side**2, "batch_size": 8,
               "precision": "fp32"}  # fmt: skip
    measured = {"latency_ms": side / len(attention), "latency_iqr_ms": 0.1, "peak_memory_mib": 1.0 * side}
    measured["latency_samples_ms"] = [measured["latency_ms"]] * 3  # type: ignore[assignment]
    add(results, "bench", config, status, metrics=measured if status == "ok" else {})


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """Two mechanisms, two seeds, a failure, a second set of conditions and bench records."""
    results = tmp_path / "results"
    for attention in ("softmax", "linear"):
        for seed in (0, 1):
            add_run(results, attention, seed)
        add_bench(results, attention, 8)
        add_bench(results, attention, 16, status="oom" if attention == "softmax" else "ok")
    add_run(results, "entmax", status="diverged", log=False)
    add_run(results, "softmax", epochs=2, log=False)
    return results


def test_files_of_a_full_store(full: Path) -> None:
    found = report.run(str(full))
    names = {path.name for path in found.paths}
    assert names == {path.name for path in (full / "report").iterdir()} == {
        "report.md", "table.csv", "table-2.csv", "scaling.csv", "accuracy-vs-latency.png", "accuracy-vs-macs.png",
        "learning-curves.png", "epoch-seconds.png", "latency-vs-tokens.png", "memory-vs-tokens.png",
    }  # fmt: skip
    assert [len(c.table) for c in found.comparisons] == [2, 1]
    assert pd.read_csv(full / "report" / "table.csv")["seeds"].tolist() == [2, 2]
    assert pd.read_csv(full / "report" / "scaling.csv")["status"].tolist().count("oom") == 1


def test_markdown_links_what_exists_and_says_what_failed(full: Path) -> None:
    report.run(str(full))
    text = (full / "report" / "report.md").read_text()
    for path in (full / "report").glob("*.png"):
        assert f"]({path.name})" in text
    assert "10 records (4 bench, 6 train)" in text
    assert "cpu (Fast 9000, 2 threads)" in text
    assert "torch 9.9" in text
    assert "commit: abc123" in text
    assert "entmax, seed 0: diverged: the &lt;loss&gt; is nan" in text
    assert ["softmax", "**1.14**", "oom"] in [line.replace("|", " ").split() for line in text.splitlines()]


def test_every_format_and_a_page_that_needs_no_other_file(full: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    found = report.run(str(full), out, ["all"])
    assert {path.suffix for path in found.paths} == {".md", ".csv", ".tex", ".html", ".png"}
    assert all(path.parent == out for path in found.paths)
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 6
    assert "http" not in page
    assert "the &lt;loss&gt; is nan" in page
    assert r"\toprule" in (out / "table.tex").read_text()
    assert not (full / "report").exists()


def test_a_second_report_replaces_the_first(full: Path) -> None:
    report.run(str(full))
    before = (full / "report" / "learning-curves.png").read_bytes()
    report.run(str(full))
    assert (full / "report" / "learning-curves.png").read_bytes() == before


def test_bench_records_alone_are_a_report(tmp_path: Path) -> None:
    add_bench(tmp_path, "softmax", 8)
    found = report.run(str(tmp_path))
    assert found.comparisons == []
    assert {path.name for path in found.paths} == {"report.md", "scaling.csv"}


def add_measured(results: Path, attention: str, tokens: int, batch_size: int, latency: float, **metrics: Any) -> None:
    """A bench record with all that `vitcmp bench` may measure."""
    config = resolve_run({"dataset": "digits", "attention": attention}).flat()
    config |= {"level": "core", "mode": "backward", "tokens": tokens, "batch_size": batch_size, "precision": "fp32",
               "execution": "eager"}  # fmt: skip
    metrics = {
        "latency_ms": latency, "latency_low_ms": 0.9 * latency, "latency_high_ms": 1.1 * latency, "group": str(tokens),
        "latency_samples_ms": [latency * (1 + i / 100) for i in range(9)], "noise_floor_pct": 0.5,
        "peak_memory_mib": tokens / 4, "inference_memory_mib": tokens / 16, "activation_memory_mib": tokens / 8,
        "macs_g": 1.0, "counted_macs_g": 1.0, "ptflops_macs_g": 0.5, "intensity_flop_byte": 3.0, "peak_gflop_s": 100.0,
        "copy_gb_s": 10.0, "achieved_gflop_s": 20.0, "fraction_of_peak": 0.2, **metrics,
    }  # fmt: skip
    add(results, "bench", config, metrics={**metrics, "macs_note": "ptflops finds 50.0 % less: it does not see <ops>"})


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Softmax and something linear that approximates it, over tokens and batch sizes."""
    results = tmp_path / "results"
    for batch_size in (1, 8):
        for tokens in (64, 256, 1024):
            add_measured(results, "softmax", tokens, batch_size, batch_size * tokens**2 / 1e5)
            add_measured(results, "performer", tokens, batch_size, batch_size * tokens / 1e3, output_error=0.3,
                         map_error=0.4, uniform_error=0.9, error_target="softmax", error_on="random q, k")  # fmt: skip
    return results


def test_all_that_bench_measures_is_shown(measured: Path) -> None:
    found = report.run(str(measured), formats=["all"])
    tables = {"scaling", "growth", "winners", "macs", "roofline", "approximation"}
    pictures = {"latency-vs-tokens", "memory-vs-tokens", "activations-vs-tokens", "winners", "roofline",
                "latency-vs-error"}  # fmt: skip
    names = {path.name for path in found.paths}
    assert names == {"report.md", "report.html"} | {f"{name}.{end}" for name in tables for end in ("csv", "tex")} | {
        f"{name}.png" for name in pictures
    }
    text = (measured / "report" / "report.md").read_text()
    for line in (
        "## Growth and crossovers", "Held for the backward pass (MiB): attention core, backward, batch 8, fp32",
        "ptflops departs (it does not see &lt;ops&gt;): performer by -50 % at every N; softmax by -50 % at every N.",
        "Copies of one mechanism differed by up to 0.5 %", "Measured on random q, k.",
    ):  # fmt: skip
        assert line in text
    rows = [line.replace("|", " ").split() for line in text.splitlines()]
    assert ["softmax", "**0.328**", "5.24", "83.9"] in rows
    assert ["performer", "0.512", "**2.05**", "**8.19**"] in rows
    assert ["8", "softmax", "(by", "56", "%)", "performer", "(by", "156", "%)"] in [row[:9] for row in rows]


def test_bold_is_bold_in_every_format_and_a_column_of_the_numbers(measured: Path) -> None:
    report.run(str(measured), formats=["all"])
    folder = measured / "report"
    assert "<b>8.19</b>" in (folder / "report.html").read_text()
    assert "**" not in (folder / "report.html").read_text()
    assert r"\textbf{8.19}" in (folder / "scaling.tex").read_text()
    table = pd.read_csv(folder / "scaling.csv")
    assert table[table["tokens"] == 1024]["tied_with_quickest"].tolist() == [True, False, True, False]
    assert table["latency_ms"].dtype == float
    assert "latency_samples_ms" not in table


def test_many_panels_of_errors_are_cut_to_the_largest_tokens(measured: Path) -> None:
    for batch_size in (2, 4, 16):
        for tokens in (64, 256, 1024):
            add_measured(measured, "performer", tokens, batch_size, 1.0, output_error=0.3)
    report.run(str(measured))
    picture = matplotlib.image.imread(measured / "report" / "latency-vs-error.png")
    # Five sets of conditions, two a row, in place of fifteen panels.
    assert picture.shape[0] == 3 * 555


def test_runs_whose_folder_is_gone_have_a_table_and_no_curves(tmp_path: Path) -> None:
    add_run(tmp_path, "softmax", log=False)
    assert {path.name for path in report.run(str(tmp_path)).paths} == {"report.md", "table.csv"}


def test_lines_that_could_not_be_read_are_in_the_report(tmp_path: Path) -> None:
    add_run(tmp_path, "softmax")
    with next((tmp_path / "records").glob("*.jsonl")).open("a") as file:
        file.write('{"torn')
    with (tmp_path / "runs" / "softmax-0-20" / "log.jsonl").open("a") as file:
        file.write('{"torn')
    found = report.run(str(tmp_path), formats=["md", "html"])
    assert ["line 2: a torn line" in found.notes[0], "log.jsonl has a torn line" in found.notes[1]] == [True, True]
    for name in ("report.md", "report.html"):
        assert found.notes[0] in (tmp_path / "report" / name).read_text()


def test_an_empty_store_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vitcmp train"):
        report.run(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_an_error(full: Path) -> None:
    with pytest.raises(UserError, match="available: md, csv, tex, html, all"):
        report.run(str(full), formats=["pdf"])


def test_a_folder_that_cannot_be_written_is_an_error(full: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        report.run(str(full), tmp_path / "file" / "report")
