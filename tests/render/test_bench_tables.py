"""Tables of bench records: what shares a table, what is a tie, and the numbers that are read off."""

from __future__ import annotations

import io
import math

import pandas as pd
import pytest
from bench_records import Bench, study

from vitcmp.render import bench_tables, tables


def parts_of(bench: Bench) -> dict[str, pd.DataFrame]:
    return dict(bench_tables.by_conditions(bench_tables.scaling(bench.table)))


def quickest(bench: Bench) -> list[str]:
    table = bench_tables.scaling(bench.table)
    return table[table["tied_with_quickest"]]["attention"].tolist()


def test_no_records_no_table() -> None:
    table = bench_tables.scaling(pd.DataFrame())
    assert table.empty
    assert "tied_with_quickest" in table


def test_the_newest_counts_and_a_cell_without_a_number_shows_its_status() -> None:
    bench = Bench()
    bench.cell("softmax", 9.0)
    bench.cell("softmax", latency_ms=2.0, latency_samples_ms=[1.0, 2.0, 3.0])
    bench.cell("softmax", tokens=256, status="oom")
    bench.cell("softmax", 7.0, batch_size=1)
    bench.cell("softmax", 8.0, dim=64)
    table = bench_tables.scaling(bench.table)
    assert len(table) == 4
    parts = parts_of(bench)
    assert len(parts) == 3
    part = next(part for part in parts.values() if len(part) == 2)
    assert part["status"].tolist() == ["ok", "oom"]
    assert part[["latency_low_ms", "latency_high_ms"]].iloc[0].tolist() == [1.0, 3.0]
    assert bench_tables.pivot(part, "latency_ms").to_dict("records") == [
        {"Mechanism": "softmax", "N = 64": "2.00", "N = 256": "oom"}
    ]


def test_what_the_record_says_of_its_interval_counts() -> None:
    bench = Bench()
    bench.cell("softmax", 2.0, latency_low_ms=1.9, latency_high_ms=2.1)
    row = bench_tables.scaling(bench.table).iloc[0]
    assert (row["latency_low_ms"], row["latency_high_ms"]) == (1.9, 2.1)


def test_titles_name_the_level_and_what_differs() -> None:
    bench = Bench()
    bench.cell("softmax", 1.0)
    bench.cell("softmax", 1.0, level="core", execution="compiled")
    bench.cell("softmax", 1.0, level="model", precision="auto", precision_used="bf16")
    bench.cell("softmax", 1.0, level="block", dim=64)
    bench.cell("softmax", 1.0, level="block")
    assert set(parts_of(bench)) == {
        "attention with projections, forward, batch 8, fp32",
        "attention core, forward, batch 8, fp32, compiled",
        "whole model, forward, batch 8, bf16",
        "block, forward, batch 8, fp32, dim 64, num_heads 4, mlp_dim 192",
        "block, forward, batch 8, fp32, dim 48, num_heads 4, mlp_dim 192",
    }


def test_a_record_older_than_execution_was_eager() -> None:
    bench = Bench()
    bench.cell("softmax", 1.0, execution=None)
    bench.cell("linear", 2.0)
    assert list(parts_of(bench)) == ["attention with projections, forward, batch 8, fp32"]


def test_in_the_same_rounds_two_percent_are_told_apart_and_copies_are_not() -> None:
    bench = Bench()
    for name, latency in (("softmax", 1.0), ("copy.py", 1.0), ("linear", 1.02)):
        bench.cell(name, latency, group="a", noise_floor_pct=0.1)
    assert quickest(bench) == ["copy.py", "softmax"]


def test_in_other_rounds_their_noise_makes_a_tie_of_two_percent() -> None:
    bench = Bench()
    bench.cell("softmax", 1.0, group="a")
    bench.cell("linear", 1.02, group="b")
    bench.cell("entmax", 2.0, group="b")
    assert quickest(bench) == ["linear", "softmax"]


def test_what_lies_within_the_noise_floor_is_a_tie() -> None:
    bench = Bench()
    bench.cell("softmax", 1.0, group="a", noise_floor_pct=3.0)
    bench.cell("linear", 1.02, group="a", noise_floor_pct=3.0)
    assert quickest(bench) == ["linear", "softmax"]


def test_the_control_is_never_the_quickest() -> None:
    bench = Bench()
    bench.cell("uniform", 0.1)
    bench.cell("softmax", 1.0)
    assert quickest(bench) == ["softmax"]


