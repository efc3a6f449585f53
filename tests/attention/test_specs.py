"""Specs: names with options, their canonical form, users' own files, and what an import costs."""

from __future__ import annotations

import hashlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vitcmp import attention
from vitcmp.attention import AttentionError
from vitcmp.configs import resolve_run
from vitcmp.data.datasets import load_data
from vitcmp.models.vit import build_model
from vitcmp.workflows.train import run_key

MINE = '''
"""Every token gets the mean of all."""

from dataclasses import dataclass

from torch import nn

from vitcmp.attention import MultiHead

FACTOR = 1.0


@dataclass(frozen=True)
class Config:
    factor: float = FACTOR
    """Times the mean."""


class Mean(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, q, k, v):
        return self.factor * v.mean(dim=-2, keepdim=True).expand_as(v)


def build(layer, config):
    return MultiHead(layer, core=Mean(config.factor))


def macs(layer, config):
    return 0
'''


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("softmax", "softmax"),
        (" softmax ", "softmax"),
        ("softmax:", "softmax"),
        ("softmax:impl=auto", "softmax"),
        ("softmax:impl=naive", "softmax:impl=naive"),
        ("entmax:alpha=1.50", "entmax"),
        ("entmax:alpha=2", "entmax:alpha=2.0"),
        ("performer:redraw_interval=5,num_features=64", "performer:num_features=64,redraw_interval=5"),
        ("performer:num-features=64, kernel = relu", "performer:kernel=relu,num_features=64"),
        ("performer:num_features=auto,kernel=softmax", "performer"),
    ],
)
def test_equal_things_have_equal_names(spec: str, canonical: str) -> None:
    assert attention.canonical(spec) == canonical
    assert attention.canonical(canonical) == canonical


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sofmax", "unknown attention 'sofmax'; did you mean 'softmax'"),
        ("", "unknown attention ''; available: "),
        ("performer:num_feature=3", "did you mean 'num_features'"),
        ("linear:zzz=3", "linear has no option 'zzz'; available: eps"),
        ("performer,linear", "unknown attention 'performer,linear'"),
        ("performer:num_features=4,linear", "repeat --attention"),
        ("performer:num_features=many", "num_features=many must be"),
        ("performer:num_features=2.5", "num_features=2.5 must be"),
        ("softmax:impl=quick", "impl=quick must be"),
        ("entmax:alpha=", "alpha= must be"),
        ("nowhere/mine.py", "no mechanism file 'nowhere/mine.py'"),
    ],
)
def test_errors_name_the_remedy(spec: str, message: str) -> None:
    with pytest.raises(AttentionError) as caught:
        attention.load(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mechanism_knows_its_facts() -> None:
    performer = attention.load("performer")
    assert performer.approximates == "softmax"
    assert performer.paper == "https://arxiv.org/abs/2009.14794"
    assert performer.summary.startswith("Performer")
    assert performer.digest is None
    assert attention.load("softmax").approximates is None


@pytest.mark.parametrize("name", attention.available(own=True))
def test_each_file_names_its_paper_and_cost(name: str) -> None:
    mechanism = attention.load(name)
    assert mechanism.paper.startswith("https://")
    assert re.fullmatch(r"O\(.*N.*\)", mechanism.cost)
    assert mechanism.summary.endswith(".")


def test_a_file_of_the_users_own_is_a_mechanism(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    model = build_model("tiny", image_size=8, channels=1, attention=f"{path}:factor=2").eval()
    logits, maps = model(torch.randn(2, 1, 8, 8), return_maps=True)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(maps[0], torch.full((2, 4, 64, 64), 2 / 64))
    assert attention.canonical(f"{path}:factor=1") == str(path)


def test_another_version_of_the_file_is_another_mechanism(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    before = attention.load(str(path))
    digest = before.digest
    assert digest is not None
    assert attention.load(str(path)).module is before.module
    path.write_text(MINE.replace("FACTOR = 1.0", "FACTOR = 3.0"))
    after = attention.load(str(path))
    assert after.digest != digest
    assert after.config.factor == 3.0


def test_a_file_without_the_contract_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text("class Config: pass\n")
    for _ in range(2):
        with pytest.raises(AttentionError, match="lacks build, macs"):
            attention.load(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("class Config: pass", "put @dataclass"),
        ("from dataclasses import dataclass\n@dataclass\nclass Config:\n    size: int", "'size' needs a default"),
    ],
)
def test_options_are_a_dataclass_with_defaults(tmp_path: Path, config: str, message: str) -> None:
    path = tmp_path / "odd.py"
    path.write_text(f"{config}\ndef build(layer, config): ...\ndef macs(layer, config): ...\n")
    with pytest.raises(AttentionError, match=message):
        attention.load(str(path))


Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a package with a mechanism where Python finds it; returns its file."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(package: str, name: str, text: str = MINE) -> Path:
        information = tmp_path / f"{package}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[vitcmp.attention]\n{name} = {package}_attention\n")
        (tmp_path / f"{package}_attention.py").write_text(text)
        importlib.invalidate_caches()
        attention._installed.cache_clear()
        return tmp_path / f"{package}_attention.py"

    yield put
    for module in [name for name in sys.modules if name.endswith("_attention")]:
        del sys.modules[module]
    attention._installed.cache_clear()


def test_a_package_offers_a_mechanism(install: Install) -> None:
    path = install("means", "mean_of_all")
    assert "mean-of-all" in attention.available()
    assert "mean-of-all" not in attention.available(own=True)
    mechanism = attention.load("mean_of_all:factor=2")
    assert mechanism.spec == "mean-of-all:factor=2.0"
    before = mechanism.digest
    assert before == hashlib.sha256(MINE.encode()).hexdigest()
    path.write_text(MINE + "\n")
    assert mechanism.digest != before
    model = build_model("tiny", image_size=8, channels=1, attention="mean-of-all").eval()
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_its_file_is_part_of_the_key_of_records(install: Install) -> None:
    path = install("means", "mean")
    run = resolve_run({"attention": "softmax,1=mean"})
    data = load_data(run.data)
    before = run_key(run, data)
    assert run_key(run, data) == before
    path.write_text(MINE + "\n")
    assert run_key(run, data) != before


def test_own_names_win_and_say_so(install: Install) -> None:
    install("other", "linear")
    with pytest.warns(UserWarning, match="'linear' of the package other is not used: vitcmp has one of that name"):
        assert attention.load("linear").module.__name__ == "vitcmp.attention.linear"


def test_of_two_packages_one_wins_and_says_so(install: Install) -> None:
    install("first", "mean")
    install("second", "mean")
    with pytest.warns(UserWarning, match="'mean' of the package (first|second) is not used: the package"):
        attention.load("mean")


@pytest.mark.parametrize(
    ("text", "message"),
    [("import nowhere_to_be_found", "cannot import .* of the package broken .*; uninstall it"), ("", "lacks Config")],
)
def test_a_package_that_is_broken_is_named(install: Install, text: str, message: str) -> None:
    install("broken", "torn", text)
    with pytest.raises(AttentionError, match=message):
        attention.load("torn")


def test_names_cost_no_torch() -> None:
    code = """
import sys
import vitcmp
from vitcmp import attention
assert "softmax" in attention.available()
loaded = [name for name in ("torch", "pandas", "numpy", "pydantic") if name in sys.modules]
assert not loaded, loaded
try:
    attention.load("sofmax")
except attention.AttentionError:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("spec", ["softmax,linear", "softmax,1-", "1-=performer"])
def test_a_mixed_spec_with_a_mistake_says_how_to_write_one(spec: str) -> None:
    with pytest.raises(AttentionError, match="write softmax,1-=performer"):
        attention.load(spec)


def test_one_file_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    assert attention.canonical("./mine.py:factor=2") == attention.canonical("mine.py:factor=2") == "mine.py:factor=2.0"
