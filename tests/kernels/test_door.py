"""The door of all operators: odd inputs, what takes over where a kernel cannot run, and what is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import needs_kernels, taking
from torch import Tensor

from vitcmp.kernels import (
    KernelError,
    KernelWarning,
    Operator,
    ShapeError,
    forget_used,
    operators,
    switch,
    switched,
    used,
)
from vitcmp.kernels import operator as door
from vitcmp.kernels.ops import softmax_attention
from vitcmp.kernels.shapes import Shapes

pytestmark = needs_kernels
B, H, N, M, K = 2, 3, 20, 33, 16
ATTENTION = {
    "softmax_attention": (), "sigmoid_attention": (-1.0,), "efficient_attention": (), "linear_attention": (1e-6,),
    "differential_attention": (torch.tensor(0.3),), "entmax_attention": (torch.full((1, 1, 1, 1), 1.5), True),
}  # fmt: skip
SHAPES = [
    [(B, H, N, K), (B, H, M, K), (B, H, M, K)],
    [(B, H, N, K), (B, 1, M, K), (B, 1, M, K)],
    [(B, H, N, K), (1, H, M, K), (1, H, M, K)],
    [(B, H, N, K), (1, 1, M, K), (B, H, M, K)],
    [(1, 1, N, K), (B, H, M, K), (B, H, M, K)],
    [(B, H, N, K), (H, M, K), (M, K)],
    [(N, K), (M, K), (M, K)],
    [(B, H, N, K), (B, H, M, K), (B, H, M - 1, K)],
    [(B, H, N, K), (B, H, M, K), (B, H, 1, K)],
    [(B, H, N, K), (B, H, M, K + 2), (B, H, M, K)],
    [(B, H, N, K), (B, H, M, K), (B, H, M, K + 2)],
    [(B, H, N, K), (B, H, M, K), (B, H, M, 1)],
    [(B, H, N, K), (B, 2, M, K), (B, 2, M, K)],
    [(B, H, N, K), (3, H, M, K), (3, H, M, K)],
    [(0, H, N, K), (0, H, M, K), (0, H, M, K)],
    [(B, 0, N, K), (B, 0, M, K), (B, 0, M, K)],
    [(B, H, 0, K), (B, H, M, K), (B, H, M, K)],
    [(B, H, N, K), (B, H, 0, K), (B, H, 0, K)],
    [(B, H, N, 0), (B, H, M, 0), (B, H, M, 0)],
    [(1, B, H, N, K), (1, B, H, M, K), (1, B, H, M, K)],
    [(K,), (K,), (K,)],
]
FORMATS = [
    (torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16,) * 3, (torch.float64,) * 3, (torch.int64,) * 3,
    (torch.float32, torch.bfloat16, torch.float32), (torch.float64, torch.float32, torch.float32),
]  # fmt: skip
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads side by side": lambda x: x.transpose(-3, -2).contiguous().transpose(-3, -2) if x.dim() > 2 else x,
    "channels apart": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "every second token": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :] if x.dim() > 1 else x,
    "inside of a larger one": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5] if x.dim() else x,
    "one image for all": lambda x: x[:1].expand_as(x) if x.dim() > 3 else x,
    "one token for all": lambda x: x[..., :1, :].expand_as(x) if x.dim() > 1 and x.shape[-2] else x,
}


def made(shapes: list[tuple[int, ...]], formats: tuple[torch.dtype, ...], layout: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(s, generator=generator).to(f) for s, f in zip(shapes, formats, strict=True))
    return [LAYOUTS[layout](x).requires_grad_(x.is_floating_point()) for x in tensors]


def broadcast(inputs: list[Tensor]) -> list[Tensor]:
    """As torch's product of matrices would."""
    try:
        outer = torch.broadcast_shapes(*(x.shape[:-2] for x in inputs))
    except RuntimeError:
        return inputs
    return [x.expand(*outer, *x.shape[-2:]) for x in inputs]


