"""Counts against loops over tokens, and the planted and realistic traces."""

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.routing import affinity, synthetic
from moe_jax.routing.trace import Trace


def holey_trace(seed: int) -> Trace:
    """A small trace in which some tokens have fewer experts."""
    trace = synthetic.realistic(num_tokens=40, num_layers=3, num_experts=6, top_k=3, seed=seed)
    ids = trace.expert_ids_TLK.copy()
    ids[np.random.default_rng(seed).random(ids.shape) < 0.2] = 255
    return Trace(ids, 6, trace.seq_len)


@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_loops(seed):
    trace = holey_trace(seed)
    load = np.zeros((3, 6), int)
    together = np.zeros((3, 6, 6), int)
    top1, every, best_to_all = (np.zeros((2, 6, 6), int) for _ in range(3))
    for token in trace.expert_ids_TLK.tolist():
        for layer, chosen in enumerate(token):
            for e in chosen:
                if e == 255:
                    continue
                load[layer, e] += 1
                for f in set(chosen) - {e, 255}:
                    together[layer, e, f] += 1
        for layer in range(2):
            for j, e in enumerate(token[layer]):
                for k, f in enumerate(token[layer + 1]):
                    if 255 in (e, f):
                        continue
                    every[layer, e, f] += 1
                    best_to_all[layer, e, f] += j == 0
                    top1[layer, e, f] += j == k == 0
    np.testing.assert_array_equal(affinity.load_LE(trace), load)
    np.testing.assert_array_equal(affinity.coactivation_LEE(trace), together)
    np.testing.assert_array_equal(affinity.transitions_top1_LEE(trace), top1)
    np.testing.assert_array_equal(affinity.transitions_all_LEE(trace), every)
    np.testing.assert_array_equal(affinity.transitions_best_to_all_LEE(trace), best_to_all)


def test_planted_trace_stays_as_planted():
    trace, cluster_LE = synthetic.planted(
        num_tokens=20_000, num_layers=4, num_experts=8, num_clusters=4, stay=0.6, seed=0
    )
    cluster_TL = np.take_along_axis(cluster_LE.T, trace.expert_ids_TLK[:, :, 0], axis=0)
    stays = (cluster_TL[:, 1:] == cluster_TL[:, :-1]).mean()
    assert stays == pytest.approx(0.6 + 0.4 / 4, abs=0.01)


def test_planted_clusters_must_divide():
    with pytest.raises(Refused, match="num_clusters"):
        synthetic.planted(
            num_tokens=9, num_layers=2, num_experts=8, num_clusters=3, stay=0.5, seed=0
        )


def mutual_information(trace: Trace) -> float:
    """Of the best experts of adjacent layers, in nats, mean over pairs of layers."""
    joint = affinity.transitions_top1_LEE(trace) / trace.num_tokens
    apart = joint.sum(2, keepdims=True) * joint.sum(1, keepdims=True)
    logs = np.log(np.where(joint > 0, joint, 1.0) / np.where(joint > 0, apart, 1.0))
    return float((joint * logs).sum() / len(joint))


def test_realistic_trace_resembles_gpt_oss():
    """Load CV .71 was measured there; without affinity adjacent layers know nothing of another."""
    sizes = {"num_tokens": 20_000, "num_layers": 6, "num_experts": 32, "top_k": 4, "seed": 0}
    trace = synthetic.realistic(**sizes)
    load = affinity.load_LE(trace)
    assert (load.std(axis=1) / load.mean(axis=1)).mean() == pytest.approx(0.71, abs=0.12)
    assert mutual_information(trace) > 0.5
    assert mutual_information(synthetic.realistic(**sizes, affinity=0.0)) < 0.05
