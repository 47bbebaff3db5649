"""Strict runtime for every test: 8 virtual CPU devices, no silent rank or dtype promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu is installed to compile only: do not look for a TPU

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
