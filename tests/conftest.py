"""Strict runtime for every test: 8 virtual CPU devices, no silent rank or dtype promotion."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu is installed to compile only: do not look for a TPU
# A program that several tests (or processes of one test) compile is compiled once a session.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the first process made
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="moe_jax-compiled-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs are mapped into memory in many pieces, and a process may have 65,530."""
    yield
    jax.clear_caches()
