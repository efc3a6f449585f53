"""What numba compiles for the CPU: vectors (`simd`), products (`tiles`), and the kernels. Imported by `ops` alone."""
