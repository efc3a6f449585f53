"""What numba keeps of the kernels, and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from vitcmp.kernels.numba.compiling import digest_of


def test_a_change_to_any_source_is_another_folder(tmp_path: Path) -> None:
    (tmp_path / "softmax.py").write_text("a = 1")
    (tmp_path / "tiles.py").write_text("b = 1")
    first = digest_of(tmp_path)
    (tmp_path / "notes.txt").write_text("no part of any kernel")
    assert digest_of(tmp_path) == first
    (tmp_path / "tiles.py").write_text("b = 2")
    assert digest_of(tmp_path) != first


def test_a_users_process_is_left_as_it_was() -> None:
    """numba's settings, the environment and torch's threads, before and after kernels are compiled."""
    code = """
import os, numba, torch
def state():
    return dict(os.environ), numba.config.CACHE_DIR, numba.config.OPT, torch.get_num_threads()
before = state()
from vitcmp import attention
block = attention.load("entmax").build(attention.LayerConfig(16, 2, attention.TokenGrid(4, 4)))
block(torch.randn(2, 16, 16)).sum().backward()
from vitcmp.kernels import used
assert used() == ["entmax_attention=numba"], used()
assert state() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
