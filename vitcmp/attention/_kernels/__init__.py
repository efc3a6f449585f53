"""What numba compiles for the CPU: vectors (`simd`), products (`tiles`), kernels of mechanisms, and what runs them."""

import os

# Set before numba is imported. Kernels run as quickly as at its own level, 3, and are compiled sooner.
os.environ.setdefault("NUMBA_OPT", "2")
