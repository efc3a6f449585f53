"""The door: one `Operator` for each piece of fast code, through which every call to it goes."""

from __future__ import annotations

import inspect
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcmp.kernels import forms as profiles
from vitcmp.kernels import switch
from vitcmp.kernels._torch import constant_when_compiled, transforms_are_active
from vitcmp.kernels.shapes import Shapes

COMPILED = "numba"
"""The name of the form that a kernel computes."""

_operators: dict[str, Operator] = {}
_used: dict[str, set[str]] = {}


class Operator:
    """One operator: its reference, its other forms, the shapes it takes, and the rules by which a call is answered.

    `forms`: functions of the same arguments, by name, which compute the same to rounding; the first one is the
    reference, in torch alone, and takes whatever torch takes. The form `numba` is a compiled kernel for the CPU.
    `accepts(*args)`: whether the kernel is made for these arguments (beyond plain tensors on the CPU, not empty).
    `sizes(*args)`: what a form's speed depends on, as in `forms.Cell`.
    `unmeasured(dtype, trains)`: the forms to take where nothing was measured, the best first.
    `example(dtype, sizes)`: arguments, random but the same each time.
    `dtypes`, `grid`: number formats and sizes at which `vitcmp doctor --measure` times the forms.
    `tolerance`: the error of the kernel, relative, that is rounding.
    `has_gradient`: whether the kernel has a backward pass.
    `left_out`: forms that are taken only where the caller asks for them. `unless`: arguments for which a form is not
    taken otherwise.
    `dtype(*args)`: the number format of the products, that of the first argument unless given.
    """

    def __init__(
        self,
        name: str,
        shapes: str,
        forms: Mapping[str, Callable[..., Tensor]],
        *,
        accepts: Callable[..., bool],
        sizes: Callable[..., tuple[int, ...]],
        example: Callable[[torch.dtype, tuple[int, ...]], tuple[Any, ...]],
        grid: Sequence[tuple[int, ...]],
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        unmeasured: Callable[[torch.dtype, bool], Sequence[str]] | None = None,
        tolerance: Mapping[torch.dtype, float] | None = None,
        has_gradient: bool = True,
        left_out: Sequence[str] = (),
        unless: Mapping[str, Callable[..., bool]] | None = None,
        dtype: Callable[..., torch.dtype] = lambda x, *rest: x.dtype,
    ) -> None:
        self.name, self.forms, self.accepts, self.sizes, self.dtype = name, dict(forms), accepts, sizes, dtype
        self.example, self.grid, self.dtypes = example, tuple(grid), tuple(dtypes)
        self.reference = next(iter(self.forms))
        self.choices = tuple(form for form in self.forms if form not in left_out)
        self.shapes = Shapes(name, shapes, list(inspect.signature(self.forms[self.reference]).parameters))
        self.unmeasured = unmeasured or (lambda dtype, trains: tuple(self.forms))
        self.tolerance = {
            torch.float64: 1e-10,
            torch.float32: 1e-5,
            torch.float16: 5e-3,
            torch.bfloat16: 2e-2,
            **(tolerance or {}),
        }
        self.has_gradient, self.unless = has_gradient, unless or {}
        _operators[name] = self

    def __call__(self, *args: Any, form: str = "auto") -> Tensor:
        """The result, by the form asked for, or the one that is quickest here.

        Raises: ShapeError for shapes that torch would refuse; KernelError in strict mode where a kernel was to run and
        cannot.
        """
        args = self.shapes.fit(args)
        if form == "auto":
            form = self.quickest(*args)
        elif form == COMPILED and not self.can_compile(*args):
            if switch.mode() == "strict" and not self._takes(args):
                raise switch.KernelError(
                    f"{self.name}: the kernel is not made for these tensors; leave the form at auto"
                )
            form = self.reference
        _note(self.name, form)
        if form != COMPILED:
            return self.forms[form](*args)
        try:
            return self.forms[form](*args)
        except Exception as error:
            if switch.out_of_memory(error) or isinstance(error, switch.KernelError):
                raise
            # Where the reference raises too, the fault is the caller's and not the kernel's.
            out = self.forms[self.reference](*args)
            switch.fails(self.name, f"its kernel failed ({type(error).__name__}: {error})".splitlines()[0])
            _note(self.name, self.reference)
            return out

    def quickest(self, *args: Any) -> str:
        """The form that a call with these arguments takes."""
        q = args[0]
        dtype, trains = self.dtype(*args), _trains(args)
        order = _order(self.name, dtype, trains, self.sizes(*args)) if q.device.type == "cpu" else self._elsewhere(q)
        for form in order:
            if self.can_compile(*args) if form == COMPILED else form not in self.unless or not self.unless[form](*args):
                return form
        return self.reference

    def can_compile(self, *args: Any) -> bool:
        """Whether the kernel takes these arguments, and runs on this machine.

        Raises: KernelError in strict mode where it takes them, and does not run.
        """
        return switch.mode() != "off" and self._takes(args) and _is_ready(self.name, self.dtype(*args), _trains(args))

    def _takes(self, args: tuple[Any, ...]) -> bool:
        return COMPILED in self.forms and _are_plain(args) and self.accepts(*args) and not transforms_are_active()

    def _elsewhere(self, q: Tensor) -> Sequence[str]:
        return [form for form in self.unmeasured(q.dtype, False) if form != COMPILED]

    def run(self, form: str, args: tuple[Any, ...], upstream: bool) -> list[Tensor]:
        """The result of one form, and with `upstream` the gradients of the result's sum of squares."""
        leaves = leaves_of(args, upstream)
        with torch.set_grad_enabled(upstream):
            out = self.forms[form](*leaves)
        if not upstream:
            return [out.detach()]
        wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
        return [out.detach(), *(g for g in gradients if g is not None)]

    def self_test(self, dtype: torch.dtype, trains: bool) -> float:
        """The largest error of the kernel, relative to the reference in fp64, in the output and all gradients."""
        args = self.example(dtype, self.grid[0])
        trains = trains and self.has_gradient
        exact = self.run(self.reference, tuple(_to_fp64(x) for x in args), trains)
        found = self.run(COMPILED, args, trains)
        errors = [
            (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)
            for a, b in zip(found, exact, strict=True)
        ]
        return max(float(error.nan_to_num(nan=torch.inf)) for error in errors)


