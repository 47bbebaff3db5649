"""Kernels for Hopper."""

OLDEST_JAX = 0, 11  # that compiles all of them
COMPUTE_CAPABILITY = "9.0"  # Hopper's, as CUDA says it
