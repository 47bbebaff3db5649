"""Exact re-assignment along the chain of layers: it ends where no layer alone can be better."""

import numpy as np
import pytest

from moe_jax.placement import chain as chain_lib
from moe_jax.placement import ilp, priced, topology
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import synthetic

NEVER = 1e18


@pytest.mark.parametrize("cap", [None, "1.2x"])
@pytest.mark.parametrize("seed", range(3))
def test_no_layer_alone_can_be_better(seed, cap):
    trace = synthetic.realistic(
        num_tokens=600, num_sequences=8, num_layers=6, num_experts=32, top_k=2, seed=seed
    )
    load_cap = LoadCap.parse(cap) if cap else None
    problem = Problem(trace, topology.flat(4), "exflow", load_cap=load_cap)
    chain = problem.chain(problem.top1_LEE)
    rng = np.random.default_rng(seed)
    start_LE = problem.balanced_LE
    if cap is None:
        start_LE = np.stack([rng.permutation(row_E) for row_E in start_LE])
    end_LE = chain_lib.alternate(chain, start_LE, NEVER)
    assert chain.value(end_LE) > chain.value(start_LE)
    assert not chain.over_L(end_LE).any()
    for layer, device_E in enumerate(end_LE):
        benefit_EM = chain.benefit_EM(end_LE, layer, before=True, after=True)
        if cap is None:
            other_E = ilp.assign(benefit_EM)
        else:
            other_E = priced.assign(benefit_EM, chain.load_LE[layer], chain.cap_LM[layer])
        best, now = (benefit_EM[np.arange(32), e_E].sum() for e_E in (other_E, device_E))
        assert best <= now + 1e-9 * (1 + abs(benefit_EM).sum())