def test_the_quickest_are_bold_where_there_was_a_choice() -> None:
    bench = Bench()
    bench.cell("softmax", latency_ms=1.0)
    bench.cell("linear", latency_ms=2.0)
    bench.cell("linear", latency_ms=3.0, tokens=256)
    (part,) = parts_of(bench).values()
    assert bench_tables.pivot(part, "latency_ms").to_dict("records") == [
        {"Mechanism": "linear", "N = 64": "2.00", "N = 256": "3.00"},
        {"Mechanism": "softmax", "N = 64": "**1.00**", "N = 256": tables.MISSING},
    ]


def test_exponents_and_crossovers_of_known_laws() -> None:
    (_, rows), _ = bench_tables.growth(bench_tables.scaling(study().table))
    found = {row["attention"]: row for row in rows}
    performer, softmax = found["performer:num_features=64"], found["softmax"]
    assert performer["latency"].value == pytest.approx(1, abs=0.01)
    # Three sizes of 1,024 and more are too few for an interval: the four largest count.
    assert performer["latency"].sizes == (256, 1024, 2048, 4096)
    assert softmax["latency"].value == pytest.approx(2, abs=0.01)
    assert softmax["memory"].value == pytest.approx(1)
    assert found["softmax:impl=naive"]["memory"].sizes == (256, 1024, 2048)
    assert found["softmax:impl=naive"]["memory"].value == pytest.approx(2)
    assert performer["crossover"].tokens == pytest.approx(1500, rel=0.01)
    assert softmax["crossover"] is found["softmax:impl=naive"]["crossover"] is None
    text = bench_tables.growth_text(rows).set_index("Mechanism")
    assert text.columns.tolist() == [
        "Latency ~ N^p, N ≥ 256", "Memory ~ N^p, N ≥ 256", "Quicker than softmax from N"
    ]  # fmt: skip
    assert text.loc["softmax:impl=naive"].iloc[1] == "2.00"
    assert text.loc["softmax"].iloc[1] == "1.00 (1.00 to 1.00)"
    assert text.loc["softmax"].iloc[2] == tables.MISSING
    assert text.loc["uniform"].iloc[2] == "from 256 or below"


def test_growth_needs_three_token_counts() -> None:
    bench = Bench()
    for n in (64, 128):
        bench.cell("softmax", 1.0, tokens=n)
    assert bench_tables.growth(bench_tables.scaling(bench.table)) == []
    bench.cell("softmax", 1.0, tokens=256)
    ((_, rows),) = bench_tables.growth(bench_tables.scaling(bench.table))
    assert "Latency ~ N^p, N ≥ 64" in bench_tables.growth_text(rows)
    for n in (1024, 2048, 4096, 8192):
        bench.cell("softmax", 1.0, tokens=n)
    ((_, rows),) = bench_tables.growth(bench_tables.scaling(bench.table))
    assert rows[0]["latency"].sizes == (1024, 2048, 4096, 8192)


def test_growth_as_csv_is_numbers() -> None:
    found = bench_tables.growth(bench_tables.scaling(study().table))
    table = pd.read_csv(io.StringIO(tables.to_csv(bench_tables.growth_numbers(found))))
    row = table[table["attention"] == "performer:num_features=64"].iloc[0]
    assert row["latency_exponent_low"] <= row["latency_exponent"] <= row["latency_exponent_high"]
    assert row["crossover_low"] <= row["crossover_tokens"] <= row["crossover_high"]
    assert row["latency_sizes"] == "256 1024 2048 4096"


def test_winners_over_tokens_and_batch() -> None:
    ((title, part),) = bench_tables.winners(bench_tables.scaling(study().table))
    assert title == "attention with projections, forward, fp32"
    assert len(part) == 8
    first, last = part.iloc[0], part.iloc[-1]
    assert (first["tokens"], first["batch_size"], first["attention"], first["tied"]) == (256, 1, "softmax", 1)
    assert first["lead_pct"] == pytest.approx(100, abs=2)
    assert (last["attention"], last["tokens"]) == ("performer:num_features=64", 4096)
    assert bench_tables.winners_text(part).iloc[0]["N = 256"] == "softmax (by 100 %)"


@pytest.mark.parametrize(
    ("lead", "tied", "text"), [(9.4, 1, "by 9 %"), (0.2, 3, "tie of 3"), (math.nan, 1, "alone"), (1900, 1, "20 times")]
)
def test_leads_in_words(lead: float, tied: int, text: str) -> None:
    assert bench_tables.lead_text(lead, tied) == text


