"""The exact objective of one layer after every swap of two experts, where layers are independent.

Axes: P pairs (e, f) of experts on different devices, E experts, M devices, N nodes.
"""

import numpy as np

from moe_jax.placement import evidence
from moe_jax.placement.problem import Problem


def values_P(
    problem: Problem, layer: int, device_E: np.ndarray, e_P: np.ndarray, f_P: np.ndarray
) -> np.ndarray:
    """float64 [P]: the objective of a layer after swapping e and f; inf above its load cap."""
    devices, load_E = problem.num_devices, problem.load_LE[layer]
    load_PM = np.tile(np.bincount(device_E, weights=load_E, minlength=devices), (len(e_P), 1))
    pair = np.arange(len(e_P))
    load_PM[pair, device_E[e_P]] += load_E[f_P] - load_E[e_P]
    load_PM[pair, device_E[f_P]] += load_E[e_P] - load_E[f_P]
    if problem.objective == "hops":
        value_P = problem.layer_value(layer, device_E) + _more_hops(
            problem, layer, device_E, e_P, f_P
        )
    elif problem.objective == "load":
        value_P = evidence.over_mean(load_PM, problem.topology.speed_M)
    else:
        touched_PM = problem.sets[layer].swapped_PM(device_E, devices, e_P, f_P)
        node_PN = _nodes(problem, layer, problem.topology.node_M[device_E], e_P, f_P)
        value_P = problem.scores(layer, touched_PM, node_PN, load_PM)
    value_P[problem.over(layer, load_PM)] = np.inf
    return value_P


def _more_hops(problem: Problem, layer: int, device_E, e_P, f_P) -> np.ndarray:
    """float64 [P]: a swap moves two experts, each with a cost of its own per device."""
    cost_EM = problem.hop_costs.whole_LEM[layer]
    here_P, there_P = device_E[e_P], device_E[f_P]
    more_P = cost_EM[e_P, there_P] + cost_EM[f_P, here_P]
    more_P = more_P - cost_EM[e_P, here_P] - cost_EM[f_P, there_P]
    return more_P * (problem.trace.num_layers / problem.token_layers / problem.hop_costs.parts)


def _nodes(problem: Problem, layer: int, node_E, e_P, f_P) -> np.ndarray:
    """float64 [P, N]: contacts of nodes after each swap; swaps inside a node change none."""
    sets, nodes = problem.sets[layer], problem.topology.num_nodes
    node_PN = np.tile(sets.touched_M(node_E, nodes).astype(float), (len(e_P), 1))
    if problem.dispatch == "hierarchical":  # no other counts them
        away_P = node_E[e_P] != node_E[f_P]
        if away_P.any():
            node_PN[away_P] = sets.swapped_PM(node_E, nodes, e_P[away_P], f_P[away_P])
    return node_PN
