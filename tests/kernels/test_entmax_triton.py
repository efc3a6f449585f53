"""Sparse attention on CUDA: its kernels run in Triton's interpreter on the CPU, and are compiled for real devices.

The interpreter multiplies the bits of bf16 numbers as if they were integers, so half precision is fp16 here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from attention_cases import relative
from torch import Tensor

from vitcmp.kernels.ops.entmax import attend_in_torch

pytest.importorskip("triton", reason="Triton, in which these kernels are written, is not installed")

# Batch, heads, tokens, head width, alpha (a number, or one a head), number format, standard deviation of q.
CASES = {
    "one token": (1, 1, 1, 1, 1.5, "float32", 1),
    "one block": (1, 2, 17, 16, 1.5, "float32", 1),
    "odd width": (2, 1, 100, 24, 1.5, "float32", 1),
    "full blocks": (1, 1, 128, 32, 1.5, "float32", 1),
    "flat rows": (1, 1, 80, 16, 1.5, "float32", 0.01),
    "sharp rows": (1, 1, 80, 16, 1.5, "float32", 30),
    "sparsemax": (1, 1, 100, 16, 2.0, "float32", 0.3),
    "another alpha": (1, 1, 100, 16, 1.25, "float32", 1),
    "learned alpha": (2, 2, 70, 16, [1.3, 1.8], "float32", 1),
    "half": (1, 1, 300, 24, 1.5, "float16", 1),
}


def errors(name: str) -> list[float]:
    """Of the output, and of the gradients of the projection and, where learned, alpha: relative, against fp64."""
    from vitcmp.kernels.triton.entmax import attend

    batch, heads, tokens, width, alpha, dtype, std = CASES[name]
    torch.manual_seed(0)
    # As a block's projection leaves them: no tensor of its own for each of q, k, v.
    projected = torch.randn(batch, tokens, 3, heads, width).to(getattr(torch, dtype)).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in projected.unbind(2))
    leaves, alphas = [projected], torch.tensor(alpha).expand(heads)
    if isinstance(alpha, list):
        alpha = alphas = alphas.clone().requires_grad_()
        leaves.append(alpha)
    found = attend(q * std, k, v, alpha)
    wanted = attend_in_torch(q.double() * std, k.double(), v.double(), alphas.double().view(1, -1, 1, 1), convex=True)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, leaves, upstream.to(y.dtype)) for y in (found, wanted))
    return [relative(f, w) for f, w in [(found, wanted), *zip(*gradients, strict=True)]]


def zeros_that_differ() -> float:
    """Share of the weights that are 0 here and not there."""
    from vitcmp.kernels.triton.entmax import attend

    q, k = (torch.randn(1, 1, 64, 64) for _ in "qk")
    identity = torch.eye(64).expand(1, 1, 64, 64)
    wanted = attend_in_torch(q.double(), k.double(), identity.double(), torch.full((1, 1, 1, 1), 1.5), convex=True)
    return float(((attend(q, k, identity, 1.5) == 0) != (wanted == 0)).double().mean())


def rows_of_nan() -> list[int]:
    """The rows without a number, where one query, then where one key has none."""
    from vitcmp.kernels.triton.entmax import attend

    counts = []
    for broken in (0, 1):
        inputs = [torch.randn(1, 1, 70, 16) for _ in "qkv"]
        inputs[broken][0, 0, 3, 0] = torch.nan
        counts.append(int(attend(*inputs, 1.5).isnan().any(dim=-1).sum()))
    return counts


def second_derivatives() -> float:
    """Error of the gradient of a gradient's norm."""
    from vitcmp.kernels.triton.entmax import attend

    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in "qkv")
    alphas = torch.full((1, 2, 1, 1), 1.5)

    def twice(y: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), k)[0]

    return relative(twice(attend(q, k, v, 1.5)), twice(attend_in_torch(q, k, v, alphas, convex=True)))


def operator_is_sound() -> bool:
    """Schema, shapes and strides told to the compiler, registration of the derivative."""
    from vitcmp.kernels.triton import entmax as kernels

    q, k, v = (torch.randn(2, 10, 2, 16).transpose(1, 2).requires_grad_() for _ in "qkv")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernels._attend.overload, (q, k, v, torch.full((2,), 1.5), 2), test_utils=checks)
    return True


@cache
def interpreted() -> dict[str, dict[str, list[float]]]:
    """All of the above from a process of its own: Triton interprets all kernels of a process or none."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_torch(name: str) -> None:
    # Large scores lose digits to their rounding, and alpha's gradient to the difference of nearly equal sums.
    tolerance = {"half": 1e-3, "sharp rows": 1e-4, "learned alpha": 1e-5}.get(name, 3e-6)
    assert max(interpreted()["errors"][name]) < tolerance


def test_zeros_are_exact_and_in_their_places() -> None:
    assert interpreted()["zeros_that_differ"] == 0


def test_a_diverged_model_shows() -> None:
    assert interpreted()["rows_of_nan"] == [1, 70]


def test_second_derivatives() -> None:
    assert interpreted()["second_derivatives"] < 1e-5


def test_the_compiler_is_told_the_truth() -> None:
    assert interpreted()["operator_is_sound"]


def shared_memory(kernel: str, capability: int, dtype: torch.dtype, width: int, r: int, tokens: int) -> int:
    """Bytes that a kernel takes, compiled for a device that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vitcmp.kernels.triton import entmax as kernels

    function = getattr(kernels, kernel)
    sizes = kernels._sizes(tokens, width, dtype, forward=kernel == "_forward")
    constants = sizes | {"STEPS": kernels.STEPS, "R": r, "WITH_ALPHA": r == 0}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    wide = ("top_at", "tau_at", "mean_at", "alpha_at", "dalpha_at")
    types = {
        name: "constexpr" if name in constants
        else "fp32" if name in ("scale", "tolerance")
        else "*fp32" if name in wide
        else pointer if name.endswith("_at")
        else "i32"
        for name in function.arg_names
    }  # fmt: skip
    # As a launch finds them: addresses and strides are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(types)
        if types[name] != "constexpr" and name not in ("heads", "tokens", "scale", "tolerance")
    }
    source = ASTSource(function, types, constants, aligned)
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


KERNELS = ["_forward", "_backward_queries", "_backward_keys"]
LIMITS = {80: 99 * 1024, 90: 227 * 1024}
"""Shared memory of a block; 8.6 and 8.9, which run the same code as 8.0, have less than that."""


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert 0 < shared_memory(kernel, 90, torch.bfloat16, 64, 2, 1024) <= LIMITS[90]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [65, 1024])
@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", LIMITS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_all_kernels_compile_and_fit(
    kernel: str, capability: int, dtype: torch.dtype, width: int, r: int, tokens: int,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert shared_memory(kernel, capability, dtype, width, r, tokens) <= LIMITS[capability]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({
        "errors": {name: errors(name) for name in CASES}, "zeros_that_differ": zeros_that_differ(),
        "rows_of_nan": rows_of_nan(), "second_derivatives": second_derivatives(),
        "operator_is_sound": operator_is_sound(),
    }))  # fmt: skip
