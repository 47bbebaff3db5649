"""What a trace says about pairs of experts: load, co-activation, transitions.

Axes: T tokens, L MoE layers, E experts, K experts per token. All counts are exact int64.

- load: how many tokens chose an expert.
- co-activation: how many tokens chose both experts of a pair in the same layer (symmetric, zero
  diagonal). It decides on how many devices a token's experts lie.
- transitions: how many tokens chose expert e in layer l and expert f in layer l + 1, for the best
  expert of both (ExFlow, arXiv 2401.08383), for every pair of the K x K (MoETuner's R, arXiv
  2502.06643), or from the best expert to all K. A transition joins two layers of one token, so it
  never crosses the border of a sequence.
"""

import numpy as np
from jaxtyping import Int64

from moe_jax.routing.trace import Trace


def load_LE(trace: Trace) -> Int64[np.ndarray, "L E"]:
    """Tokens per expert."""
    experts = trace.num_experts
    return np.stack(
        [
            np.bincount(_bins(trace, layer).ravel(), minlength=experts + 1)[:experts]
            for layer in range(trace.num_layers)
        ]
    )


def coactivation_LEE(trace: Trace) -> Int64[np.ndarray, "L E E"]:
    """Tokens per unordered pair of experts of one layer; symmetric, zero diagonal."""
    counts_LEE = np.zeros((trace.num_layers, trace.num_experts, trace.num_experts), np.int64)
    for layer in range(trace.num_layers):
        ids_TK = _bins(trace, layer)
        for k in range(1, trace.top_k):
            for j in range(k):
                counts_LEE[layer] += _pairs(ids_TK[:, j], ids_TK[:, k], trace.num_experts)
    return counts_LEE + counts_LEE.transpose(0, 2, 1)


def transitions_top1_LEE(trace: Trace) -> Int64[np.ndarray, "pairs E E"]:
    """Tokens whose best expert is e in layer l and f in layer l + 1."""
    return _transitions(trace, 1, 1)


def transitions_all_LEE(trace: Trace) -> Int64[np.ndarray, "pairs E E"]:
    """Pairs (an expert of the token in layer l, one in layer l + 1), all K x K of them."""
    return _transitions(trace, trace.top_k, trace.top_k)


def transitions_best_to_all_LEE(trace: Trace) -> Int64[np.ndarray, "pairs E E"]:
    """Pairs (the token's best expert in layer l, any of its experts in layer l + 1)."""
    return _transitions(trace, 1, trace.top_k)


def _transitions(trace: Trace, from_k: int, to_k: int) -> np.ndarray:
    experts = trace.num_experts
    counts_LEE = np.zeros((trace.num_layers - 1, experts, experts), np.int64)
    for layer in range(trace.num_layers - 1):
        here_TK, next_TK = _bins(trace, layer), _bins(trace, layer + 1)
        for j in range(from_k):
            for k in range(to_k):
                counts_LEE[layer] += _pairs(here_TK[:, j], next_TK[:, k], experts)
    return counts_LEE


def _bins(trace: Trace, layer: int) -> np.ndarray:
    """int64 [T, K]: ids of one layer, "no expert" as one more expert at the end."""
    ids_TK = trace.expert_ids_TLK[:, layer, :]
    return np.minimum(ids_TK, trace.num_experts).astype(np.int64)


def _pairs(first_T: np.ndarray, second_T: np.ndarray, experts: int) -> np.ndarray:
    side = experts + 1
    counts = np.bincount(first_T * side + second_T, minlength=side * side)
    return counts.reshape(side, side)[:experts, :experts]
