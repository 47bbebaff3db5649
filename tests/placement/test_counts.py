"""Quick counts of plans with copies against cost.py, which follows every token from every home."""

import numpy as np
import pytest

from moe_jax.placement import cost, replication, tied_counts, uniform_counts
from moe_jax.placement import nodes as nodes_lib
from moe_jax.placement.plan import Placement
from tests.placement import instances

MACHINES = ((4, None), (4, 2), (3, None), (4, (1, 3)), (6, (1, 2, 3)))


def plan_of(seed: int, experts: int, devices: int) -> Placement:
    """Two layers; experts have from one copy to one on every device."""
    rng = np.random.default_rng(seed)
    slots = devices * int(rng.integers(experts // devices + 1, experts))
    return replication.balanced_slots(rng.lognormal(0, 2, (2, experts)), slots, devices)


def ids_of(seed: int, experts: int) -> np.ndarray:
    """60 tokens with up to one to four experts in each of two layers."""
    rng = np.random.default_rng([seed, 1])
    shape = {"num_tokens": 60, "num_layers": 2, "num_experts": experts, "top_k": 1 + seed % 4}
    trace = instances.tiny_trace(seed, **shape)
    return instances.with_gaps(trace, rng).expert_ids_TLK


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("devices", "per_node"), MACHINES)
@pytest.mark.parametrize("dispatch", uniform_counts.DISPATCHES)
def test_uniform_homes(dispatch, devices, per_node, seed, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(uniform_counts, "ENTRIES", 200)  # a few tokens at a time
        monkeypatch.setattr(uniform_counts, "BITS", 2)  # and a few homes
    nodes = nodes_lib.of(devices, per_node)
    experts, where = 2 * devices, tuple(nodes.size_N.tolist())
    ids_TLK, plan = ids_of(seed, experts), plan_of(seed, experts, devices)
    quick = uniform_counts.rows(ids_TLK, plan, dispatch, nodes)
    slow = cost.rows(ids_TLK, plan, dispatch, devices_per_node=where)
    np.testing.assert_array_equal(quick.dispatch_LMM, slow.dispatch_LMM)
    np.testing.assert_array_equal(quick.combine_LMM, slow.combine_LMM)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("devices", "per_node"), MACHINES)
@pytest.mark.parametrize("dispatch", cost.TIED)
def test_homes_that_follow_the_layer_before(dispatch, devices, per_node, seed):
    nodes = nodes_lib.of(devices, per_node)
    experts, where = 2 * devices, tuple(nodes.size_N.tolist())
    ids_TLK, plan = ids_of(seed, experts), plan_of(seed, experts, devices)
    step_tokens = (None, 25)[seed % 2]
    quick = tied_counts.counted(ids_TLK, plan, dispatch, where, step_tokens)
    slow = cost.rows(ids_TLK, plan, dispatch, devices_per_node=where, step_tokens=step_tokens)
    np.testing.assert_array_equal(quick.rows.dispatch_LMM, slow.dispatch_LMM)
    np.testing.assert_array_equal(quick.rows.combine_LMM, slow.combine_LMM)
    load_LM = cost.computed_LM(ids_TLK, plan, dispatch, None, where, None, step_tokens)
    np.testing.assert_allclose(quick.load_LM, load_LM, rtol=1e-12)
