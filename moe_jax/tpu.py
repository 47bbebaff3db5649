"""TPU slices that are not there: what their compiler wants to find in the environment."""

# libtpu reads this once, when it is loaded: `os.environ.update(ENVIRONMENT)` before `import jax`.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run: no other process is in the way
}
