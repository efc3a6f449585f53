import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcmp import store
from vitcmp.configs import RuntimeConfig, UserError, resolve_run
from vitcmp.data.datasets import load_data
from vitcmp.models.checkpoint import RunInfo, load_run, load_weights, save_weights
from vitcmp.models.vit import ViT
from vitcmp.workflows import visualize

NO_MAP = '''"""Mixes channels, so that it has no map."""
from dataclasses import dataclass
from torch import nn

NO_MAP = "it mixes channels"

@dataclass(frozen=True)
class Config:
    pass

def build(layer, config):
    return nn.Linear(layer.dim, layer.dim)

def macs(layer, config):
    return 0
'''


def make_run(results: Path, name: str, **settings) -> str:
    """A run's folder with an untrained model and a log of two epochs."""
    config = resolve_run({"dataset": "digits", **settings})
    data = load_data(config.data)
    folder = results / "runs" / name
    folder.mkdir(parents=True)
    info = RunInfo.of(name, RuntimeConfig(), "key", config, data)
    store.write_json(folder / "config.json", asdict(info))
    save_weights(folder / "model.safetensors", ViT(config.model, config.train.seed), info)
    for epoch in (1, 2):
        store.append_log(folder, {
            "epoch": epoch, "train_loss": 2 / epoch, "train_top1_pct": 20.0 * epoch, "validation_loss": 2 / epoch,
            "validation_top1_pct": 15.0 * epoch, "train_seconds": 1.5, "images": 1293, "seconds": 1.7, "lr": 1e-3,
        })  # fmt: skip
    labels = np.arange(20) % 10
    np.savez(folder / "predictions.npz", logits=np.eye(10, dtype=np.float32)[labels], labels=labels, predicted=labels)
    return name


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("results")
    make_run(folder, "a", attention="softmax")
    make_run(folder, "b", attention="linear", pool="cls")
    make_run(folder, "colour", dataset="fake", dim=16, mlp_dim=32)
    return str(folder)


def draw(results: str, *runs: str, **options) -> dict[str, np.ndarray]:
    """The pixels of all pictures, by file name."""
    options.setdefault("what", ["rollout"])
    drawn = visualize.run(runs, results, device="cpu", **options)
    assert drawn.notes == ()
    return {path.name: np.array(Image.open(path)) for path in drawn.paths}


def test_all_draws_every_view(results):
    pytest.importorskip("pytorch_grad_cam", reason="the extra viz is not installed")
    assert set(draw(results, "a", "b", what=["all"])) == {
        "a-maps.png", "b-maps.png", "comparison.png", "profiles.png", "a-samples.png", "curves.png",
        "epoch-seconds.png", "a-confusion.png", "b-confusion.png",
    }  # fmt: skip
    assert {path.parent for path in (Path(results) / "figures").iterdir()} == {Path(results) / "figures"}


def test_pictures_differ_with_the_test_image_and_say_which(results, tmp_path):
    first = draw(results, "a", out=tmp_path, what=["maps"])
    other = draw(results, "a", out=tmp_path, what=["maps"], index=3)
    again = draw(results, "a", out=tmp_path / "again", what=["maps"])
    assert set(first) == {"a-maps.png"} and set(other) == {"a-maps-3.png"}  # noqa: PT018
    assert (first["a-maps.png"] == again["a-maps.png"]).all()
    assert first["a-maps.png"].shape == other["a-maps-3.png"].shape
    assert (first["a-maps.png"] != other["a-maps-3.png"]).any()


