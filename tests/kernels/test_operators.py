"""Our functions as operators of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DIM, make_block, make_layer, taking
from torch import Tensor

from vitcmp.attention._multihead import TokenGrid
from vitcmp.kernels._torch import TorchDispatchMode
from vitcmp.kernels.ops.softmax import attend
from vitcmp.kernels.tensors import joined


class Listener(TorchDispatchMode):
    """Notes the operations of a package that torch's dispatcher hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vitcmp":
            self.heard.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("softmax:impl=numba", {"softmax_attention", "softmax_attention_backward"}),
        ("sigmoid", {"sigmoid_attention", "sigmoid_attention_backward"}),
        ("differential", {"differential_attention", "differential_attention_backward"}),
        ("efficient", {"summed_attention", "summed_attention_backward"}),
        ("linear", {"summed_attention", "summed_attention_backward"}),
        ("entmax", {"entmax_attention", "entmax_attention_backward"}),
        ("local", {"listed_attention"}),
    ],
)
def test_past_the_dispatcher_and_through_it_operators_do_the_same(spec: str, names: set[str]) -> None:
    block = make_block(spec, make_layer(TokenGrid(8, 8, num_prefix_tokens=1)))
    x = torch.randn(2, 65, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    leaves = [x, *block.parameters()]

    def run() -> list[Tensor]:
        out = block(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    with taking("numba"):
        alone = run()
        with Listener() as listener:
            seen = run()
    assert listener.heard >= names
    for a, b in zip(alone, seen, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_one_projection_lie_together() -> None:
    x = torch.randn(3, 65, 3 * 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    projected = [y.unflatten(-1, (4, 12)).transpose(1, 2) for y in x.chunk(3, dim=-1)]
    apart = [y.detach().contiguous().requires_grad_() for y in projected]
    upstream = torch.randn(3, 4, 65, 12, generator=torch.Generator().manual_seed(1))
    together = torch.autograd.grad(attend(*projected)[0], projected, upstream)
    separate = torch.autograd.grad(attend(*apart)[0], apart, upstream)
    whole = joined([g.transpose(1, 2).flatten(2) for g in together])
    assert equals(whole, torch.cat([g.transpose(1, 2).flatten(2) for g in separate], dim=-1))


def equals(found: Tensor | None, wanted: Tensor) -> bool:
    return found is not None and torch.equal(found, wanted)


def test_what_does_not_lie_together_is_not_joined() -> None:
    x = torch.arange(120.0).view(2, 5, 12)
    first, second, third = x.chunk(3, dim=-1)
    assert equals(joined([first, second, third]), x)
    assert joined([first, third, second]) is None
    assert joined([first, second, third.clone()]) is None
    assert joined([first[:, :4], second[:, :4], third[:, :4]]) is None
    assert equals(joined([first[:1], second[:1], third[:1]]), x[:1])
    assert joined([first.contiguous(), second.contiguous(), third.contiguous()]) is None


def test_transforms_of_torch_go_through_a_block() -> None:
    block = make_block("softmax:impl=naive")
    merged = make_block("softmax:impl=merged")
    x = torch.randn(3, 17, DIM, generator=torch.Generator().manual_seed(0))
    for each in (block, merged):
        gradient = torch.func.grad(lambda image, block=each: block(image[None]).square().sum())
        separate = torch.stack([gradient(image) for image in x])
        assert torch.allclose(torch.func.vmap(gradient)(x), separate, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_block_is_no_constant() -> None:
    block = make_block("softmax:impl=numba")
    x, y = torch.randn(2, 2, 17, DIM, generator=torch.Generator().manual_seed(0))
    traced = torch.jit.trace(block, x, check_trace=False)
    assert torch.allclose(traced(y), block(y), atol=1e-6)