def test_one_batch_size_has_no_winner_map() -> None:
    table = bench_tables.scaling(study().table)
    assert bench_tables.winners(table[table["batch_size"] == 8]) == []


def test_macs_stand_once_for_all_batches_and_departures_have_their_reason() -> None:
    ((title, part),) = bench_tables.macs(bench_tables.scaling(study().table))
    assert title == "attention with projections"
    assert len(part) == 3 * 4 + 3
    text = bench_tables.macs_text(part)
    assert text.columns.tolist() == ["Mechanism", "Tokens", "Closed form (G)", "Counted (G)", "ptflops (G)"]
    row = text[(text["Mechanism"] == "softmax") & (text["Tokens"] == "1024")].iloc[0]
    assert row.tolist()[2:] == ["1.02", "1.02", "**0.512**"]
    assert bench_tables.macs_notes(part) == [
        "ptflops departs (it does not see attention): softmax by -50 % at every N."
    ]


def test_departures_without_a_cause_and_counts_that_are_missing_are_told() -> None:
    bench = Bench()
    found = {"macs_g": 1.0, "counted_macs_g": 1.0, "ptflops_macs_g": 1.5}
    bench.cell("softmax", 1.0, **found, macs_note="ptflops finds 50.0 % more than the closed form: it counts biases")
    bench.cell("linear", 1.0, **found)
    bench.cell("xca", 1.0, **{**found, "ptflops_macs_g": None})
    bench.cell("mine.py", 1.0, macs_g=1.0, warnings=["MACs: aten.new is neither counted nor free"])
    ((_, part),) = bench_tables.macs(bench_tables.scaling(bench.table))
    assert bench_tables.macs_notes(part) == [
        "ptflops departs (a cause is not known): linear by +50 % at every N.",
        "ptflops departs (it counts biases): softmax by +50 % at every N.",
        "ptflops gave no count: xca.",
    ]
    notes = bench_tables.bench_notes(bench_tables.scaling(bench.table))
    assert notes == ["MACs: aten.new is neither counted nor free: mine.py at N = 64"]


def test_roofline_is_drawn_at_the_largest_common_tokens() -> None:
    bench = study()
    bench.cell("softmax", 1e3, tokens=8192, batch_size=8, intensity_flop_byte=5.0, achieved_gflop_s=20.0,
               peak_gflop_s=100.0, copy_gb_s=10.0)  # fmt: skip
    found = bench_tables.roofline(bench_tables.scaling(bench.table))
    assert [title[-8:] for title, _ in found] == ["N = 4096", "N = 4096"]
    row = bench_tables.roofline_text(found[0][1]).iloc[0]
    assert row.tolist() == ["performer:num_features=64", "5.00", "20.0", "0.200"]


def test_errors_stand_beside_the_latency_of_softmax() -> None:
    scaling = bench_tables.scaling(study().table)
    (_, part), _ = bench_tables.approximations(scaling)
    assert part["attention"].unique().tolist() == ["performer:num_features=64"]
    assert part["of_softmax_latency"].iloc[-1] == pytest.approx(1500 / 4096, rel=0.01)
    (title, text), (_, of_map) = bench_tables.errors_text(scaling)
    assert title == "Error of the output: attention with projections"
    assert text["Mechanism"].tolist() == ["performer:num_features=64", "plain mean, for softmax"]
    assert text["N = 256"].tolist() == ["0.400", "0.900"]
    assert of_map["N = 256"].tolist() == ["0.400"]


def test_notes_of_many_cells_stand_once() -> None:
    bench = Bench()
    bench.cell("softmax", 1.0, warnings=["known to +-3.1% only: give it longer"])
    bench.cell("softmax", 1.0, tokens=256, warnings=["known to +-12.5% only: give it longer"])
    bench.cell("linear", 1.0, warnings=["known to +-4.0% only: give it longer"])
    for drift in ("-37%", "+51%", "+12%"):
        bench.cell(f"{drift}.py", 1.0, warnings=[f"drifted by {drift}"])
    bench.cell("entmax", status="timeout", error="no answer in 120 s")
    bench.cell("local", status="oom")
    assert bench_tables.bench_notes(bench_tables.scaling(bench.table)) == [
        "drifted by -37% to +51%: +12%.py at N = 64; +51%.py at N = 64; -37%.py at N = 64",
        "timeout: no answer in 120 s: entmax at N = 64",
        "known to +-3.1% to +-12.5% only: give it longer: linear at N = 64; softmax at N = 64, 256",
        "oom: local at N = 64",
    ]
