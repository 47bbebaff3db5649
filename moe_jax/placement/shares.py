"""The copy rule `stay`: the best expert where the token is, all else by shares that balance load.

Axes: L MoE layers, N nodes, P slots, E experts, W = 64 parts.

Shares are part of a placement: whole numbers `share_LNP` of shape [L, N + 1, P]. A token at home on
device h of node n, whose k-th expert is e:

1. k = 0 (the best expert) and e has a copy on h: that copy;
2. k = 0 otherwise: by row n of the shares;
3. k > 0: by row N, wherever the token is.

`by shares`: e's copies, in ascending slot order, divide W parts between them as their shares say
(every expert's shares add up to W in every row), and the token takes part `part_TK` of its position
in the batch: a multiplicative hash, so that neighbours spread. As with `local` (copies.py) nothing
depends on other tokens or on loads at run time. A layer whose shares are all 0 follows `local`.

Why: for transitions only the best expert's copy matters. The others are most of the load, so they
can even out what the best ones leave (the weighted split that LPLB solves for every batch, here
solved once: staying.py).
"""

from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from moe_jax.errors import Refused

PARTS = 64
FIELD = "copy_shares"


def part_TK(position_T: Integer[np.ndarray, " T"], top_k: int) -> Int[np.ndarray, "T K"]:
    """int64 in 0..W-1: the part that an assignment takes."""
    mixed_TK = position_T.astype(np.uint32)[:, None] * np.uint32(0x9E3779B1)
    mixed_TK = mixed_TK + np.arange(top_k, dtype=np.uint32) * np.uint32(0x85EBCA6B)
    return (mixed_TK >> np.uint32(26)).astype(np.int64)


def quantised(weight_XP: np.ndarray, expert_P: np.ndarray) -> np.ndarray:
    """int64 [X, P]: shares nearest to the weights, adding up to W for every expert and row.

    Largest remainders; an expert without any weight divides evenly.
    """
    share_XP = np.zeros(weight_XP.shape, np.int64)
    for expert in np.unique(expert_P):
        at = np.flatnonzero(expert_P == expert)
        part_XR = np.maximum(weight_XP[:, at], 0.0)
        total_X1 = part_XR.sum(axis=1, keepdims=True)
        part_XR = np.where(total_X1 > 0, part_XR / np.maximum(total_X1, 1e-300), 1.0 / len(at))
        whole_XR = np.floor(part_XR * PARTS + 1e-9).astype(np.int64)
        order_XR = np.argsort(whole_XR - part_XR * PARTS, axis=1, kind="stable")
        rank_XR = np.argsort(order_XR, axis=1, kind="stable")
        share_XP[:, at] = whole_XR + (rank_XR < PARTS - whole_XR.sum(axis=1, keepdims=True))
    return share_XP


def checked(share_LNP: Any, slots_LP: np.ndarray, num_experts: int) -> np.ndarray:
    """int32, read-only; anything that the rule cannot use is refused, naming the first entry."""
    share_LNP = np.asarray(share_LNP)
    layers, slots = slots_LP.shape
    shape = share_LNP.shape
    if share_LNP.dtype.kind not in "iu" or len(shape) != 3 or shape[0] != layers:
        raise Refused(FIELD, f"{share_LNP.dtype} {shape}", "whole numbers [L, N + 1, P]", "Solve")
    if shape[1] < 2 or shape[2] != slots:
        raise Refused(FIELD, shape, f"a row per node, one more, {slots} slots each", "Solve again")
    for layer, row_P in enumerate(slots_LP):
        if not share_LNP[layer].any():
            continue
        negative = np.argwhere(share_LNP[layer] < 0)
        if len(negative):
            row, slot = negative[0].tolist()
            where = f"{FIELD}[{layer}][{row}][{slot}]"
            raise Refused(where, int(share_LNP[layer, row, slot]), "at least 0", "Solve again")
        for row, share_P in enumerate(share_LNP[layer].astype(np.int64)):
            sum_E = np.bincount(row_P, weights=share_P, minlength=num_experts)
            if len(wrong := np.flatnonzero(sum_E != PARTS)):
                expert = int(wrong[0])
                raise Refused(
                    f"{FIELD}[{layer}][{row}] of expert {expert}",
                    int(sum_E[expert]),
                    f"the shares of an expert's copies add up to {PARTS}",
                    "Solve the plan again",
                )
    share_LNP = np.ascontiguousarray(share_LNP, np.int32).copy()
    share_LNP.flags.writeable = False
    return share_LNP


def read(rows: Any) -> np.ndarray | None:
    """From a plan file; None where it has none."""
    if rows is None:
        return None
    flat = rows
    for _ in range(2):
        if not isinstance(flat, list) or not all(isinstance(row, list) for row in flat):
            raise Refused(FIELD, type(rows).__name__, "lists [L][N + 1][P]", "Solve the plan again")
        if len({len(row) for row in flat}) > 1:
            raise Refused(FIELD, "ragged", "lists of equal lengths", "Solve the plan again")
        flat = [entry for row in flat for entry in row]
    for entry in flat:
        if type(entry) is not int or not 0 <= entry <= PARTS:
            raise Refused(FIELD, entry, f"whole numbers from 0 to {PARTS}", "Solve the plan again")
    return np.array(rows, np.int32)
