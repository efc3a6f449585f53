"""Fast blocks in place of plain ones: the same results, and plain wherever someone has put something in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from attention_cases import taking
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from vitcmp import attention
from vitcmp.configs import PRESETS
from vitcmp.kernels import forget_used, switched, used
from vitcmp.metrics.complexity import count, counted_macs
from vitcmp.models.fast import FastBlock, fast, kind_of
from vitcmp.models.vit import Block, ViT, build_model

FORMS = {"kernels": ("numba",), "references": ("torch", "merged", "apart", "blocks", "gathered")}


def results(model: ViT, images: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Logits and all gradients, in one vector."""
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        logits = model(images)
    gradients = torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))
    return torch.cat([x.detach().float().flatten() for x in (logits, *gradients)])


@pytest.mark.parametrize("spec", [*attention.available(own=True), "softmax:impl=naive", "entmax:alpha=learned"])
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_a_fast_model_computes_what_the_plain_one_does(spec: str, forms: tuple[str, ...]) -> None:
    model, images = build_model(depth=2, attention=spec), torch.randn(8, 3, 32, 32)
    quick = fast(model)
    assert kind_of(quick) == "fast"
    assert kind_of(model) == "plain"
    for precision, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        if spec == "reformer" and precision == torch.bfloat16:
            continue  # its hashes flip with rounding
        wanted = results(model.train(), images, precision)
        for training in (True, False):
            with taking(*forms):
                found = results(quick.train(training), images, precision)
            assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("settings", [
    {"qkv_bias": False, "out_bias": False}, {"pool": "mean"}, {"preset": "tiny", "image_size": 8},
    {"dim": 192, "num_heads": 3, "mlp_dim": 768}, {"dim": 20, "mlp_dim": 36},
], ids=str)  # fmt: skip
def test_sizes_that_a_kernel_has_and_has_not(settings: dict[str, object]) -> None:
    model = build_model(**{"depth": 2, **settings})
    images = torch.randn(8, 3, *model.config.image_hw)
    wanted = results(model.train(), images)
    with taking("numba"):
        found = results(fast(model).train(), images)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_both_models_are_one() -> None:
    model = build_model(depth=2)
    quick = fast(model)
    assert list(quick.state_dict()) == list(model.state_dict())
    assert [id(p) for p in quick.parameters()] == [id(p) for p in model.parameters()]
    assert all(type(block) is Block for block in model.blocks)
    assert quick.eval()(torch.zeros(1, 3, 32, 32), return_maps=True)[1][0].shape == (1, 4, 65, 65)


def test_kernels_run_in_one_pass_a_layer() -> None:
    model = fast(build_model(depth=2).train())
    forget_used()
    with taking("numba"):
        model(torch.randn(16, 3, 32, 32)).sum().backward()
    assert {"norm_linear=numba", "add_linear=numba", "norm_mlp=numba", "softmax_attention=numba"} <= set(used())
    assert "norm_mlp=torch" in used(), "sixteen class tokens are too few for one pass"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("training", [True, False])
def test_every_submodule_of_the_plain_model_is_called(preset: str, training: bool) -> None:
    size = 224 if "224" in preset else 16
    model = build_model(preset, image_size=size, depth=2).train(training)
    called: Counter[str] = Counter()
    names = [name for name, m in model.named_modules() if name and not isinstance(m, nn.ModuleList)]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.update([name]))
    model(torch.randn(2, 3, size, size))
    wanted = dict.fromkeys(names, 1)
    for block in ("blocks.0", "blocks.1"):
        wanted[f"{block}.dropout"] = wanted[f"{block}.drop_path"] = 2  # after the attention, and after the MLP
    assert called == wanted


