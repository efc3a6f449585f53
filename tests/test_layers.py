"""Imports point one way: cli -> workflows -> models, data, metrics, store, render -> attention, configs -> kernels."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitcmp

ROOT = Path(vitcmp.__file__).parent
LEVELS = {
    "__main__": 0, "cli": 0, "console": 0, "options": 0,
    "workflows": 1,
    "plain_json": 3, "models": 2, "data": 2, "metrics": 2, "store": 2, "machine": 2, "render": 2,
    "attention": 3, "configs": 3,
    "kernels": 4,
}  # fmt: skip
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or inside, as a dotted name; of vitcmp also `vitcmp.part.name`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> list[str]:
    """The path inside vitcmp of `vitcmp.models.vit.ViT`; empty for `vitcmp.__version__` and other packages' names."""
    names = dotted.split(".")
    return names[1:] if names[0] == "vitcmp" and len(names) > 1 and names[1] in LEVELS else []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    own = path.with_suffix("").parts
    assert own[0] in LEVELS, f"{path} has no place in the layers"
    for dotted in imports(path):
        target = part_of(dotted)
        if not target or (target[0] == own[0] and own[0] in ("attention", "kernels")):
            continue
        assert LEVELS[target[0]] >= LEVELS[own[0]], f"{path} imports {dotted}"
        if own[0] == "attention":
            assert target[0] == "kernels", f"{path} imports {dotted}: attention knows kernels alone"
        assert own[0] != "kernels", f"{path} imports {dotted}: kernels know nothing of vitcmp"
        assert own[0] != "configs", f"{path} imports {dotted}: configs know nothing of vitcmp"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_private_interfaces_have_one_file_each(path: Path) -> None:
    """What a new version of numba, llvmlite or torch may move stands in one place."""
    for dotted in imports(path):
        private = re.match(r"(numba\.core|llvmlite|torch\.(\w+\.)*_\w|torch\._)", dotted)
        owner = path in (Path("kernels/_torch.py"), Path("kernels/numba/_numba.py"))
        assert owner or not private, f"{path} imports {dotted}"
    if path != Path("kernels/_torch.py"):
        assert not re.search(r"torch\._[a-zC]", (ROOT / path).read_text()), f"{path} uses a private name of torch"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_door_knows_what_is_compiled(path: Path) -> None:
    for dotted in imports(path):
        if dotted.startswith("vitcmp.kernels.numba") or dotted.split(".")[0] == "numba":
            assert path.parts[0] == "kernels", f"{path} imports {dotted}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "workflows"], ids=str)
def test_workflows_do_not_import_each_other(path: Path) -> None:
    own = path.with_suffix("").parts
    if own[-1] == "compare":  # it runs the others
        return
    others = {target[1] for target in map(part_of, imports(path)) if target[:1] == ["workflows"] and len(target) > 1}
    assert others <= {own[-1]}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "render"], ids=str)
def test_rendering_measures_nothing(path: Path) -> None:
    for dotted in imports(path):
        assert dotted.split(".")[0] not in ("torch", "torchvision"), f"{path} imports {dotted}"
        # What samples say is computed from them alone.
        if part_of(dotted)[:2] != ["metrics", "statistics"]:
            assert part_of(dotted)[:1] not in (["metrics"], ["models"], ["data"]), f"{path} imports {dotted}"


def test_the_rule_reads_something() -> None:
    """The checks above would pass if no import were found."""
    assert "vitcmp.attention._multihead.MultiHead" in imports(Path("attention/softmax.py"))
    assert part_of("vitcmp.attention._multihead.MultiHead") == ["attention", "_multihead", "MultiHead"]
    assert any(part_of(name)[:1] == ["workflows"] for name in imports(Path("cli.py")))