def test_image_files_are_drawn_without_the_data_set(results, tmp_path):
    for folder, value in (("x", 30), ("y", 220)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(tmp_path / folder / "photo.png")
    files = [tmp_path / "x" / "photo.png", tmp_path / "y" / "photo.png"]
    drawn = draw(results, "colour", images=files, out=tmp_path, what=["rollout", "profiles"], data_dir="no such folder")
    assert set(drawn) == {"colour-views-photo.png", "colour-views-photo-2.png", "colour-profiles.png"}
    assert drawn["colour-views-photo.png"].mean() < drawn["colour-views-photo-2.png"].mean()


def test_other_data_sets_get_a_comparison_of_their_own(results, tmp_path):
    assert set(draw(results, "a", "b", "colour", out=tmp_path)) == {
        "digits-8x8-comparison.png", "colour-views.png"
    }  # fmt: skip


def test_checkpoints_of_one_run_have_names_of_their_own(results, tmp_path):
    run = load_run("a", results)
    save_weights(tmp_path / "epoch-0001.safetensors", run.model, run.info)
    checkpoint = str(tmp_path / "epoch-0001.safetensors")
    assert set(draw(results, "a", checkpoint, out=tmp_path, what=["maps"])) == {"a-maps.png", "a-epoch-0001-maps.png"}


def test_a_mechanism_without_a_map_says_so(results, tmp_path):
    (tmp_path / "mine.py").write_text(NO_MAP)
    make_run(tmp_path, "mapless", attention=str(tmp_path / "mine.py"))
    runs = ["mapless", f"{results}/runs/a"]
    drawn = visualize.run(runs, str(tmp_path), device="cpu", what=["rollout", "profiles", "maps"])
    assert {path.name for path in drawn.paths} == {"a-maps.png", "comparison.png", "profiles.png"}
    assert any("mine.py has no attention map: it mixes channels" in note for note in drawn.notes)
    mapless, other = visualize._subjects(runs, str(tmp_path), torch.device("cpu"))
    picture = visualize._Picture(torch.zeros(1, 8, 8, dtype=torch.uint8), "black", "")
    x, artist = mapless.to_input(picture.pixels.unsqueeze(0)), visualize._Artist(tmp_path, None, {"rollout"})
    cells, _ = artist._views(mapless, x, np.zeros((8, 8)), picture)
    assert "has no attention map: it mixes channels" in cells["mean attention, last layer"]
    assert cells["rollout"] == "no rollout without attention maps"
    cells, _ = artist._views(other, x, np.zeros((8, 8)), picture)
    assert cells["rollout"].shape == (8, 8)
    with pytest.raises(UserError, match="has no attention map: it mixes channels"):
        visualize.run(["mapless"], str(tmp_path), device="cpu", what=["profiles"])


def test_a_mixed_model_says_which_layer_has_no_map(results, tmp_path):
    (tmp_path / "mine.py").write_text(NO_MAP)
    make_run(tmp_path, "mixed", attention=f"softmax,1={tmp_path / 'mine.py'}")
    make_run(tmp_path, "mapped", attention="softmax,1=linear")
    assert set(draw(str(tmp_path), "mapped", what=["maps", "profiles"])) == {"mapped-maps.png", "mapped-profiles.png"}
    drawn = visualize.run(["mixed", "mapped"], str(tmp_path), device="cpu", what=["rollout", "profiles"])
    reason = rf"no attention map in layer 1 \({tmp_path / 'mine.py'}\): it mixes channels"
    assert any(re.search(reason, note) for note in drawn.notes)
    with pytest.raises(UserError, match=reason):
        load_run("mixed", str(tmp_path)).model(torch.zeros(1, 1, 8, 8), return_maps=True)


def test_without_grad_cam_all_draws_the_rest(results, tmp_path, monkeypatch):
    # What Python sees where a package is not installed.
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    drawn = visualize.run(["a"], results, device="cpu", out=tmp_path)
    assert tmp_path / "a-views.png" in drawn.paths
    assert drawn.notes == ("no gradcam: Grad-CAM needs the grad-cam package: pip install 'vitcmp[viz]'",)
    with pytest.raises(UserError, match="grad-cam package"):
        visualize.run(["a"], results, device="cpu", out=tmp_path, what=["gradcam"])


def test_what_is_missing_is_a_note_with_all_and_an_error_by_name(results, tmp_path):
    run = load_run("a", results)
    save_weights(tmp_path / "model.safetensors", run.model, run.info)
    alone = str(tmp_path / "model.safetensors")
    drawn = visualize.run([alone], device="cpu", out=tmp_path / "out")
    assert [note.split(":")[0] for note in drawn.notes if "gradcam" not in note][-1] == "no confusion"
    for view, reason in (("confusion", "no predictions"), ("curves", "no run has a log")):
        with pytest.raises(UserError, match=reason):
            visualize.run([alone], device="cpu", out=tmp_path / "out", what=[view])


def test_to_images_inverts_the_normalisation(results):
    (subject,) = visualize._subjects(["colour"], results, torch.device("cpu"))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    shown = subject.to_images(subject.to_input(pixels))
    np.testing.assert_allclose(shown, pixels.permute(0, 2, 3, 1).numpy() / 255, atol=1e-5)


def test_caveats_are_stated_for_maps_that_are_no_weights(results):
    model = load_run("a", results).model
    assert visualize.caveats_of(model, [torch.full((1, 4, 64, 64), 1 / 64)]) == ""
    signed = torch.zeros(1, 1, 2, 2)
    signed[..., 0, 0] = -0.5
    assert visualize.caveats_of(model, [signed]) == "Entries go down to -0.5 and rows sum to -0.5 … 0."
    model.blocks[0].attention.conv = torch.nn.Conv1d(1, 1, 3)
    assert "without Conv1d" in visualize.caveats_of(model, [torch.full((1, 4, 64, 64), 1 / 64)])


def test_captions_say_what_the_map_leaves_out(tmp_path):
    noted = tmp_path / "noted.py"
    noted.write_text(
        "from vitcmp.attention.linear import Config, build, macs\nMAP_NOTE = 'map without the convolution'\n"
    )
    for spec, caveat in (
        (str(noted), "Map without the convolution."),
        (f"linear,1={noted}", f"Map without the convolution of {noted}."),
    ):
        model = ViT(resolve_run({"attention": spec}).model)
        assert visualize.caveats_of(model, [torch.full((1, 4, 64, 64), 1 / 64)]) == caveat


def test_mistakes_name_the_remedy(results, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for options, reason in (
        ({"what": ["rolout"]}, "did you mean 'rollout'"),
        ({"runs": []}, "no run given"),
        ({"index": 360}, r"from 0 to 359"),
        ({"index": -1}, r"from 0 to 359"),
        ({"images": [tmp_path / "text.png"]}, r"text\.png"),
        ({"out": tmp_path / "text.png"}, "choose another --out"),
    ):
        with pytest.raises(UserError, match=reason):
            visualize.run(**{"runs": ["a"], "results": results, "device": "cpu", **options})


def test_a_broken_model_says_nothing(tmp_path):
    make_run(tmp_path, "broken")
    path = tmp_path / "runs" / "broken" / "model.safetensors"
    model, info = load_weights(path)
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    save_weights(path, model, info)
    drawn = visualize.run(["broken"], str(tmp_path), device="cpu", what=["maps", "rollout"])
    assert [p.name for p in drawn.paths] == ["broken-views.png"]
    assert drawn.notes == (
        "nothing of broken: the model's logits are not finite for 1 of 1 images; train it again with a lower --lr or "
        "longer --warmup-epochs",
    )
