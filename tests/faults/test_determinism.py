"""Two runs, from the seed to the parameters, programs compiled anew: equal in every bit on CPU.

python -m pytest -s -m 'faults or not faults' tests/faults/test_determinism.py     # the table
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from moe_jax import mesh as mesh_lib
from moe_jax.kernels import grouped_matmul
from moe_jax.train import step as step_lib
from tests import tiny
from tests.faults import harness

STEPS = 4
ONE = {"data": 1, "expert": 1}
WIDE, DEEP = {"data": 2, "expert": 4}, {"data": 1, "expert": 8}
SQUARE = {"data": 2, "expert": 2}
NODES = {"data": 2, "node": 2, "expert": 2}
CASES = [  # dispatch, combine, mesh, kernels, other fields of the model; the first by default
    ("exchange", "exact", {"data": 1, "expert": 2}, "cpu"),
    ("exchange", "exact", WIDE, "cpu"),
    ("local", "exact", {"data": 8, "expert": 1}, "cpu"),
    ("local", "exact", ONE, "cpu"),
    ("local", "exact", ONE, "reference"),
    ("gathered", "exact", WIDE, "cpu"),
    ("gathered", "exact", DEEP, "reference"),
    ("exchange", "partial", WIDE, "cpu"),
    ("exchange", "reproducible", WIDE, "cpu"),
    ("exchange", "exact", DEEP, "cpu"),
    ("exchange", "exact", WIDE, "reference"),
    ("exchange", "exact", {"data": 4, "expert": 2}, "cpu"),
    ("exchange", "partial", {"data": 2, "fsdp": 2, "expert": 2}, "cpu"),
    ("exchange", "partial", {"data": 1, "expert": 4, "tensor": 2}, "cpu"),
    ("hierarchical", "exact", NODES, "cpu"),
    ("hierarchical", "partial", NODES, "cpu"),
    ("hierarchical", "reproducible", NODES, "reference"),
    ("shuffled", "exact", WIDE, "cpu"),
    ("shuffled", "partial", WIDE, "cpu"),
    ("exchange", "exact", SQUARE, "cpu"),
    ("gathered", "exact", SQUARE, "cpu"),
    ("hierarchical", "exact", {"data": 1, "node": 2, "expert": 4}, "cpu"),
    ("shuffled", "exact", {"data": 1, "fsdp": 2, "expert": 4}, "cpu"),
    ("local", "exact", ONE, "cpu", {"dtype": "bfloat16"}),
    ("gathered", "exact", WIDE, "cpu", {"dtype": "bfloat16"}),
    ("exchange", "exact", WIDE, "cpu", {"dtype": "bfloat16"}),
    ("exchange", "reproducible", WIDE, "cpu", {"dtype": "bfloat16"}),
    ("hierarchical", "partial", NODES, "cpu", {"dtype": "bfloat16"}),
    ("shuffled", "partial", WIDE, "cpu", {"dtype": "bfloat16"}),
    ("gathered", "exact", WIDE, "cpu", {"capacity_factor": 1.0}),
    ("exchange", "exact", WIDE, "cpu", {"capacity_factor": 1.0}),
    ("exchange", "partial", WIDE, "cpu", {"capacity_factor": -1.0}),
    ("hierarchical", "exact", NODES, "cpu", {"capacity_factor": 1.0}),
    ("exchange", "exact", WIDE, "cpu", {"overlap_degree": 2}),
    ("exchange", "partial", WIDE, "cpu", {"overlap_degree": 4}),
    ("hierarchical", "partial", NODES, "cpu", {"overlap_degree": 2}),
    ("exchange", "partial", WIDE, "cpu", {"wire_dtype": "float8_e4m3fn"}),
    ("exchange", "exact", WIDE, "cpu", {"top_k": 1}),
    ("exchange", "reproducible", WIDE, "cpu", {"top_k": 8}),
]


@pytest.fixture(autouse=True)
def nothing_is_found_compiled():
    """Programs that other tests have left in the cache would be the same ones twice."""
    before, hits = jax.config.jax_enable_compilation_cache, []

    def heard(event, **_):
        hits.extend([event] if "cache_hits" in event else [])

    monitoring.register_event_listener(heard)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
    monitoring.unregister_event_listener(heard)
    assert not hits


def run(config):
    """Bytes of parameters, moments, key, and of every step's losses and counts."""
    mesh = tiny.mesh(config)
    state = step_lib.initial_state(config, mesh)
    placement = tiny.random_placement(3, config.mesh.expert_devices)
    table = jax.tree.map(lambda t: mesh_lib.put_replicated(mesh, t), tiny.table(placement))
    step, kept = step_lib.build_step(config, mesh), []
    for n in range(STEPS):
        window = mesh_lib.put_batch(mesh, tiny.tokens(8, 17, seed=n))
        state, metrics = step(state, window, table)
        kept.append(metrics)
    keys = jax.tree.map(
        lambda leaf: (
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ),
        (state, kept),
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(keys)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.faults if n else ()) for n, case in enumerate(CASES)],
)
def test_two_runs_are_equal(case, monkeypatch):
    dispatch, combine, mesh, kernel, *others = case
    fields = others[0] if others else {}
    monkeypatch.setattr(grouped_matmul, "default_implementation", lambda device=None: kernel)
    fields = {"dispatch": dispatch, "combine": combine, **fields}
    config = tiny.config(mesh=mesh, **{f"model__{name}": fields[name] for name in fields})
    first = run(config)
    jax.clear_caches()
    second = run(config)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.items())
    others = [f"{name} {value}" for name, value in list(fields.items())[2:]]
    named = [dispatch, combine, shape, kernel, *others]
    harness.told(0, 0, first == second, f"twice, {', '.join(named)}")
    assert len(first) == len(second) > 40
    assert first == second


@pytest.mark.faults
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kernel", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
def test_kernels_of_other_platforms_twice(kernel, dtype):
    """By themselves: JAX 0.10 interprets none where it checks what varies over devices."""
    if kernel == "pallas_gpu_interpret" and jax.__version_info__ < (0, 12):
        pytest.skip(f"JAX {jax.__version__} does not interpret GPU kernels")
    groups, d_model, d_ff = 3, 128, 128
    sizes_G = jnp.array([40, 0, 57])
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(128, d_model), *[(groups, d_model, d_ff)] * 2, (groups, d_ff, d_model)]
    arrays = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]

    def total(*arrays):
        y_ND = grouped_matmul.grouped_ffn(*arrays, sizes_G, implementation=kernel)
        return jnp.sum(y_ND.astype(jnp.float32) ** 2), y_ND

    def bits():
        jax.clear_caches()
        grads, y_ND = jax.jit(jax.grad(total, (0, 1, 2, 3), has_aux=True))(*arrays)
        return [np.asarray(array).tobytes() for array in (*grads, y_ND)]

    first, second = bits(), bits()
    harness.told(0, 0, first == second, f"twice, experts alone, {kernel}, {arrays[0].dtype}")
    assert first == second


@pytest.mark.faults
def test_another_seed_is_another_run():
    first, other = (run(tiny.config(mesh=ONE, train__seed=seed)) for seed in (0, 1))
    assert first != other
