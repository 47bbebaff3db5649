"""What a token of every identity costs at every home: known before anything of it is routed.

The identity of a token predicts its experts (Sem-MoE, arXiv:2503.04398). For every identity: what
its recorded tokens cost at every home (rows both ways, all layers, by tally.py), less the mean over
homes, shrunk to 0 where few were seen.

Axes: V vocabulary, M devices (homes), T tokens, S sequences.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Integer

from moe_jax.placement.homes import tally
from moe_jax.placement.problem import Problem

PRIOR = 8  # tokens without a preference that every identity is given
_CELLS = 1 << 23  # numbers that are counted at once


def cost_VM(
    problem: Problem,
    token_T: Integer[np.ndarray, " T"],
    device_LE: Int[np.ndarray, "L E"],
    vocab_size: int,
) -> Float[np.ndarray, "V M"]:
    """Rows of a token of each identity; 0 at every home for one that was not recorded.

    Args:
      problem: recorded sequences, with the machine and the dispatch.
      token_T: identities of its tokens, below `vocab_size`.
      device_LE: where experts are.
    """
    trace, topology, price = problem.trace, problem.topology, tally.prices_of(problem)
    order_T = np.argsort(token_T, kind="stable")
    count_V = np.bincount(token_T, minlength=vocab_size)
    known, end_V = np.flatnonzero(count_V), np.cumsum(count_V)
    total_VM = np.zeros((vocab_size, topology.num_devices))
    cells = trace.num_layers * (2 * topology.num_devices + topology.num_nodes)
    at_once = max(1, _CELLS // cells)
    for first in range(0, len(known), at_once):
        group = known[first : first + at_once]
        start, end = end_V[group[0]] - count_V[group[0]], end_V[group[-1]]
        of_group = dataclasses.replace(  # a sequence holds all tokens of one identity
            trace,
            expert_ids_TLK=trace.expert_ids_TLK[order_T[start:end]],
            seq_len=count_V[group].astype(np.int32),
            expert_weights_TLK=None,
            seq_home=None,
            seq_name=None,
            token_ids_T=None,
        )
        total_VM[group] = tally.cost_SM(tally.count(of_group, device_LE, topology), price)
    total_VM -= total_VM.mean(axis=1, keepdims=True)
    return total_VM / (count_V + PRIOR)[:, None]


def mean_SM(
    cost_VM: Float[np.ndarray, "V M"],
    token_T: Integer[np.ndarray, " T"],
    seq_len: Integer[np.ndarray, " S"],
) -> Float[np.ndarray, "S M"]:
    """What a token of each sequence costs, on average over its tokens."""
    start_S = np.cumsum(seq_len) - seq_len
    return np.add.reduceat(cost_VM[token_T], start_S) / seq_len[:, None]
