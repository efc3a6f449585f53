"""A new mechanism is one file: it trains, is measured, checked, drawn and reported like vitcmp's own."""

import json
import sys
from pathlib import Path

import pytest

from vitcmp import cli, store

MEAN_AND_SELF = '''"""Every token keeps a share of itself and gets the mean of all.

    out_i = share v_i + (1 - share) mean_j v_j
"""

from dataclasses import dataclass

from torch import nn

from vitcmp.attention import MultiHead

PAPER = "https://example.org/mean"
COST = "O(N K)"
ROW_STOCHASTIC = True
NUM_PROJECTIONS = 2  # of the values, and of the result


@dataclass(frozen=True)
class Config:
    share: float = 0.5
    """Of the token itself, 0 to 1."""


class MeanAndSelf(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, q, k, v):
        return self.share * v + (1 - self.share) * v.mean(dim=-2, keepdim=True)


class Values(MultiHead):
    """Without queries and keys, whose gradients would be zero."""

    def __init__(self, layer, share):
        super().__init__(layer, MeanAndSelf(share), merged=False)
        del self.q, self.k

    def forward(self, x):
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.out(self.core(v, v, v).transpose(1, 2).flatten(2))


def build(layer, config):
    return Values(layer, config.share)


def macs(layer, config):
    return 0
'''


def vitcmp(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command prints; it must end well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vitcmp", "--results", "results", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 0, printed
    return printed.out


def test_a_new_mechanism_is_one_file(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mean.py").write_text(MEAN_AND_SELF)
    spec = "mean.py:share=0.25"

    (checked,) = json.loads(vitcmp(capsys, "--json", "check", spec))
    assert checked["holds"], checked
    (shown,) = json.loads(vitcmp(capsys, "--json", "list", spec))
    assert shown["options"]["share"] == {"default": 0.5, "value": 0.25, "help": "Of the token itself, 0 to 1."}

    vitcmp(capsys, "train", "--attention", spec, "--attention", "linear", "--epochs", "1", "--train-samples", "256")
    vitcmp(capsys, "bench", "--attention", spec, "--attention", "linear", "--tokens", "16,64", "--rounds", "2",
           "--no-memory")  # fmt: skip
    records = [r for r in store.read("results") if r.config["attention"] == spec]
    assert [(r.kind, r.status) for r in records] == [("train", "ok"), ("bench", "ok"), ("bench", "ok")]
    run = records[0].id

    vitcmp(capsys, "visualize", run, "--what", "maps,rollout,profiles", "--out", "figures")
    assert {p.name for p in Path("figures").iterdir()} == {
        f"{run}-maps.png", f"{run}-views.png", f"{run}-profiles.png",
    }  # fmt: skip

    vitcmp(capsys, "report", "--format", "md,csv")
    report = Path("results/report/report.md").read_text()
    assert any(line.startswith(f"| {spec} ") for line in report.splitlines())
    assert spec in Path("results/report/table.csv").read_text()
    assert Path("results/report/latency-vs-tokens.png").is_file()
