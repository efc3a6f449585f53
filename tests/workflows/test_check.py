"""`vitcmp check` finds what is wrong with a mechanism, and nothing else."""

from pathlib import Path

import pytest

from vitcmp import attention
from vitcmp.workflows import check

RIGHT = '''"""Linear attention, as it is in vitcmp, in a file of its own."""
from dataclasses import dataclass
import torch
from torch import nn
from vitcmp.attention import MultiHead, linear

ROW_STOCHASTIC = True

@dataclass(frozen=True)
class Config:
    pass

class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = MultiHead(layer, linear.LinearAttention(1e-6))
        self.core = self.inner.core

    def forward(self, x):
        return self.inner(x)

def build(layer, config):
    return Block(layer)

def macs(layer, config):
    return 2 * layer.grid.num_tokens * layer.dim * layer.head_dim
'''

WRONG = {
    "mixes the batch": ("return self.inner(x)", "return self.inner(x) + x.mean(dim=0)", {"batch": ""}),
    "counts too few": ("return 2 *", "return", {"macs": ""}),
    "hits an operation that no counter knows": (
        "return self.inner(x)", "return self.inner(x) + 0 * x.prod(dim=-1, keepdim=True)",
        {"macs": "aten.prod.dim_int is neither counted nor known"},
    ),
    "knows places and does not say so": (
        "return self.inner(x)", "return self.inner(x) + torch.arange(x.shape[1]).view(-1, 1).to(x)",
        {"permutation": ""},
    ),
    "has a parameter that is not used": (
        "self.core = self.inner.core", "self.core = self.inner.core; self.idle = nn.Parameter(torch.ones(2))",
        {"parameters": ""},
    ),
    "claims rows that are weights": (
        "linear.LinearAttention(1e-6)", "linear.LinearAttention(1.0)", {"rows": ""},
    ),
    "returns another number format": (
        "return self.inner(x)", "return self.inner(x).float()",
        {"sizes": "", "gradients": ""},
    ),
    "draws in evaluation": (
        "return self.inner(x)", "return self.inner(x) * torch.rand(())",
        {"repeatable": "", "batch": "", "permutation": "", "gradients": "", "state": "", "compiled": ""},
    ),
    "has no core": (
        "self.core = self.inner.core", "pass",
        dict.fromkeys(("map", "rows", "half precision", "large inputs"), "AttributeError"),
    ),
}  # fmt: skip


def findings_of(path: Path, text: str) -> dict[str, check.Finding]:
    path.write_text(text)
    return {finding.check: finding for finding in check.run(str(path))}


def test_a_right_one_passes(tmp_path: Path) -> None:
    heard: list[check.Finding] = []
    (tmp_path / "right.py").write_text(RIGHT)
    findings = check.run(str(tmp_path / "right.py"), heard.append)
    assert findings == heard
    assert [f.check for f in findings] == list(check.CHECKS) == list(check.MEANING)
    assert [f for f in findings if not (f.holds and f.applies)] == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_fails_just_there(name: str, tmp_path: Path) -> None:
    old, new, wanted = WRONG[name]
    assert RIGHT.count(old) == 1
    found = {k: f for k, f in findings_of(tmp_path / "wrong.py", RIGHT.replace(old, new)).items() if not f.holds}
    assert found.keys() == wanted.keys()
    for check_name, note in wanted.items():
        assert note in found[check_name].note
        assert "\n" not in found[check_name].note
        measured = found[check_name].measured
        assert measured is None if note else measured is not None


def test_what_does_not_apply_says_why(tmp_path: Path) -> None:
    text = RIGHT.replace("ROW_STOCHASTIC = True", "EQUIVARIANT = False")
    found = findings_of(tmp_path / "right.py", text)
    for name in ("rows", "permutation"):
        assert (found[name].holds, found[name].applies, found[name].measured) == (True, False, None)
        assert found[name].note
    mapless = RIGHT.replace("ROW_STOCHASTIC = True", "NO_MAP = 'it mixes channels'").replace("self.core =", "other =")
    found = findings_of(tmp_path / "mapless.py", mapless)
    assert {name for name, f in found.items() if not f.applies} == {"map", "rows"}
    assert all(f.holds for f in found.values())
    assert found["map"].note == "no map: it mixes channels"


def test_an_unknown_one_is_bad_input() -> None:
    with pytest.raises(attention.AttentionError, match="did you mean"):
        check.run("sofmax")
