"""The Vision Transformer: sizes, initial weights, maps, shapes and errors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitcmp import attention
from vitcmp.attention import DegenerateWarning
from vitcmp.configs import ModelConfig, UserError
from vitcmp.models.vit import DropPath, PatchEmbedding, ViT, build_model, resized

SMALL: dict[str, Any] = {"image_size": 8, "channels": 1, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32}
SPECS = ["softmax", "softmax:impl=naive", "entmax", "linear", "performer:num_features=12"]


def small(**settings: Any) -> Any:
    return build_model(**{**SMALL, **settings})


@pytest.mark.parametrize(
    ("preset", "settings", "parameters"),
    [
        ("vit", {}, 829_322),
        ("vitl", {}, 924_426),
        ("vitx", {}, 1_017_162),
        ("vitx", {"stem": "conv-relu"}, 1_017_162),
        ("vit-48x4", {}, 119_194),
        ("vit-48x4", {"final_norm": False}, 119_098),
        ("vit-48x4", {"attention": "softmax:impl=naive"}, 119_194),
        ("vit-48x4", {"attention": "performer:num_features=8"}, 119_194),
        ("vit-tiny-16-224", {"num_classes": 1000}, 5_717_416),
    ],
)
def test_presets_have_the_published_sizes(preset: str, settings: dict[str, Any], parameters: int) -> None:
    assert sum(p.numel() for p in build_model(preset, **settings).parameters()) == parameters


def split_qkv(model: ViT) -> dict[str, Tensor]:
    """Parameters with a merged projection under the names of separate ones."""
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = parameter.detach().chunk(3) if ".qkv." in name else [parameter.detach()]
        names = [name.replace("qkv", part) for part in "qkv"] if ".qkv." in name else [name]
        state |= dict(zip(names, parts, strict=True))
    return state


@pytest.mark.parametrize("other", [spec for spec in SPECS if spec != "softmax"])
def test_mechanisms_start_from_the_same_weights(other: str) -> None:
    ours, theirs = split_qkv(small(attention="softmax", seed=3)), split_qkv(small(attention=other, seed=3))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_initial_weights_depend_on_the_seed_and_the_layer() -> None:
    first, second = split_qkv(small(seed=0)), split_qkv(small(seed=1))
    for name, weight in first.items():
        random = name in ("pos_embed", "cls_token") or (weight.ndim == 2 and name.endswith("weight"))
        assert torch.equal(weight, second[name]) is not random, name
    assert not torch.equal(first["blocks.0.attention.q.weight"], first["blocks.1.attention.q.weight"])
    assert not torch.equal(first["blocks.0.attention.q.weight"], first["blocks.0.attention.k.weight"])
    weight = small(dim=128, mlp_dim=512).blocks[0].mlp[0].weight
    assert weight.std().item() == pytest.approx((2 * 128) ** -0.5 * 0.88, rel=0.03)  # truncated at 2 std


def test_building_draws_nothing_from_the_global_stream() -> None:
    """Weights are set from their own streams whatever was drawn before."""
    first = small(attention="performer:num_features=12")
    torch.rand(5)
    second = small(attention="performer:num_features=12")
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    a, b = (block.attention.core.projection for block in first.blocks)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("pool", "tokens"), [("cls", 65), ("mean", 64)])
def test_maps_come_with_unchanged_logits(spec: str, pool: str, tokens: int) -> None:
    model, images = small(attention=spec, pool=pool).eval(), torch.randn(3, 1, 8, 8)
    logits, maps = model(images, return_maps=True)
    assert torch.equal(logits, model(images))
    assert [m.shape for m in maps] == [(3, 2, tokens, tokens)] * 2
    for matrix in maps:
        torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(3, 2, tokens), rtol=0, atol=1e-4)


def test_layers_may_differ() -> None:
    model = small(attention=("softmax", "linear")).eval()
    names = [type(block.attention.core).__name__ for block in model.blocks]
    assert names == ["SoftmaxAttention", "LinearAttention"]
    with pytest.raises(UserError, match="1 attention specs were given for 2 layers"):
        small(attention=("softmax",))


def test_mean_pooling_reads_all_patches_and_no_class_token() -> None:
    model, images = small(pool="mean").eval(), torch.randn(2, 1, 8, 8)
    assert model.cls_token is None
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(images)
    assert seen[0].shape == (2, 64, 16)
    torch.testing.assert_close(logits, model.head(seen[0].mean(dim=1)))


def test_patches_are_read_row_by_row() -> None:
    embed = PatchEmbedding(channels=2, dim=8, patch=2, stem="linear")
    image = torch.arange(32.0).view(1, 2, 4, 4)
    tokens = embed(image)
    second = image[0, :, 0:2, 2:4].reshape(-1)
    torch.testing.assert_close(tokens[0, 1], embed.proj(second))
    third = image[0, :, 2:4, 0:2].reshape(-1)
    torch.testing.assert_close(tokens[0, 2], embed.proj(third))


@pytest.mark.parametrize(("pixels", "patch"), [(8, 1), (28, 4), (32, 4), (224, 28)])
def test_automatic_patches_make_about_64_tokens(pixels: int, patch: int) -> None:
    assert ModelConfig(image_size=pixels).patch == patch


def test_rectangles_work() -> None:
    model = small(image_size=(8, 12), patch_size=2)
    assert model.grid.height == 4
    assert model.grid.width == 6
    assert model(torch.randn(2, 1, 8, 12)).shape == (2, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 18, "num_heads": 4}, r"dim \(18\) must be divisible by num_heads \(4\)"),
        ({"patch_size": 3}, r"image_size \(8\) must be divisible by patch_size \(3\)"),
        ({"dim": 18, "stem": "conv"}, r"dim \(18\) must be divisible by 4"),
        ({"preset": "vitt"}, "unknown preset 'vitt'; did you mean 'vit'"),
        ({"dims": 16}, "unknown setting 'dims'; did you mean 'dim'"),
        ({"depth": 0}, r"depth \(0\) must be above 0"),
        ({"pool": "max"}, "pool: 'max' must be"),
        ({"attention_dropout": 0.1, "attention": "linear"}, "attention_dropout"),
    ],
)
def test_impossible_models_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 9), (2, 1, 16, 16)])
def test_images_must_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="do not fit a model made for"):
        small()(torch.randn(shape))


@pytest.mark.parametrize("spec", attention.available(own=True))
def test_no_images_give_no_logits(spec: str) -> None:
    model = small(attention=spec)
    logits = model(torch.zeros(0, 1, 8, 8))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("spec", SPECS)
def test_resized_to_its_own_size_it_is_the_same(spec: str) -> None:
    model, images = small(attention=spec, seed=5).eval(), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(resized(model, 8)(images), model(images))


def test_resized_to_another_size_it_keeps_constant_positions() -> None:
    model = small(patch_size=2).eval()
    nn.init.constant_(model.pos_embed, 0.5)
    other = resized(model, 12)
    assert other.grid.num_tokens == 37
    torch.testing.assert_close(other.pos_embed, torch.full((1, 37, 16), 0.5))
    assert not other.training
    with pytest.raises(UserError, match="must be divisible by patch_size"):
        resized(model, 11)


def test_drop_path_keeps_the_expectation() -> None:
    layer = DropPath(0.25)
    x = torch.ones(20_000, 3, 2)
    y = layer(x)
    kept = y[:, 0, 0] > 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    assert (y.amin(dim=(1, 2)) == y.amax(dim=(1, 2))).all()  # a sample is skipped as a whole
    assert kept.double().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(layer.eval()(x), x)


def test_drop_path_rises_with_depth() -> None:
    model = small(depth=3, drop_path=0.2)
    assert [block.drop_path.probability for block in model.blocks] == pytest.approx([0, 0.1, 0.2])


def test_a_pointless_configuration_warns_once_a_layer() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small(attention="performer:num_features=100")
    assert [w.category for w in caught] == [DegenerateWarning] * 2
