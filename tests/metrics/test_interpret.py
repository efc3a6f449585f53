import math

import pytest
import torch

from vitcmp.attention import TokenGrid
from vitcmp.metrics import interpret
from vitcmp.models.vit import build_model


def test_rollout_of_two_layers_by_hand():
    # Layer 1: heads average to [[0, 1], [1, 0]]; plus I and normalised: 1/2 everywhere.
    first = torch.tensor([[[[0.0, 1], [1, 0]], [[0.0, 1], [1, 0]]]])
    # Layer 2: heads average to [[1, 0], [.5, .5]]; plus I and normalised: [[1, 0], [.25, .75]].
    second = torch.tensor([[[[1.0, 0], [1, 0]], [[1.0, 0], [0, 1]]]])
    torch.testing.assert_close(interpret.rollout([first]), torch.full((1, 2, 2), 0.5))
    torch.testing.assert_close(interpret.rollout([second]), torch.tensor([[[1.0, 0], [0.25, 0.75]]]))
    third = torch.tensor([[[[0.0, 1], [0, 1]]]])  # plus I and normalised: [[.5, .5], [0, 1]]
    expected = torch.tensor([[[0.5, 0.5], [0, 1]]]) @ torch.tensor([[[1.0, 0], [0.25, 0.75]]])
    torch.testing.assert_close(interpret.rollout([second, third]), expected)


def test_rollout_of_weights_stays_weights_and_signed_rows_stay_finite():
    maps = [torch.randn(2, 3, 7, 7).softmax(dim=-1) for _ in range(4)]
    torch.testing.assert_close(interpret.rollout(maps).sum(dim=-1), torch.ones(2, 7))
    # The rows of -I + I are zero.
    assert interpret.rollout([-torch.eye(3).expand(1, 1, 3, 3)]).isfinite().all()


def test_relevance_picks_the_class_tokens_row_or_the_patches_mean():
    matrix = torch.arange(49.0).view(1, 7, 7)
    picked = interpret.relevance(matrix, TokenGrid(2, 3, num_prefix_tokens=1), "cls")
    assert picked.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    matrix = torch.tensor([[[1.0, 2], [3, 6]]])
    assert interpret.relevance(matrix, TokenGrid(1, 2), "mean").tolist() == [[[2, 4]]]


def test_entropy_of_one_and_of_all_alike():
    identity = torch.eye(8).expand(2, 3, 8, 8)
    uniform = torch.full((2, 3, 8, 8), 1 / 8)
    torch.testing.assert_close(interpret.entropy([identity, uniform]), torch.tensor([[0.0] * 3, [math.log(8)] * 3]))


def test_zero_share_counts_exact_zeros_a_head():
    heads = torch.stack([torch.eye(4), torch.full((4, 4), 1e-30)]).unsqueeze(0)
    assert interpret.zero_share([heads]).tolist() == [[0.75, 0.0]]


def test_distance_is_zero_for_identity_and_exact_for_a_pair():
    grid = TokenGrid(4, 4, num_prefix_tokens=1)
    assert interpret.attention_distance([torch.eye(17).expand(2, 3, 17, 17)], grid).tolist() == [[0.0] * 3]
    # On a grid of 1 x 3, each patch attends to the last: distances 2, 1 and 0.
    to_last = torch.zeros(1, 1, 3, 3)
    to_last[..., 2] = 1
    assert interpret.attention_distance([to_last], TokenGrid(1, 3)).tolist() == [[1.0]]


def test_distance_leaves_out_the_prefix():
    grid = TokenGrid(1, 2, num_prefix_tokens=1)
    # Patch 0 spends most on the class token and the rest on patch 1; patch 1 sees the class token only.
    matrix = torch.tensor([[[[1.0, 0, 0], [0.9, 0, 0.1], [1, 0, 0]]]])
    assert interpret.attention_distance([matrix], grid).tolist() == [[1.0]]


def test_extremes_tell_weights_from_others():
    assert interpret.extremes([torch.randn(1, 2, 5, 5).softmax(dim=-1)]).are_weights
    found = interpret.extremes([torch.tensor([[[[-0.5, 1.0], [1.0, 1.0]]]])])
    assert (found.lowest, found.row_sums, found.are_weights) == (-0.5, (0.5, 2.0), False)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_grad_cam_agrees_with_the_formula(pool):
    pytest.importorskip("pytorch_grad_cam", reason="the extra viz is not installed")
    model = build_model(dim=16, depth=2, num_heads=2, mlp_dim=32, patch_size=8, pool=pool, init_std=0.3).eval()
    image = torch.randn(3, 32, 32)
    shown = interpret.grad_cam(model, image, target=3)
    assert shown.shape == (32, 32)
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert all(p.grad is None for p in model.parameters())
    # The same by hand: channel weights are the gradients' mean over the patches.
    grid, kept = model.grid, []
    hook = model.blocks[-1].norm1.register_forward_hook(lambda module, x, y: kept.append(y))
    logits = model(image.unsqueeze(0))
    hook.remove()
    gradient = torch.autograd.grad(logits[0, 3], kept[0])[0][0, grid.num_prefix_tokens :]
    patches = (kept[0][0, grid.num_prefix_tokens :] * gradient.mean(dim=0)).sum(dim=-1).relu().view(4, 4)
    assert patches.max() > 0
    place = int(patches.argmax())
    top = shown.view(4, 8, 4, 8).mean(dim=(1, 3))
    assert int(top.argmax()) == place


def test_profiles_of_signed_maps_are_of_absolute_values() -> None:
    signed = torch.tensor([[0.5, -0.5], [1.5, -0.5]]).view(1, 1, 2, 2)
    grid = TokenGrid(1, 2)
    assert torch.equal(interpret.entropy([signed]), interpret.entropy([signed.abs()]))
    assert torch.equal(interpret.attention_distance([signed], grid), torch.tensor([[0.625]]))