def result(call: Callable[..., Tensor], inputs: list[Tensor], rest: tuple[Any, ...]) -> list[Tensor] | Exception:
    """The output and the gradients of the inputs, or what was raised."""
    try:
        out = call(*inputs, *rest)
        leaves = [x for x in inputs if x.requires_grad]
        gradients = torch.autograd.grad(out.float().square().sum(), leaves, allow_unused=True) if leaves else ()
    except Exception as error:
        return error
    return [out.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("name", ATTENTION)
def test_odd_inputs_give_what_torch_gives_or_an_error_that_names_them(name: str) -> None:
    """Every shape in fp32, and every number format and layout of the first ones."""
    operator, rest, right, refused = operators()[name], ATTENTION[name], 0, 0
    cases = [(shapes, FORMATS[0], "contiguous") for shapes in SHAPES]
    cases += [(SHAPES[0], formats, "contiguous") for formats in FORMATS]
    cases += [(shapes, f, layout) for shapes, f, layout in product(SHAPES[:5], FORMATS[:2], LAYOUTS)]
    # entmax's kernel is for as many keys as queries.
    cases += [([(B, H, N, K)] * 3, f, layout) for f, layout in product(FORMATS[:2], LAYOUTS)]
    for shapes, formats, layout in cases:
        inputs, case = made(shapes, formats, layout), f"{shapes} {formats} {layout}"
        with taking("torch", "naive", "explicit", "merged"):
            plain = result(operator.forms[operator.reference], broadcast(inputs), rest)
            leaves = [x.detach().double().requires_grad_() for x in inputs]
            exact = result(lambda *x: operator.forms[operator.reference](*broadcast(list(x[:3])), *x[3:]), leaves, rest)
        with taking("numba"):
            found = result(operator, inputs, rest)
        if isinstance(found, Exception):
            named = all(str(tuple(x.shape)) in str(found) for x in inputs)
            of_type = len(set(formats)) > 1 or formats[0] in (torch.int64, torch.float16)
            assert (isinstance(found, ShapeError) and named) or (of_type and isinstance(found, RuntimeError)), case
            refused += 1
            continue
        assert not isinstance(plain, Exception), f"{case}: torch says {plain}"
        assert not isinstance(exact, Exception), case
        bound = 5e-4 if set(formats) <= {torch.float32, torch.float64} else 4e-2
        assert found[0].dtype == formats[2], case
        for ours, wanted in zip(found, exact, strict=True):
            assert ours.shape == wanted.shape, case
            assert (ours.double() - wanted).norm() <= bound * (1 + wanted.norm()), case
        right += 1
    assert right > 60
    assert refused > 5


LAYERS = {
    "linear_gelu": ([(70, 48), (96, 48), (96,)], (False,)),
    "layer_norm": ([(700, 48), (48,), (48,)], (1e-6, False)),
    "norm_linear": ([(700, 48), (48,), (48,), (96, 48), (96,)], (1e-6, False)),
    "add_linear": ([(700, 96), (700, 48), (96, 48), (96,)], (False,)),
    "norm_mlp": ([(700, 48), (48,), (48,), (96, 48), (96,), (48, 96), (48,)], (1e-6, False)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_wrong_sizes_are_refused_by_name(name: str) -> None:
    operator, (shapes, rest) = operators()[name], LAYERS[name]
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x, lambda x: x.T.contiguous().T if x.dim() == 2 else x.repeat_interleave(2)[::2],
    ]  # fmt: skip
    for layout in layouts:
        inputs = [layout(torch.randn(s) / s[-1] ** 0.5).requires_grad_() for s in shapes]
        with taking("numba"):
            found = result(operator, inputs, rest)
        wanted = result(operator.forms["torch"], inputs, rest)
        assert isinstance(found, list)
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * (1 + theirs.norm())
    for place, dimension, change in product(range(len(shapes)), (0, -1), (-1, 1, None)):
        wrong = [list(s) for s in shapes]
        wrong[place][dimension] = 0 if change is None else wrong[place][dimension] + change
        if name != "add_linear" and place == 0 and dimension == 0:
            continue  # any number of rows
        inputs = [torch.randn(s) for s in wrong]
        with taking("numba"), pytest.raises(ShapeError) as caught:
            operator(*inputs, *rest)
        assert all(str(tuple(s)) in str(caught.value) for s in wrong)
    with taking("numba"):
        assert operator(*(torch.randn(0, s[1]) if i == 0 or (name, i) == ("add_linear", 1) else torch.randn(s)
                          for i, s in enumerate(shapes)), *rest).numel() == 0  # fmt: skip


def test_shapes_are_read() -> None:
    shapes = Shapes("test", "BHNK BHMK BHMC -> BHNC", ["q", "k", "v"])
    q, k, v = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 6, 5), torch.zeros(3, 6, 7)
    assert [tuple(x.shape) for x in shapes.fit((q, k, v, 0.5))[:3]] == [(2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)]
    assert shapes.fit((q, k, v, 0.5))[3] == 0.5
    with pytest.raises(ShapeError, match=r"test: q \(2, 3, 4, 5\), k \(2, 1, 6, 5\), v \(4, 7\) do not fit BHNK"):
        shapes.fit((q, k, torch.zeros(4, 7)))
    rows = Shapes("rows", "*D FD F -> *F", ["x", "weight", "bias"])
    assert rows.fit((torch.zeros(2, 3, 4), torch.zeros(5, 4), None))[2] is None
    with pytest.raises(ShapeError, match=r"weight \(5, 4\), bias \(4,\)"):
        rows.fit((torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(4)))


GUARDED = """
import ctypes, mmap, sys, torch
from attention_cases import taking
from vitcmp.kernels import operators

libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def guarded(x):
    # The same numbers, of which the last one is the last before a page that no one may read.
    size = x.numel() * x.element_size()
    pages = -(-size // page)
    space = mmap.mmap(-1, (pages + 1) * page)
    kept.append(space)
    address = ctypes.addressof(ctypes.c_char.from_buffer(space))
    assert libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    flat = torch.frombuffer(space, dtype=x.dtype, count=x.numel(), offset=pages * page - size)
    return flat.view(x.shape).copy_(x.detach())

def laid_out(x, heads_inside):
    if heads_inside and x.dim() == 4:
        return guarded(x.transpose(1, 2).contiguous()).transpose(1, 2)
    return guarded(x.contiguous())

SIZES = {"neighbour_attention": [(w, n, 5) for w in (1, 7, 33) for n in (17, 65)], "pseudo_inverse": [(3, 5), (17, 3)],
         "linear_gelu": [(7, 33, 1000)], "layer_norm": [(7, 5001), (33, 1000)],
         "norm_linear": [(16, 48, 701), (48, 144, 257)], "add_linear": [(48, 48, 701)], "norm_mlp": [(48, 96, 701)]}
ATTENTION = [(w, n, n) for w in (2, 8, 34, 64) for n in (1, 5, 17, 65)] + [(12, 1, 40), (12, 40, 3), (16, 18, 1043)]

name = sys.argv[1]
operator = operators()[name]
for dtype in operator.dtypes:
    for sizes in SIZES.get(name, ATTENTION):
        if name == "entmax_attention" and sizes[1] != sizes[2]:
            continue
        for heads_inside in (False, True):
            args = operator.example(dtype, sizes)
            args = [x[:2] if isinstance(x, torch.Tensor) and x.dim() == 4 and len(x) > 2 else x for x in args]
            args = [laid_out(x, heads_inside).requires_grad_(x.is_floating_point() and operator.has_gradient)
                    if isinstance(x, torch.Tensor) else x for x in args]
            args = [[guarded(y) for y in x] if isinstance(x, list) else x for x in args]
            with taking("numba"):
                assert operator.can_compile(*args), sizes
                out = operator(*args, form="numba")
            if operator.has_gradient:
                leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
                torch.autograd.grad(out, leaves, laid_out(torch.ones_like(out), heads_inside))
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are protected by Linux's mprotect")
@pytest.mark.parametrize("name", operators())
def test_no_kernel_reads_past_its_inputs(name: str) -> None:
    """Inputs and the output's gradient end at a page that cannot be read: a kernel that did would end the process."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", GUARDED, name], env=here(), capture_output=True)
    assert done.stdout == b"done\n", f"exit code {done.returncode}: {done.stderr.decode()[-500:]}"


def here() -> dict[str, str]:
    """The environment of a child that finds what the tests share."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


# What takes over.


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator whose kernel raises."""

    def fail(*args: Tensor) -> Tensor:
        raise RuntimeError("a loop that cannot be typed")

    monkeypatch.setitem(softmax_attention.forms, "numba", fail)
    monkeypatch.setattr(switch, "_broken", {})
    monkeypatch.setattr(switch, "_told", set())
    monkeypatch.setattr(door, "_tested", dict.fromkeys(["softmax_attention fp32 forward"], ""))
    return softmax_attention


def test_a_kernel_that_fails_gives_way_to_its_reference_with_one_warning(broken: Operator) -> None:
    q, k, v = torch.randn(3, 2, 2, 20, 8)
    with taking("numba"):
        forget_used()
        with pytest.warns(KernelWarning, match="a loop that cannot be typed.*; its reference computes the same"):
            found = broken(q, k, v)
        torch.testing.assert_close(found, broken.forms["naive"](q, k, v))
        assert "softmax_attention=naive" in used()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            broken(q, k, v)


def test_strict_mode_takes_no_reference_for_a_kernel(broken: Operator) -> None:
    q, k, v = torch.randn(3, 2, 2, 20, 8)
    with switched("strict"), taking("numba"), pytest.raises(KernelError, match="a loop that cannot be typed"):
        broken(q, k, v)


def test_memory_that_runs_out_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(*args: Tensor) -> Tensor:
        raise MemoryError("out of memory")

    monkeypatch.setattr(door, "_tested", dict.fromkeys(["softmax_attention fp32 forward"], ""))
    monkeypatch.setitem(softmax_attention.forms, "numba", grow)
    monkeypatch.setattr(switch, "_broken", {})
    with taking("numba"), pytest.raises(MemoryError):
        softmax_attention(*torch.randn(3, 2, 2, 20, 8))
    assert not switch._broken


def test_a_kernel_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = softmax_attention.forms["numba"]
    monkeypatch.setitem(softmax_attention.forms, "numba", lambda q, k, v: kernel(q, k, v) * 1.001)
    monkeypatch.setattr(switch, "_broken", {})
    monkeypatch.setattr(switch, "_told", set())
    monkeypatch.setattr(door, "_tested", {})
    monkeypatch.setattr("vitcmp.kernels.numba.compiling.CACHE", tmp_path)
    q, k, v = torch.randn(3, 2, 2, 20, 8)
    with taking("numba"), pytest.warns(KernelWarning, match=r"softmax_attention: its kernel is off by 1\.0e-03"):
        found = softmax_attention(q, k, v)
    torch.testing.assert_close(found, softmax_attention.forms["naive"](q, k, v))
    (kept,) = tmp_path.glob("tested-*.json")
    assert "off by" in json.loads(kept.read_text())["softmax_attention fp32 forward"]


def test_the_switch_turns_all_kernels_off() -> None:
    q, k, v = torch.randn(3, 2, 2, 20, 8)
    with switched("off"), taking("numba"):
        forget_used()
        softmax_attention(q, k, v)
        softmax_attention(q, k, v, form="numba")
    assert not [line for line in used() if "numba" in line]
    with pytest.raises(KernelError, match="VITCMP_KERNELS=none is unknown; available: auto, off, strict"):
        switched("none").__enter__()
    assert switch.mode() != "none"


WITHOUT = """
import sys, warnings
import torch
sys.path[:0] = [sys.argv[1]]
warnings.simplefilter("error")
from vitcmp import attention
from vitcmp.kernels import KernelError, KernelWarning, no_numba, switched, used
block = attention.load("entmax").build(attention.LayerConfig(16, 2, attention.TokenGrid(4, 4)))
x = torch.randn(2, 16, 16)
try:
    block(x)
except KernelWarning as told:
    print(told)
block(x).sum().backward()
print(used())
with switched("strict"):
    try:
        block(x)
    except KernelError as error:
        print(error)
"""


@pytest.mark.parametrize("way", ["no numba", "switched off"])
def test_without_numba_references_run_after_one_warning(way: str, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('not here')")
    path, more = (tmp_path, {}) if way == "no numba" else (tmp_path / "none", {"NUMBA_DISABLE_JIT": "1"})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, path], env=here() | more, capture_output=True, text=True, check=True
    )
    why = "ImportError: not here" if way == "no numba" else "NUMBA_DISABLE_JIT"
    warning, ran, error = done.stdout.splitlines()
    assert why in warning
    assert "references compute the same" in warning
    assert ran == "['entmax_attention=torch']"
    assert why in error
    assert "entmax_attention" in error
