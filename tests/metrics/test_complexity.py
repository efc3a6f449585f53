"""Parameters and multiply-adds of whole models; those of each mechanism are checked in test_attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from vitcmp.attention import DegenerateWarning
from vitcmp.metrics import complexity
from vitcmp.models.vit import ViT, build_model


def make_model(**settings: Any) -> ViT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateWarning)
        return build_model(**settings).eval()


def test_parameters() -> None:
    assert complexity.parameters_m(make_model(preset="vit")) == 0.829322


def test_counted_macs_of_a_matrix_product() -> None:
    assert complexity.counted_macs(nn.Linear(7, 5), torch.randn(3, 7)) == 3 * 7 * 5


def test_counted_macs_see_fused_attention() -> None:
    class Fused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert complexity.counted_macs(Fused(), torch.randn(2, 3, 50, 16)) == 2 * 3 * 2 * 50 * 50 * 16


@pytest.mark.parametrize("spec", ["softmax:impl=naive", "softmax:impl=fused", "entmax", "linear", "performer"])
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "vit-48x4"},
        {"preset": "vit", "depth": 2},
        {"preset": "vitx", "depth": 1, "image_size": 16},
        {"preset": "tiny", "image_size": 8, "channels": 1},
        {"preset": "tiny", "image_size": 16, "patch_size": 2, "stem": "linear"},
    ],
    ids=lambda settings: settings["preset"],
)
def test_model_macs_are_the_counted_ones(spec: str, settings: dict[str, Any]) -> None:
    model = make_model(**{**settings, "attention": spec})
    images = torch.randn(1, model.config.channels or 3, *model.config.image_hw)
    assert complexity.model_macs(model) == pytest.approx(complexity.counted_macs(model, images), rel=1e-3)


def test_attention_macs_are_the_sum_of_the_layers() -> None:
    mixed = make_model(attention=("softmax", "linear", "linear", "softmax"))
    whole = [complexity.attention_macs(make_model(attention=spec)) for spec in ("softmax", "linear")]
    assert complexity.attention_macs(mixed) == sum(whole) // 2
    assert whole[0] == 4 * 2 * 65 * 65 * 48


def test_ptflops_counts_about_as_many() -> None:
    model = make_model(attention="softmax:impl=naive")
    found = complexity.ptflops_macs(model, torch.randn(1, 3, 32, 32))
    assert found is not None
    # It counts element-wise work too.
    assert complexity.model_macs(model) < found < 1.3 * complexity.model_macs(model)
