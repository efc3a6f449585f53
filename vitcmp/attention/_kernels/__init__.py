"""What numba compiles for the CPU: vectors (`simd`), products (`tiles`), kernels of mechanisms, and what runs them."""
