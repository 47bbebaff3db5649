"""Rows and loads of plans with copies where homes follow the layer before, in one walk.

Axes: T tokens, L MoE layers, K experts per token, M devices; S states, a token and where it is.

cost.py follows every home apart through all layers, once for rows and once for loads. Here all of
them walk at once (coherent dispatch): a state is a token, a device, and in how many of the M homes
it is there. Homes meet where a best expert has one copy, so that after the first layers there are
not many more states than tokens. In shuffled dispatch a token has one home in every layer, which
row_homes.py chooses.

Whole numbers until the end: what comes out is what cost.py counts (tests/placement/test_cost.py).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from moe_jax.placement import copies, cost, row_homes
from moe_jax.placement.nodes import DevicesPerNode
from moe_jax.placement.plan import Placement


class Counted(NamedTuple):
    """Means over homes.

    Attributes:
      rows: on the wire, one row per device (`partial`).
      load_LM: rows that every device computes.
    """

    rows: cost.Rows
    load_LM: Float[np.ndarray, "L M"]


def counted(
    expert_ids_TLK: Integer[np.ndarray, "T L K"],
    placement: Placement,
    dispatch: str,
    devices_per_node: DevicesPerNode | None = None,
    step_tokens: int | None = None,
) -> Counted:
    """Counts a plan with copies.

    Args:
      expert_ids_TLK: experts of every token; ids outside 0..E-1 mean "no expert".
      placement: which slots hold which experts.
      dispatch: one of cost.TIED.
      devices_per_node: for the copy rule; None is one node.
      step_tokens: tokens of a step, for `shuffled`; None: all are one step.
    """
    tokens, devices = len(expert_ids_TLK), placement.num_devices
    token_S = np.repeat(np.arange(tokens), devices)
    home_S, homes_S = np.tile(np.arange(devices), tokens), np.ones(tokens * devices)
    if dispatch == "shuffled":
        token_S, homes_S = np.arange(tokens), np.full(tokens, float(devices))
        home_S = row_homes.first(tokens, devices, step_tokens)
    there, back, load = [], [], []
    for layer in range(placement.num_layers):
        ids_SK = expert_ids_TLK[:, layer][token_S]
        table = copies.candidates(placement, layer, devices_per_node)
        slot_SK = table.slots_TK(ids_SK, home_S, token_S)
        device_SK = np.where(slot_SK < 0, cost.UNKNOWN, slot_SK // placement.slots_per_device)
        first_SK = cost.first_of(device_SK)
        real_SK = device_SK >= 0
        each_SK = np.broadcast_to(homes_S[:, None], device_SK.shape)
        load.append(np.bincount(device_SK[real_SK], each_SK[real_SK], devices))
        there.append(_pairs_MM(home_S, device_SK, first_SK, each_SK, devices))
        if dispatch == "shuffled":
            back.append(there[-1].T)
            first_TK = cost.first_copies_TK(expert_ids_TLK, placement, layer, device_SK)
            home_S = row_homes.balanced(first_TK, devices, step_tokens)
            continue
        home_S = np.where(real_SK[:, 0], device_SK[:, 0], home_S)
        back.append(_pairs_MM(home_S, device_SK, first_SK, each_SK, devices).T)
        token_S, home_S, homes_S = _met(token_S, home_S, homes_S, tokens, devices)
    rows = cost.Rows(np.stack(there) / devices, np.stack(back) / devices)
    return Counted(rows, np.stack(load) / devices)


def _pairs_MM(home_S, device_SK, sent_SK, each_SK, devices: int) -> np.ndarray:
    """[home, device]: rows in all M homes together, without those that stay."""
    at_SK = home_S[:, None] * devices + device_SK
    counts = np.bincount(at_SK[sent_SK], each_SK[sent_SK], devices * devices)
    pairs_MM = counts.reshape(devices, devices)
    np.fill_diagonal(pairs_MM, 0)
    return pairs_MM


def _met(token_S, home_S, homes_S, tokens: int, devices: int):
    """States of one token on one device are one."""
    sums = np.bincount(token_S * devices + home_S, homes_S, tokens * devices)
    at = np.flatnonzero(sums)
    return at // devices, at % devices, sums[at]
