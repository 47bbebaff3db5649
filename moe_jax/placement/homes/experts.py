"""Experts for given homes: the problem that layerwise.py searches, a contact priced by its homes.

Axes: L MoE layers, E experts, Q distinct sets of a layer, M devices (H: homes), N nodes, P swaps.

With n_qh tokens of set q at home h, a contact of q with device m costs sum_h n_qh price[h, m]
(tally.Prices): in `exchange` all of the set's tokens but those that live on m. So contacts.Sets
with that weight counts rows exactly, after all swaps at once, as it does without homes. For the
objective `seconds` the search sees the busiest receiver and the busiest computer of a layer; what
is kept is decided by `exact_value`, which knows the senders as well.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int

from moe_jax.placement import clusters, contacts
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.cost import Rows
from moe_jax.placement.homes import tally
from moe_jax.placement.homes.tally import Prices
from moe_jax.placement.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class HomedSets(contacts.Sets):
    """Distinct sets, and how many of their tokens each home holds.

    Attributes:
      home_QH: float64, tokens by home; `count_Q` is its sum.
      price: of a contact.
    """

    home_QH: np.ndarray
    price: Prices

    @functools.cached_property
    def _weights(self) -> dict[int, np.ndarray]:
        weights = {self.price.node_HN.shape[1]: self.home_QH @ self.price.node_HN}
        weights[self.price.device_HM.shape[1]] = self.home_QH @ self.price.device_HM
        return weights

    def weight_QM(self, devices: int) -> np.ndarray:
        """What a contact of the set costs on each device (or node, by their number)."""
        return self._weights[devices]

    def contacts_HM(self, label_E: Int[np.ndarray, " E"], size: int) -> Float[np.ndarray, "H size"]:
        """Contacts of each home's tokens with each device (or node, given the node of experts)."""
        return self.home_QH.T @ (self._experts_on(label_E, size) > 0)


@dataclasses.dataclass(frozen=True, eq=False)
class HomedProblem(Problem):
    """A problem whose sequences live where `homes` says (int64 [S])."""

    homes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def devices_differ(self) -> bool:
        """Groups stay where their homes want them: a contact's price depends on its device."""
        return False

    @functools.cached_property
    def price(self) -> Prices:
        return tally.prices_of(self)

    @functools.cached_property
    def sets(self) -> list[contacts.Sets]:
        home_T = np.repeat(self.homes, self.trace.seq_len)
        return [_sets(self, layer, home_T) for layer in range(self.trace.num_layers)]

    def layer(self, layer: int, cap: float) -> clusters.Layer:
        """The clustering problem: a home is one more expert of its tokens, one that stays put."""
        sets, price = self.sets[layer], self.price
        assert isinstance(sets, HomedSets)
        of_home_EH = np.zeros((self.trace.num_experts + 1, self.num_devices))
        for k in range(sets.expert_QK.shape[1]):
            np.add.at(of_home_EH, sets.expert_QK[:, k], sets.home_QH)
        price_HM = price.device_HM + price.node_HN[:, self.topology.node_M]
        bonus_EM = -0.5 * of_home_EH[:-1] @ price_HM
        return dataclasses.replace(super().layer(layer, cap), bonus_EM=bonus_EM)

    def layer_value(self, layer: int, device_E: np.ndarray) -> float:
        """What the search minimises: exact for `rows`, see the head of this file for `seconds`."""
        load_M = np.bincount(device_E, weights=self.load_LE[layer], minlength=self.num_devices)
        node_E, sets = self.topology.node_M[device_E], self.sets[layer]
        touched_PM = sets.touched_M(device_E, self.num_devices)[None]
        node_PN = sets.touched_M(node_E, self.topology.num_nodes)[None]
        return float(self.scores(layer, touched_PM, node_PN, load_M[None])[0])

    def scores(self, layer: int, touched_PM, node_PN, load_PM) -> np.ndarray:
        """float64 [P]: from priced contacts and loads, P at a time."""
        if not self.price.node_HN.any():  # nodes cost nothing by themselves
            node_PN = np.zeros_like(node_PN)
        if self.objective == "rows":
            scale = self.trace.num_layers / self.token_layers
            return scale * (touched_PM.sum(axis=1) + node_PN.sum(axis=1))
        row_seconds = self.work.row_bytes / self.topology.fast.bandwidth
        row_seconds *= self.rows_per_step
        node_PN = node_PN / self.topology.nodes.size_N  # its relays share
        busiest_P = touched_PM.max(axis=1) + node_PN.max(axis=1)
        compute_PM = seconds_lib.compute_seconds(
            load_PM, self.topology, self.work, self.trace.num_tokens
        )
        return busiest_P * row_seconds + compute_PM.max(axis=1)

    def exact_value(self, layer: int, device_E: np.ndarray) -> float:
        """The objective of one layer, senders included: cost.rows and seconds.py with homes."""
        if self.objective == "rows":
            return self.layer_value(layer, device_E)
        sets = self.sets[layer]
        assert isinstance(sets, HomedSets)
        touched_HM = sets.contacts_HM(device_E, self.num_devices)
        node_E = self.topology.node_M[device_E]
        node_HN = sets.contacts_HM(node_E, self.topology.num_nodes)
        out_LMM = tally.wire_LMM(touched_HM[None], node_HN[None], self.topology, self.dispatch)
        load_M = np.bincount(device_E, weights=self.load_LE[layer], minlength=self.num_devices)
        rows = Rows(out_LMM, out_LMM.transpose(0, 2, 1))
        return float(
            seconds_lib.seconds(
                rows, load_M[None], self.topology, self.work, self.dispatch, self.trace.num_tokens
            ).total_L[0]
        )

    def exact(self, device_LE: np.ndarray) -> float:
        """The objective of a whole placement: the mean over layers."""
        return float(np.mean([self.exact_value(n, row_E) for n, row_E in enumerate(device_LE)]))


def with_homes(problem: Problem, home_S: Int[np.ndarray, " S"]) -> HomedProblem:
    """The same problem, its sequences at home."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(Problem)}
    homed = HomedProblem(**fields, homes=home_S.astype(np.int64))
    for name in ("load_LE", "tokens_of_size_LK", "coactivation_LEE", "balanced_LE"):
        homed.__dict__[name] = getattr(problem, name)  # counted once for all homes
    return homed


def _sets(problem: HomedProblem, layer: int, home_T: np.ndarray) -> HomedSets:
    """As contacts.sets_of, the tokens of a set told apart by their homes."""
    experts, devices = problem.trace.num_experts, problem.num_devices
    ids_TK = problem.trace.expert_ids_TLK[:, layer].astype(np.int64)
    ids_TK = np.sort(np.minimum(ids_TK, experts), axis=1)
    some_T = ids_TK[:, 0] < experts
    ids_TK, home_T = ids_TK[some_T], home_T[some_T]
    base, top_k = experts + 1, problem.trace.top_k
    expert_QK, set_T = ids_TK, np.arange(len(ids_TK))
    if base**top_k < 2**63:
        power_K = base ** np.arange(top_k, dtype=np.int64)
        code_Q, set_T = np.unique(ids_TK @ power_K, return_inverse=True)
        expert_QK = code_Q[:, None] // power_K % base
    count = np.bincount(set_T * devices + home_T, minlength=len(expert_QK) * devices)
    home_QH = count.reshape(len(expert_QK), devices).astype(float)
    return HomedSets(expert_QK, home_QH.sum(axis=1), experts, home_QH, problem.price)
