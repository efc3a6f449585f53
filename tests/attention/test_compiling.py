"""What numba keeps of the kernels."""

from __future__ import annotations

import os
from pathlib import Path

from vitcmp.attention._kernels.compiling import forget_stale


def test_a_change_to_any_source_lets_go_of_the_kernels_compiled_before_it(tmp_path: Path) -> None:
    def file(name: str, seconds: int) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (seconds, seconds))
        return path

    file("attention/_kernels/softmax.py", 1)
    file("models/_fused_cpu.py", 1)
    file("models/vit.py", 9)  # no part of any kernel
    caches = [
        file("attention/_kernels/__pycache__/softmax.forward.nbi", 2),
        file("models/__pycache__/_fused_cpu.gelu.nbi", 2),
    ]
    newer = file("attention/_kernels/__pycache__/entmax.forward.nbi", 4)
    forget_stale(tmp_path)
    assert all(path.exists() for path in caches)

    file("attention/_kernels/tiles.py", 3)
    forget_stale(tmp_path)
    assert not any(path.exists() for path in caches)
    assert newer.exists()
