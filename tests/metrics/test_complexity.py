"""Parameters, multiply-adds and bytes; the closed forms of each mechanism are checked by its contract, too."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ptflops
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitcmp import attention
from vitcmp.attention import DegenerateWarning, LayerConfig, TokenGrid
from vitcmp.metrics import complexity
from vitcmp.metrics.complexity import UncountedError
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


SPECS = [*attention.available(own=True), "softmax:impl=naive", "softmax:impl=fused"]
SIZES = [(64, 48, 4), (256, 48, 4), (64, 128, 8), (256, 128, 8)]


class Core(nn.Module):
    """A block without its projections."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.core, self.after = block.core, getattr(block, "after", None)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mixed = self.core(q, k, v)
        return mixed if self.after is None else self.after(mixed, v)


def levels(spec: str, tokens: int, dim: int, heads: int) -> Iterator[tuple[nn.Module, list[torch.Tensor], int]]:
    """Module, inputs and closed form of the core, of the block, and of a model."""
    mechanism, layer = attention.load(spec), LayerConfig(dim, heads, TokenGrid.squarest(tokens))
    block, side = mechanism.build(layer).eval(), 2 * math.isqrt(tokens)
    if hasattr(block, "core"):
        q, k, v = (torch.randn(1, heads, tokens, dim // heads) for _ in "qkv")
        yield Core(block), [q, q if mechanism.num_projections == 3 else k, v], mechanism.macs(layer)
    yield block, [torch.randn(1, tokens, dim)], mechanism.block_macs(layer)
    model = make_model(attention=spec, dim=dim, num_heads=heads, depth=1, image_size=side, patch_size=2, pool="mean")
    yield model, [torch.randn(1, 3, side, side)], complexity.model_macs(model)


@pytest.mark.filterwarnings("ignore::vitcmp.attention.DegenerateWarning")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_three_ways_of_counting_agree_or_it_is_said_why(spec: str, sizes: tuple[int, int, int]) -> None:
    for module, inputs, closed in levels(spec, *sizes):
        with torch.no_grad():
            found = complexity.count(functools.partial(module, *inputs))
        assert found.macs == pytest.approx(closed, rel=0.001)
        ptflops = complexity.ptflops_macs(module, *inputs)
        assert ptflops is not None
        used = [name for name, macs in found.by_operation.items() if macs]
        unseen = [name for name in used if re.search("attention|vitcmp|baddbmm", name)]
        # Its sum is explained to the last one.
        assert ptflops == found.macs + found.biases - sum(found.by_operation[name] for name in unseen)
        lines = complexity.disagreement(closed, found, ptflops)
        assert len(lines) == (abs(ptflops - closed) > 0.02 * closed)
        if lines and ptflops < closed:
            assert lines[0].endswith(f"less than the closed form: it does not see {', '.join(unseen)}")
        elif lines:
            assert lines[0].endswith("more than the closed form: it counts biases as MACs")


def test_disagreement_without_a_cause() -> None:
    seen = complexity.Count(macs=100, moved_bytes=0, by_operation={"aten.mm": 100})
    assert complexity.disagreement(100, seen, 102) == []
    assert complexity.disagreement(0, complexity.Count(0, 0), 0) == []
    assert complexity.disagreement(100, seen, None) == ["ptflops failed"]
    assert complexity.disagreement(100, seen, 90) == [
        "ptflops finds 10.0 % less than the closed form: a cause is not known"
    ]
    assert complexity.disagreement(80, seen, 80)[0] == "torch's counter finds 25.0 % more than the closed form"


def test_ptflops_numbers_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    model, images = make_model(attention="softmax:impl=naive").train(), torch.randn(1, 3, 32, 32)
    found = complexity.ptflops_macs(model, images)
    # As it came: no hooks, no other mode, nothing printed.
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert complexity.ptflops_macs(nn.Linear(3, 3), torch.ones(1, 2)) is None
    assert capfd.readouterr() == ("", "")
    settings: dict[str, Any] = {"backend": "aten", "as_strings": False, "print_per_layer_stat": False}
    assert found == ptflops.get_model_complexity_info(model, (3, 32, 32), **settings)[0]


def test_what_torch_s_own_counter_finds() -> None:
    model, images = make_model(attention="agent"), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert complexity.counted_macs(model, images) == counter.get_total_flops() // 2


def test_no_silent_zeros() -> None:
    with pytest.raises(UncountedError, match=r"linalg_inv.*register_flop_formula"):
        complexity.count(lambda: torch.linalg.inv(torch.eye(2)))
    with torch.inference_mode(), pytest.raises(UncountedError, match="no_grad"):
        complexity.count(lambda: torch.ones(2) + 1)


def moved(call: Callable[[], object]) -> float:
    """Numbers in fp32."""
    return complexity.count(call).moved_bytes / 4


def test_bytes_moved() -> None:
    x, y, row = torch.randn(10, 20), torch.randn(10, 20), torch.randn(20)
    weight = torch.randn(20, 5)
    assert moved(lambda: x + y) == 3 * 200
    assert moved(lambda: x * x) == 2 * 200
    assert moved(lambda: x + row.expand(10, 20)) == 200 + 20 + 200
    assert moved(lambda: x @ weight) == 200 + 100 + 50
    assert moved(lambda: x[:, ::2] + 1) == 2 * 100
    assert moved(lambda: x.view(20, 10).t()[:3].unsqueeze(0).detach().chunk(2)) == 0
    assert moved(lambda: x.t().reshape(200)) == 2 * 200
    assert moved(lambda: x.unfold(0, 5, 1).sum()) == 200 + 1
    assert moved(lambda: torch.empty(100)) == 0
    assert moved(lambda: torch.zeros(100)) == 100
    assert moved(lambda: x.add_(y)) == 3 * 200
    assert moved(lambda: x.copy_(y)) == 2 * 200
    assert moved(lambda: x.fill_(1)) == 200
    assert moved(lambda: torch.add(x, y, out=torch.empty(10, 20))) == 3 * 200
    assert moved(lambda: x.to(torch.bfloat16)) == 200 + 100
    assert moved(lambda: torch._foreach_add_([x, row], [y, row + 1])) == 3 * 200 + 3 * 20 + 2 * 20


def test_bytes_of_an_update_of_adamw() -> None:
    weight = nn.Parameter(torch.randn(1000))
    weight.grad = torch.randn(1000)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()
    found = complexity.count(optimizer.step)
    assert found.macs == 0
    # Weight, gradient and two moments, read and written; torch says that it may write the gradient.
    assert found.moved_bytes / 4 == pytest.approx(8 * 1000, abs=10)


def test_backward_of_a_matrix_product() -> None:
    x, weight = torch.randn(6, 7, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    assert complexity.count(lambda: (x @ weight).sum().backward()).macs == 3 * 6 * 7 * 5
    assert complexity.count(lambda: (x.detach() @ weight).sum().backward()).macs == 2 * 6 * 7 * 5


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_backward_of_a_convolution(groups: int, layer: type[nn.Conv2d]) -> None:
    convolution, x = layer(16, 16, 3, groups=groups, stride=2), torch.randn(2, 16, 9, 9, requires_grad=True)
    places = 2 * (4 * 4 if layer is nn.Conv2d else 9 * 9)
    forward = places * 9 * 16 * 16 // groups
    assert complexity.counted_macs(convolution, x) == forward
    assert complexity.count(lambda: convolution(x).sum().backward()).macs == 3 * forward
    assert complexity.count(lambda: convolution(x.detach()).sum().backward()).macs == 2 * forward


@pytest.mark.parametrize("spec", ["softmax:impl=fused", "entmax"])
def test_backward_of_fused_attention_computes_the_scores_again(spec: str) -> None:
    layer = LayerConfig(32, 2, TokenGrid(8, 8))
    core = attention.load(spec).build(layer).core
    q, k, v = (torch.randn(3, 2, 64, 16, requires_grad=True) for _ in "qkv")
    product = 3 * 2 * 64 * 64 * 16
    assert complexity.count(lambda: core(q, k, v).sum().backward()).macs == (2 + 5) * product


@pytest.mark.filterwarnings("ignore::vitcmp.attention.DegenerateWarning")
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_train_step_of_every_mechanism_is_counted(spec: str, dtype: torch.dtype) -> None:
    """Each product once forward and twice backward, but for scores computed again and what needs no gradient."""
    block = attention.load(spec).build(LayerConfig(32, 2, TokenGrid(16, 16)))
    x, optimizer = torch.randn(2, 256, 32, requires_grad=True), torch.optim.AdamW(block.parameters(), fused=True)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return block(x)

    def step() -> None:
        forward().float().square().mean().backward()
        optimizer.step()

    with torch.no_grad():
        once = complexity.count(forward)
    whole = complexity.count(step)
    assert 2.7 * once.macs <= whole.macs <= 3.5 * once.macs
    assert whole.moved_bytes > 1.5 * once.moved_bytes


def test_explicit_weights_move_what_fused_attention_spares() -> None:
    found = {}
    for impl in ("naive", "fused"):
        core = attention.load(f"softmax:impl={impl}").build(LayerConfig(32, 2, TokenGrid(16, 16))).core
        with torch.no_grad():
            found[impl] = complexity.count(lambda core=core: core(*torch.randn(3, 1, 2, 256, 16)))
    assert found["naive"].macs == found["fused"].macs
    # Scores are written, read and written by the softmax, and read again.
    assert found["naive"].moved_bytes - found["fused"].moved_bytes > 4 * 4 * 2 * 256**2
