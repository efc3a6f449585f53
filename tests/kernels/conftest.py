"""Without numba, what tests its kernels alone has nothing to test."""

from __future__ import annotations

from vitcmp.kernels import mode, no_numba

collect_ignore = ["test_compiling.py", "test_simd.py", "test_threads.py"] if no_numba() else []
if no_numba() or mode() == "off":
    collect_ignore += ["test_layers_in_one_pass.py", "test_operators.py", "test_rows.py", "test_entmax_triton.py"]
