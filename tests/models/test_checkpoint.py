"""Checkpoints: what is written comes back; what does not fit is an error."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vitcmp import attention
from vitcmp.configs import RuntimeConfig, UserError, resolve_run
from vitcmp.data.datasets import load_data
from vitcmp.models.checkpoint import RunInfo, load_info, load_run, load_weights, save_weights
from vitcmp.models.vit import ViT
from vitcmp.workflows.train import run


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ViT, RunInfo]:
    config = resolve_run({"attention": "performer:num_features=12"})
    model = ViT(config.model, seed=4).eval()
    info = RunInfo.of("run-1", RuntimeConfig(), "0123456789abcdef", config, load_data("digits"))
    folder = tmp_path / "runs" / "run-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(info)))
    save_weights(folder / "model.safetensors", model, info)
    return folder / "model.safetensors", model, info


def test_round_trip(saved: tuple[Path, ViT, RunInfo]) -> None:
    path, model, info = saved
    other, read = load_weights(path)
    assert read == info
    assert read.run_config.flat() == info.config
    assert read.label == "performer:num_features=12"
    assert not other.training
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(other(images), model(images))
    assert {p.name for p in path.parent.iterdir()} == {"config.json", "model.safetensors"}


def test_a_run_is_found_by_id_prefix_folder_or_file(saved: tuple[Path, ViT, RunInfo], tmp_path: Path) -> None:
    path, model, info = saved
    for name in ("run-1", "run", str(path.parent), str(path)):
        run = load_run(name, results=tmp_path)
        assert run.info == info
        assert run.folder == path.parent
        assert torch.equal(run.model.head.weight, model.head.weight)


def test_a_damaged_file_is_an_error(saved: tuple[Path, ViT, RunInfo]) -> None:
    path = saved[0]
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04 something else", whole[:100], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_weights(path)


def test_a_foreign_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"vitcmp": "{}"}, {"vitcmp": "no json"}, {"vitcmp": "[1]"}):
        save_file({"weight": torch.zeros(2)}, path, metadata)
        with pytest.raises(UserError, match="was not written by this version of vitcmp"):
            load_weights(path)


def test_weights_of_another_shape_are_an_error(saved: tuple[Path, ViT, RunInfo]) -> None:
    path, _, info = saved
    state = load_file(path)
    metadata = {"vitcmp": json.dumps(asdict(replace(info, config={**info.config, "dim": 64})))}
    save_file(state, path, metadata)
    with pytest.raises(UserError, match="does not fit the model that it describes"):
        load_weights(path)


def test_an_unknown_mechanism_in_a_file_is_an_error(saved: tuple[Path, ViT, RunInfo]) -> None:
    path, _, info = saved
    metadata = {"vitcmp": json.dumps(asdict(replace(info, config={**info.config, "attention": "gone"})))}
    save_file(load_file(path), path, metadata)
    with pytest.raises(UserError, match="unknown attention 'gone'"):
        load_weights(path)


def test_the_file_says_what_it_is(saved: tuple[Path, ViT, RunInfo]) -> None:
    with safe_open(saved[0], "pt") as file:
        metadata = json.loads(file.metadata()["vitcmp"])
    assert metadata["config"]["dataset"] == "digits"
    assert metadata["class_names"] == [str(i) for i in range(10)]


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"class_names": 3}'])
def test_a_damaged_config_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
        load_info(tmp_path)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load_run(str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="no run 'none'"):
        load_run("none", results=tmp_path)
    (tmp_path / "runs" / "started").mkdir(parents=True)
    (tmp_path / "runs" / "started" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no model\.safetensors yet; finish it with `vitcmp train --resume started`"):
        load_run("started", results=tmp_path)


def test_a_run_is_not_read_with_another_version_of_its_mechanism(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    source = Path(attention.__file__).with_name("sigmoid.py").read_text()
    file.write_text(source)
    settings = dict(attention=str(file), dataset="digits", epochs=1)
    record = run(resolve_run(settings), RuntimeConfig(results=str(tmp_path / "results"), threads=1))
    assert load_run(record.id, tmp_path / "results").info.mechanisms == {str(file): attention.load(str(file)).digest}
    file.write_text(source + "\n# edited\n")
    with pytest.raises(UserError, match=r"mine\.py has changed since"):
        load_run(record.id, tmp_path / "results")
    file.unlink()
    with pytest.raises(UserError, match="looked for where it was"):
        load_run(record.id, tmp_path / "results")