class Lora(nn.Module):
    """A linear layer with a trained addition of rank 2 (Hu et al., 2021)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def wrap(parent: nn.Module, name: str) -> None:
    setattr(parent, name, Lora(parent.get_submodule(name)))


def cut(parent: nn.Module, name: str) -> None:
    prune.random_unstructured(parent.get_submodule(name), "weight", amount=0.5)


def reparametrise(parent: nn.Module, name: str) -> None:
    parametrizations.weight_norm(parent.get_submodule(name))
    with torch.no_grad():
        parent.get_submodule(name).parametrizations.weight.original0.mul_(1.5)


LINEAR = [
    f"{part}" for part in ("patches.proj", "blocks.0.attention.qkv", "blocks.1.attention.out", "blocks.0.mlp.0",
                           "blocks.1.mlp.3", "head")
]  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("change", [wrap, cut, reparametrise])
def test_what_is_put_into_a_layer_counts_and_trains(change: Callable[[nn.Module, str], None], name: str) -> None:
    model, images = build_model(depth=2).train(), torch.randn(8, 3, 32, 32)
    before = model(images).detach()
    parent, _, last = name.rpartition(".")
    change(model.get_submodule(parent), last)
    quick = fast(model)
    assert kind_of(quick) == ("1 of 2 fast" if name.startswith("blocks") else "fast")
    for _ in range(2):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with taking("numba"):
            loss = quick(images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        layer = model.get_submodule(name)
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters() if p.requires_grad)
        optimizer.step()
    after = model(images).detach()
    assert (after - before).norm() > 1e-3 * before.norm()
    with taking("numba"):
        torch.testing.assert_close(quick(images).detach(), after, rtol=1e-4, atol=1e-4)


def test_a_listener_keeps_a_block_plain() -> None:
    for name in ("blocks.1", "blocks.1.norm1", "blocks.1.attention", "blocks.1.attention.qkv", "blocks.1.mlp",
                 "blocks.1.mlp.0", "blocks.1.mlp.1", "blocks.1.mlp.2",
        "blocks.1.dropout",
        "blocks.1.drop_path"):  # fmt: skip
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
            model, seen = build_model(depth=2).train(), Counter[str]()
            hook = lambda *_, name=name, seen=seen: seen.update([name])  # noqa: E731
            getattr(model.get_submodule(name), register)(hook)
            quick = fast(model)
            assert kind_of(quick) == "1 of 2 fast"
            quick(torch.randn(2, 3, 32, 32)).sum().backward()
            assert seen[name] == (2 if name.endswith(("dropout", "drop_path")) else 1)
    seen = Counter[str]()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.update([type(m).__name__]))
    try:
        fast(build_model(depth=2))(torch.randn(2, 3, 32, 32))
    finally:
        handle.remove()
    assert seen["GELU"] == 2


@pytest.mark.parametrize("spec", attention.available(own=True))
def test_in_training_the_class_token_alone_goes_on_after_the_last_attention(spec: str) -> None:
    model, images = fast(build_model("vit-48x4", attention=spec)), torch.randn(4, 3, 32, 32)
    tokens: list[int] = []
    model.blocks[-1].register_forward_hook(lambda _, args, out: tokens.append(out.shape[1]))
    in_training = results(model.train(), images)
    whole = results(model.eval(), images)
    assert tokens == [1, 65]
    assert (in_training - whole).norm() <= 1e-5 * whole.norm()


def test_all_tokens_go_on_where_they_are_read() -> None:
    tokens: list[int] = []
    for pool, gradients in (("mean", True), ("cls", False)):
        model = fast(build_model("vit-48x4", pool=pool)).train()
        model.blocks[-1].register_forward_hook(lambda _, args, out: tokens.append(out.shape[1]))
        with torch.set_grad_enabled(gradients):
            model(torch.randn(2, 3, 32, 32))
    assert tokens == [64, 65]


def test_dropout_is_not_forgotten() -> None:
    for settings in ({"dropout": 0.5}, {"drop_path": 0.5}):
        model, images = fast(build_model(**settings)).train(), torch.randn(8, 3, 32, 32)
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


def test_fp16_on_a_cpu_is_computed_by_the_plain_block() -> None:
    model, images = build_model(dim=192, num_heads=3, mlp_dim=768, depth=2).eval(), torch.randn(8, 3, 32, 32)
    with torch.autocast("cpu", torch.float16), torch.no_grad(), taking("numba"):
        forget_used()
        assert torch.equal(fast(model)(images), model(images))
    assert not [line for line in used() if line.endswith("numba")]


def test_without_kernels_the_model_is_plain() -> None:
    model = build_model(depth=2)
    with switched("off"):
        assert fast(model) is model
    assert isinstance(fast(model).blocks[0], FastBlock)


def test_multiply_adds_are_counted_alike() -> None:
    # All four blocks in evaluation; in training the last one's class tokens are too few for one pass.
    for training, blocks in ((False, 4), (True, 3)):
        model, images, macs = fast(build_model()).train(training), torch.randn(8, 3, 32, 32), []
        for forms in (("numba",), ("torch", "numba")):
            with taking(*forms):
                step = count(lambda model=model, images=images: model(images).sum().backward())
                macs.append((counted_macs(model, images), step.macs))
        one_pass, apart = macs
        assert one_pass[0] == apart[0]
        # Backward, the MLP's first product is computed again: 65 tokens, 48 numbers, 192 hidden ones.
        assert one_pass[1] - apart[1] == 8 * 65 * 48 * 192 * blocks
