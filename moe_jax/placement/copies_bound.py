"""Fewest rows of plans with copies, by counting: whatever the slots, and whatever the copy rule.

Axes: L MoE layers, E experts, M devices, P slots, s = P / M slots of a device, G groups (devices,
nodes, or devices of one place in their nodes), R copies of an expert.

A token with the experts S of a layer uses d groups; homes are uniform. Two arguments, the better
one counts, layer by layer:

- **Coverage.** No row leaves home's group only if S lies inside it. A group holds the copies in its
  slots, so summed over groups the tokens inside are, each counted by its experts, at most the sum
  over copies of what a copy can have around it: 1 / n of its tokens with n experts, and of those
  only pairs with its group's other slots, 1 / (n (n - 1)) each.
- **Companions.** d >= a(b) - b (pairs of S in one group), as in bounds.py, and a copy of i has as
  companions at most the other slots of its group. Of d groups home's own is free, where it has an
  expert of S: on average over homes this is at most (copies of S) / G, and at most 1.

Either way a layer's rows are at least a constant less a sum over copies, in which another copy of
an expert never adds more than the one before: one copy each and the P - E best of the others, at
most M of an expert, are as much as any plan has. Weak where groups are few and large.

Where there is time, a semidefinite relaxation of all devices together follows, set by set
(copies_homes.py); it is closer where groups are many and small.

Hierarchical dispatch, nodes being equal: rows between nodes are those of G = N nodes; inside nodes
home's place is free, in each of the N nodes. Whatever the nodes, a plan has as many rows as in
`exchange` at least: the relay gets one in place of the node's first device. Coherent dispatch:
d - 1 rows out and as many back, at least; shuffled dispatch as well, wherever its homes are.
"""

import dataclasses
import math

import numpy as np

from moe_jax.placement import bounds, copies_homes, cost
from moe_jax.placement.contacts import Sets
from moe_jax.placement.problem import Problem

SAFETY = 1 - 1e-9  # of sums of rounded numbers
ROUNDING = 1e-12  # rows of a token, of differences that may be 0


def fewest_rows(problem: Problem, deadline: float = -math.inf) -> float:
    """The objective `rows` of a plan with replicas is at least this.

    Past the deadline, of time.monotonic(), by counting alone.
    """
    counted_L = np.array([_layer_rows(problem, _Counts.of(sets)) for sets in problem.sets])
    homes = problem.dispatch not in cost.TIED
    fewest_L = copies_homes.fewest_L(problem, homes, deadline)
    if fewest_L is not None:
        if not homes:  # one of the devices is where the token waits, and one where it goes on
            fewest_L = fewest_L - [sets.count_Q.sum() for sets in problem.sets]
        counted_L = np.maximum(counted_L, _least_row(problem) * fewest_L)
    fewest = 2 * float(counted_L.sum()) / problem.token_layers
    return max(SAFETY * fewest - ROUNDING, 0.0)


def _least_row(problem: Problem) -> float:
    """What the cheapest row counts."""
    return min(problem.tier_ratio, 1.0) if problem.dispatch == "hierarchical" else 1.0


def _layer_rows(problem: Problem, counts: "_Counts") -> float:
    """One way, weighted by tier."""
    assert problem.num_slots is not None
    devices, nodes = problem.num_devices, problem.topology.nodes
    slots = problem.num_slots // devices
    copies = _Copies(problem.num_slots, devices)
    if problem.dispatch in cost.TIED:
        apart = counts.tokens - copies.most(counts.inside_E(slots))
        return max(apart, counts.beyond(copies, slots, devices, None), 0.0)
    flat = _least_row(problem) * max(
        counts.leaving(copies, slots, devices),
        counts.beyond(copies, slots, devices, None),
        counts.beyond(copies, slots, devices, 1 / devices),
        0.0,
    )
    if problem.dispatch == "hierarchical" and nodes.equal:
        each = devices // nodes.count
        slow = max(
            counts.leaving(copies, slots * each, nodes.count),
            counts.beyond(copies, slots * each, nodes.count, None),
            counts.beyond(copies, slots * each, nodes.count, 1 / nodes.count),
        )
        fast = max(
            counts.leaving(copies, slots * nodes.count, each),
            counts.beyond(copies, slots, devices, 1 / each),
        )
        return max(max(slow, 0.0) * problem.tier_ratio + max(fast, 0.0), flat)
    return flat


