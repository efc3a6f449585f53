"""Evaluation repeats the test of training, and covers other resolutions and corruptions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vitcmp import load_data, store
from vitcmp.configs import RuntimeConfig, UserError, resolve_run
from vitcmp.data.corrupt import corrupt
from vitcmp.models.checkpoint import load_run, save_weights
from vitcmp.workflows import eval as evaluation
from vitcmp.workflows import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[store.Record, RuntimeConfig]:
    runtime = RuntimeConfig(results=str(tmp_path_factory.mktemp("results")))
    return train.run(resolve_run({"epochs": 4}), runtime), runtime


def test_eval_repeats_the_test_of_training(trained):
    record, runtime = trained
    found = evaluation.run(record.id, runtime)
    for name in ("top1_pct", "top5_pct", "nll", "ece_pct", "top1_low_pct"):
        assert found.record.metrics[name] == record.metrics[name]
    kept = np.load(found.predictions)
    assert (kept["predicted"] == kept["labels"]).mean() * 100 == pytest.approx(record.metrics["top1_pct"])
    confusion = np.array(found.confusion)
    assert confusion.sum() == 360
    assert np.trace(confusion) / 360 * 100 == pytest.approx(record.metrics["top1_pct"])
    assert found.class_top1_pct[3] == pytest.approx(confusion[3, 3] / confusion[3].sum() * 100)


def test_other_splits_and_resolutions(trained):
    record, runtime = trained
    on_train = evaluation.run(record.id, runtime, split="train")
    assert on_train.record.metrics["top1_pct"] == record.metrics["train_top1_pct"]
    larger = evaluation.run(record.id, runtime, image_size=12)
    assert larger.record.config["image_size"] == 12
    # Twice the tokens and more: not what it was trained on, but not chance either.
    assert larger.record.metrics["top1_pct"] > 15


def test_what_does_not_fit_is_refused(trained):
    record, runtime = trained
    with pytest.raises(UserError, match="cifar10 has 3 channels"):
        evaluation.run(record.id, runtime, dataset="cifar10")
    with pytest.raises(UserError, match="severity"):
        evaluation.run(record.id, runtime, corrupt="noise", severity=6)
    with pytest.raises(UserError, match="did you mean 'blur'"):
        evaluation.run(record.id, runtime, corrupt="blurr")
    with pytest.raises(UserError, match="split"):
        evaluation.run(record.id, runtime, split="all")


@pytest.mark.parametrize("kind", ["noise", "blur", "contrast", "jpeg"])
def test_corruptions_grow_with_severity_and_repeat(kind):
    images = load_data("fake").test.images[:32]
    errors = []
    for severity in range(1, 6):
        changed = corrupt(images, kind, severity)
        assert changed.shape == images.shape
        assert changed.dtype == torch.uint8
        assert torch.equal(changed, corrupt(images, kind, severity))
        errors.append((changed.float() - images.float()).square().mean().item())
    assert errors[0] > 0
    assert errors == sorted(errors)


def test_blur_keeps_a_flat_image_and_contrast_its_mean():
    flat = torch.full((1, 1, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(flat, "blur", 5), flat)
    half = torch.cat([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 200)], dim=3).to(torch.uint8)
    assert corrupt(half, "contrast", 2).unique().tolist() == [50, 150]


def test_checkpoint_files_of_single_epochs_evaluate(tmp_path: Path):
    runtime = RuntimeConfig(results=str(tmp_path), save_every=1)
    record = train.run(resolve_run({"epochs": 2, "train_samples": 128}), runtime)
    folder = tmp_path / "runs" / record.id
    assert {p.name for p in folder.glob("*.safetensors")} == {
        "model.safetensors", "last.safetensors", "epoch-0001.safetensors", "epoch-0002.safetensors",
    }  # fmt: skip
    found = evaluation.run(str(folder / "epoch-0001.safetensors"), runtime)
    assert found.record.config["run"] == record.id


def test_a_broken_model_has_diverged_and_predicts_nothing(trained):
    record, runtime = trained
    broken = load_run(record.id, runtime.results)
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.fill_(torch.nan)
    path = broken.folder / "broken.safetensors"
    save_weights(path, broken.model, broken.info)
    found = evaluation.run(str(path), runtime)
    assert found.record.status == "diverged"
    assert found.record.error == (
        "the model's logits are not finite for 360 of 360 images; train it again with a lower --lr or longer "
        "--warmup-epochs"
    )
    assert (found.class_top1_pct, found.confusion) == ([0] * 10, [[0] * 10] * 10)
    assert set(np.load(found.predictions)["predicted"]) == {-1}
    (stored,) = (r for r in store.read(runtime.results) if r.id == found.record.id)
    assert (stored.status, stored.error) == (found.record.status, found.record.error)
    assert (stored.metrics["top1_pct"], stored.metrics["nll"], stored.metrics["ece_pct"]) == (0, None, None)