def leaves_of(args: tuple[Any, ...], trains: bool) -> list[Any]:
    """The arguments, tensors of numbers as leaves that want a gradient, if it trains."""
    return [x.detach().requires_grad_(trains and x.is_floating_point()) if isinstance(x, Tensor) else x for x in args]


def can_run(operator: Operator, args: tuple[Any, ...], dtype: torch.dtype, trains: bool) -> bool:
    """Whether the kernel takes these arguments, with gradients if it trains, and runs on this machine."""
    return operator._takes(args) and _is_ready(operator.name, dtype, trains)


def operators() -> dict[str, Operator]:
    """All operators, by name."""
    from vitcmp.kernels import ops  # noqa: F401  they register themselves

    return dict(sorted(_operators.items()))


def used() -> list[str]:
    """What ran in this process since `forget_used`: `softmax_attention=numba`, one line an operator and form."""
    return sorted(f"{name}={form}" for name, found in _used.items() for form in found)


def forget_used() -> None:
    """Begin a new list."""
    _used.clear()


def _note(name: str, form: str) -> None:
    if not torch.compiler.is_compiling():
        _used.setdefault(name, set()).add(form)


def _trains(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether all tensors are strided ones on the CPU, and hold numbers."""
    traced = torch.compiler.is_compiling()  # which can't ask for the sign bit
    return all(
        x.device.type == "cpu" and x.numel() > 0 and x.layout == torch.strided and (traced or not x.is_neg())
        for x in args
        if isinstance(x, Tensor)
    )


def _to_fp64(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@constant_when_compiled
def _order(name: str, dtype: torch.dtype, trains: bool, sizes: tuple[int, ...]) -> tuple[str, ...]:
    """The forms of an operator, the quickest first."""
    profile = profiles.active()
    key = (profile.digest, name, dtype, trains, sizes)
    if key not in _orders:
        operator = _operators[name]
        found = profile.order(name, profiles.FORMATS.get(dtype, ""), profiles.MODES[trains], sizes)
        known = [form for form in found if form in operator.forms]
        _orders[key] = tuple(dict.fromkeys([*known, *operator.unmeasured(dtype, trains)]))
    return _orders[key]


_orders: dict[Any, tuple[str, ...]] = {}


@constant_when_compiled
def _is_ready(name: str, dtype: torch.dtype, trains: bool) -> bool:
    """Whether the kernel of an operator compiles here, and has been found to compute what its reference does.

    The test is made once for a state of the kernels, the versions and the CPU; its outcome is kept beside the kernels.
    Raises: KernelError in strict mode where it does not.
    """
    if why := switch.reason(name):
        if switch.mode() == "strict":
            switch.fails(name, why)
        elif switch.no_numba():
            switch.warn(f"{why}; references compute the same, more slowly")
        return False
    key = f"{name} {profiles.FORMATS.get(dtype, '')} {profiles.MODES[trains]}"
    if key not in _tested:
        # A second lane of training waits for the first one's test.
        with _testing:
            if key in _under_test:
                return True  # the kernel's own calls, which are part of the test, go through this door too
            if key not in _tested:
                _under_test.add(key)
                try:
                    _tested[key] = _outcome(name, key, dtype, trains)
                finally:
                    _under_test.discard(key)
    if _tested[key]:
        switch.fails(name, _tested[key])
    return not _tested[key]


_testing = threading.RLock()
_under_test: set[str] = set()
_tested: dict[str, str] = {}
"""Of kernels that were tested, or are known to have been: what is wrong, or nothing."""


def _outcome(name: str, key: str, dtype: torch.dtype, trains: bool) -> str:
    """What a kernel's test says, from the file beside the kernels if it is there; empty where all is right."""
    from vitcmp.kernels.numba.compiling import CACHE, environment

    path = CACHE / f"tested-{environment()}.json"
    if _known(path).get(key) == "":
        return ""
    outcome = test(name, dtype, trains)
    try:
        known = _known(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**known, key: outcome}, indent=1))
        temporary.replace(path)
    except OSError:
        pass  # where nothing can be kept, it is tested in every process
    return outcome


def _known(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def test(name: str, dtype: torch.dtype, trains: bool) -> str:
    """What is wrong with an operator's kernel on this machine; empty where it agrees with its reference."""
    operator = _operators[name]
    try:
        with torch.autocast("cpu", enabled=False), torch.inference_mode(False):
            error = operator.self_test(dtype, trains)
    except Exception as failure:
        if switch.out_of_memory(failure):
            raise
        return f"its kernel does not compile or run ({type(failure).__name__}: {failure})".splitlines()[0]
    bound = operator.tolerance[dtype]
    return "" if error <= bound else f"its kernel is off by {error:.1e}, where {bound:.0e} is rounding"