@dataclasses.dataclass(frozen=True)
class _Copies:
    """P slots, no expert more than once on one of M devices."""

    num_slots: int
    devices: int

    def most(self, gain_ER: np.ndarray) -> float:
        """Largest sum of gains: of every expert's first copy, and of all other slots.

        Args:
          gain_ER: of the first, second, ... copy, not rising; [E, 1] for the same gain of each.
        """
        gain_ER = np.broadcast_to(gain_ER, (len(gain_ER), self.devices))
        spare = self.num_slots - len(gain_ER)
        more = np.sort(gain_ER[:, 1:].ravel())[::-1][:spare]
        return float(gain_ER[:, 0].sum() + more.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class _Counts:
    """Tokens of one layer.

    Attributes:
      of_size_N: with so many experts.
      load_E: with this expert.
      alone_E: with no other expert.
      share_E: each counted 1 / n for n experts.
      pairs_EE: with both experts; zero diagonal.
      pair_share_EE: the same, each counted 1 / (n (n - 1)).
    """

    of_size_N: np.ndarray
    load_E: np.ndarray
    alone_E: np.ndarray
    share_E: np.ndarray
    pairs_EE: np.ndarray
    pair_share_EE: np.ndarray

    @classmethod
    def of(cls, sets: Sets) -> "_Counts":
        experts, node_QK = sets.num_experts, sets.expert_QK
        size_Q = (node_QK < experts).sum(axis=1)
        largest = node_QK.shape[1]
        pair_QKK = node_QK[:, :, None] * (experts + 1) + node_QK[:, None, :]

        def by_expert(weight_Q: np.ndarray) -> np.ndarray:
            weight_QK = np.broadcast_to(weight_Q[:, None], node_QK.shape)
            return np.bincount(node_QK.ravel(), weight_QK.ravel(), experts + 1)[:experts]

        def by_pair(weight_Q: np.ndarray) -> np.ndarray:
            weight_QKK = np.broadcast_to(weight_Q[:, None, None], pair_QKK.shape)
            flat = np.bincount(pair_QKK.ravel(), weight_QKK.ravel(), (experts + 1) ** 2)
            sums_EE = flat.reshape(experts + 1, experts + 1)[:experts, :experts]
            return sums_EE * ~np.eye(experts, dtype=bool)

        return cls(
            np.bincount(size_Q, sets.count_Q, largest + 1),
            by_expert(sets.count_Q),
            by_expert(sets.count_Q * (size_Q == 1)),
            by_expert(sets.count_Q / np.maximum(size_Q, 1)),
            by_pair(sets.count_Q),
            by_pair(sets.count_Q / np.maximum(size_Q * (size_Q - 1), 1)),
        )

    @property
    def tokens(self) -> float:
        return float(self.of_size_N[1:].sum())

    def inside_E(self, slots: int) -> np.ndarray:
        """[E, 1]: tokens inside a group of so many slots, as a copy of the expert counts them."""
        best_ES = -np.sort(-self.pair_share_EE, axis=1)[:, : slots - 1]
        return np.minimum(self.alone_E + best_ES.sum(axis=1), self.share_E)[:, None]

    def leaving(self, copies: _Copies, slots: int, groups: int) -> float:
        """Coverage: tokens less those inside home's group."""
        return self.tokens - copies.most(self.inside_E(slots)) / groups

    def beyond(self, copies: _Copies, slots: int, groups: int, free: float | None) -> float:
        """Companions: groups used, less home's own.

        Args:
          copies: that a plan has.
          slots: of a group.
          groups: G.
          free: what a copy of a token's experts adds to the chance that home's group is one of
            those used; None: it always is.
        """
        wide_EX = np.zeros((len(self.load_E), copies.devices * max(slots - 1, 1)))
        best_EE = -np.sort(-self.pairs_EE, axis=1)[:, : wide_EX.shape[1] if slots > 1 else 0]
        wide_EX[:, : best_EE.shape[1]] = best_EE
        near_ER = wide_EX.reshape(len(wide_EX), copies.devices, -1).sum(axis=2) / 2
        own = 1.0 if free is None else 0.0
        home_E1 = (0.0 if free is None else free) * self.load_E[:, None]
        held = min(slots, len(self.load_E))
        lines = {
            line.slope
            for size in range(1, len(self.of_size_N))
            for line in bounds.contact_lines(size, held, groups)
        }
        found = []
        for slope in lines:
            level = sum(
                count * (bounds.level(size, held, groups, slope) - own)
                for size, count in enumerate(self.of_size_N[1:], start=1)
            )
            found.append(level - copies.most(slope * near_ER + home_E1))
        return float(max(found))
