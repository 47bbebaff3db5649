"""The exact objective of one layer after every swap of two experts, where layers are independent.

Axes: P pairs (e, f) of experts on different devices, M devices, N nodes.
"""

import numpy as np

from moe_jax.placement.problem import Problem


def scores_P(
    problem: Problem, layer: int, device_E: np.ndarray, e_P: np.ndarray, f_P: np.ndarray
) -> np.ndarray:
    """float64: the layer's objective after swapping e and f; inf above the load cap."""
    load_E, devices = problem.load_LE[layer], problem.num_devices
    pair_P = np.arange(len(e_P))
    load_M = np.bincount(device_E, weights=load_E, minlength=devices)
    load_PM = np.tile(load_M, (len(e_P), 1))
    load_PM[pair_P, device_E[e_P]] += load_E[f_P] - load_E[e_P]
    load_PM[pair_P, device_E[f_P]] += load_E[e_P] - load_E[f_P]
    if problem.objective == "hops":
        cost_EM = problem.hop_costs.whole_LEM[layer]
        here_P, there_P = device_E[e_P], device_E[f_P]
        more_P = cost_EM[e_P, there_P] + cost_EM[f_P, here_P]
        more_P = more_P - cost_EM[e_P, here_P] - cost_EM[f_P, there_P]
        scale = problem.trace.num_layers / problem.token_layers / problem.hop_costs.parts
        score_P = problem.layer_value(layer, device_E) + more_P * scale
    elif problem.objective == "load":
        relative_PM = load_PM / problem.topology.speed_M
        score_P = relative_PM.max(axis=1) / max(load_M.mean(), 1e-300)
    else:
        sets, node_E = problem.sets[layer], problem.topology.node_M[device_E]
        nodes = problem.topology.num_nodes
        touched_PM = sets.swapped_PM(device_E, devices, e_P, f_P)
        node_PN = np.tile(sets.touched_M(node_E, nodes), (len(e_P), 1))
        across_P = node_E[e_P] != node_E[f_P]
        if across_P.any():
            node_PN[across_P] = sets.swapped_PM(node_E, nodes, e_P[across_P], f_P[across_P])
        score_P = problem.scores(layer, touched_PM, node_PN, load_PM)
    score_P[problem.over(layer, load_PM)] = np.inf
    return score_P
