"""Two runs, from the seed to the parameters, programs compiled anew: equal in every bit on CPU.

python -m pytest -s -m 'faults or not faults' tests/faults/test_determinism.py     # the table
"""

import jax
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
NODES = {"data": 2, "node": 2, "expert": 2}
CASES = [  # the first by default
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
    ("dispatch", "combine", "mesh", "kernel"),
    [pytest.param(*case, marks=pytest.mark.faults if n else ()) for n, case in enumerate(CASES)],
)
def test_two_runs_are_equal(dispatch, combine, mesh, kernel, monkeypatch):
    monkeypatch.setattr(grouped_matmul, "default_implementation", lambda device=None: kernel)
    config = tiny.config(mesh=mesh, model__dispatch=dispatch, model__combine=combine)
    first = run(config)
    jax.clear_caches()
    second = run(config)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.items())
    harness.told(0, 0, first == second, f"twice, {dispatch}, {combine}, {shape}, {kernel}")
    assert len(first) == len(second) > 40
    assert first == second


@pytest.mark.faults
def test_another_seed_is_another_run():
    first, other = (run(tiny.config(mesh=ONE, train__seed=seed)) for seed in (0, 1))
    assert first != other
