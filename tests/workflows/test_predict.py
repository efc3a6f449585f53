from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitcmp.configs import Diverged, UserError, resolve_run
from vitcmp.data.augment import Normalise
from vitcmp.models.checkpoint import RunInfo, load_weights, save_weights
from vitcmp.models.vit import ViT
from vitcmp.workflows import predict

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
NAMES = tuple(f"kind {i}" for i in range(10))


def checkpoint(path: Path, **settings) -> tuple[str, ViT]:
    """An untrained model whose answers differ between pictures, in a file."""
    config = resolve_run({"dataset": "cifar10", "dim": 16, "depth": 1, "mlp_dim": 32, "init_std": 0.3, **settings})
    model = ViT(config.model).eval()
    save_weights(path, model, RunInfo("a-run", None, "key", config.flat(), NAMES, MEAN, STD, "digest"))
    return str(path), model


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, array in zip(paths, pixels):
        Image.fromarray(array).save(path)
    return paths


def test_classes_and_probabilities_are_the_models(tmp_path, pictures):
    run, model = checkpoint(tmp_path / "model.safetensors")
    predictions = predict.run(run, pictures, device="cpu", top=3)
    assert [p.image for p in predictions] == [str(path) for path in pictures]
    for path, prediction in zip(pictures, predictions):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        x = Normalise(MEAN, STD, (32, 32), torch.device("cpu"))(pixels.unsqueeze(0))
        share, place = model(x)[0].softmax(dim=0).topk(3)
        assert [name for name, _ in prediction.classes] == [NAMES[i] for i in place]
        assert [pct for _, pct in prediction.classes] == pytest.approx((100 * share).tolist(), abs=1e-3)


def test_all_probabilities_sum_to_100(tmp_path, pictures):
    run, _ = checkpoint(tmp_path / "model.safetensors")
    (prediction, _) = predict.run(run, pictures, device="cpu", top=99)
    assert len(prediction.classes) == 10
    assert sum(pct for _, pct in prediction.classes) == pytest.approx(100)


def test_a_run_on_inverted_images_inverts_and_the_flag_undoes_it(tmp_path, pictures):
    plain, _ = checkpoint(tmp_path / "plain.safetensors")
    inverted, _ = checkpoint(tmp_path / "inverted.safetensors", invert=True)
    results = {
        (run, flag): predict.run(run, pictures, device="cpu", invert=flag)
        for run in (plain, inverted) for flag in (False, True)
    }  # fmt: skip
    assert results[plain, False] == results[inverted, True] != results[plain, True] == results[inverted, False]


def test_mistakes_name_the_remedy(tmp_path, pictures):
    run, _ = checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no image given"):
        predict.run(run, [], device="cpu")
    with pytest.raises(UserError, match=r"top \(0\) must be 1"):
        predict.run(run, pictures, device="cpu", top=0)
    with pytest.raises(UserError, match=r"gone\.png"):
        predict.run(run, [*pictures, tmp_path / "gone.png"], device="cpu")


def test_a_broken_model_says_so(tmp_path, pictures):
    run, _ = checkpoint(tmp_path / "model.safetensors")
    model, info = load_weights(Path(run))
    with torch.no_grad():
        model.head.bias[3] = torch.nan
    save_weights(tmp_path / "broken.safetensors", model, info)
    with pytest.raises(Diverged, match="not finite for 2 of 2 images; train it again with a lower --lr"):
        predict.run(str(tmp_path / "broken.safetensors"), pictures, device="cpu")
    assert len(predict.run(run, pictures, device="cpu")) == 2
