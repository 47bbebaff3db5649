"""What is minimised: one `Problem` holds the trace's counts, the machine, and the objective.

Axes: T tokens, L MoE layers, E experts, K experts per token, M devices.

Objectives (all per layer, so that layers of different traces compare):
- `seconds`: mean over layers of a step's seconds (seconds.py), for the dispatch that is used.
- `rows`: rows on the wire per token and layer, both ways, one row per device (partial sums). With
  hierarchical dispatch a row between nodes counts fast.bandwidth / slow.bandwidth times.
- `exflow`: transitions of the best expert that leave their device, per token (ExFlow's objective
  with its tokens summed up to counts). On several nodes, one that leaves its node counts
  fast.bandwidth / slow.bandwidth times.
- `moetuner`: MoETuner's two stages together (moetuner.py); the dispatch does not enter.
- `hops`: hops of every assignment from its dispatcher and to its collector, per token and layer
  (hops.py, topology.hops_MM); the dispatch does not enter.
- `load`: mean over layers of the largest device load over the mean one; 1 for a layer where no
  token has an expert, whose placement does not matter.

Where devices differ in speed, the load of a device counts over its speed (topology.speed_M, 1 on
average), in the objective `load` and in every cap: 1 is still what nothing can be below.

Shuffled dispatch is counted in steps of `work.batch_tokens` tokens, in the order of the trace
(row_homes.py).

Except for `exflow`, `moetuner`, coherent and shuffled dispatch a layer's value depends on that
layer alone.

`num_slots` above E asks for replicas. Placements that have some are valued by counting, under the
copy rule and with homes drawn uniformly (`value_of`); closed forms and searches are for the others.
"""

import dataclasses
import functools

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import (
    bounds,
    chain,
    clock,
    clusters,
    contacts,
    copies,
    cost,
    evidence,
    greedy,
    hops_counts,
    moetuner,
    tied_counts,
    uneven,
    uniform_counts,
    ways,
)
from moe_jax.placement import hops as hops_lib
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.limits import caps
from moe_jax.placement.limits.caps import LoadCap
from moe_jax.placement.limits.pins import Pins
from moe_jax.placement.limits.previous import Previous
from moe_jax.placement.plan import Placement, check_divides
from moe_jax.placement.seconds import Work
from moe_jax.placement.topology import Topology
from moe_jax.routing import affinity
from moe_jax.routing.trace import Trace

OBJECTIVES = ("seconds", "rows", "moetuner", "exflow", "hops", "load")
UNITS = {
    "seconds": "s per layer and step",
    "rows": "rows per token and layer",
    "moetuner": "s per layer and step",
    "exflow": "hops per token",
    "hops": "hops per token and layer",
    "load": "max / mean",
}
BY_TIER = "weighted by tier"


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A trace to plan on, a machine, and what to minimise on it."""

    trace: Trace
    topology: Topology
    objective: str = "seconds"
    dispatch: str = "exchange"
    work: Work = dataclasses.field(default_factory=Work)
    load_cap: LoadCap | None = None
    num_slots: int | None = None
    pins: Pins | None = None
    previous: Previous | None = None
    dispatcher: str = "uniform"
    block: tuple[int, int] | None = None  # dispatcher and collector, of `blocks` with one layer
    steady: float = 0.0  # of a mean device's load, given up for loads that stay even (steady.py)

    def __post_init__(self):
        for field, allowed in (("objective", OBJECTIVES), ("dispatch", cost.DISPATCHES)):
            if getattr(self, field) not in allowed:
                raise Refused(
                    field, getattr(self, field), "not known", f"Use one of {', '.join(allowed)}"
                )
        if self.num_slots is None:
            check_divides(self.trace.num_experts, self.num_devices)
        else:
            copies.check_slots(self.num_slots, self.trace.num_experts, self.num_devices)
        if self.objective == "rows" and self.dispatch == "gathered":
            raise Refused(
                "objective",
                "rows",
                "gathered dispatch moves the same rows under every placement",
                "Use --objective=seconds or --objective=load",
            )
        if self.objective == "moetuner" and not self.even_speed:
            rule = "MoETuner's stages are for devices of one speed"
            raise Refused("objective", "moetuner", rule, "Use --objective=seconds")
        if not 0 <= self.steady < 1:
            raise Refused("steady", self.steady, "a share, at least 0 and below 1", "Use 0.003")
        if self.objective == "moetuner" and self.has_replicas:
            raise Refused(
                "num_slots",
                self.num_slots,
                "MoETuner has no replicas",
                "Leave --slots out, or choose --objective=seconds",
            )
        if self.dispatcher not in hops_lib.DISPATCHERS:
            known = ", ".join(hops_lib.DISPATCHERS)
            raise Refused("dispatcher", self.dispatcher, "not known", f"Use one of {known}")
        if self.objective == "exflow" and self.trace.num_layers < 2:
            raise Refused("objective", "exflow", "one layer has no transitions", "Use rows or load")
        each = (self.num_slots or self.trace.num_experts) // self.num_devices
        if self.pins is not None:
            self.pins.check(each, self.has_replicas, self.trace.layer_ids)
        if self.previous is not None:
            shape = (self.trace.num_layers, self.trace.num_experts, self.num_devices)
            self.previous.check(*shape, self.num_slots or self.trace.num_experts)

    @property
    def unit(self) -> str:
        """Of the objective, in words."""
        return UNITS[self.objective] + (f", {BY_TIER}" if self.weighted else "")

    @property
    def weighted(self) -> bool:
        """What goes between nodes counts more than once in the objective."""
        if self.objective == "exflow":
            return bool(self.hop_MM.max() > 1)
        return self.objective == "rows" and bool(self.row_weight_MM.max() > 1)

    @property
    def num_devices(self) -> int:
        return self.topology.num_devices

    @property
    def slots(self) -> int:
        return self.trace.num_experts // self.num_devices

    @property
    def has_replicas(self) -> bool:
        return self.num_slots is not None and self.num_slots > self.trace.num_experts

    @property
    def needs_copies(self) -> bool:
        """The devices do not divide the experts: without copies there is no plan."""
        return self.trace.num_experts % self.num_devices != 0

    @property
    def separable(self) -> bool:
        """A layer's value depends on that layer alone."""
        return self.objective in ("load", "hops") or (
            self.objective not in ("exflow", "moetuner") and self.dispatch not in cost.TIED
        )

    @functools.cached_property
    def load_LE(self) -> np.ndarray:
        return affinity.load_LE(self.trace).astype(float)

    @functools.cached_property
    def coactivation_LEE(self) -> np.ndarray:
        return affinity.coactivation_LEE(self.trace).astype(float)

    @functools.cached_property
    def top1_LEE(self) -> np.ndarray:
        return affinity.transitions_top1_LEE(self.trace).astype(float)

    @functools.cached_property
    def best_to_all_LEE(self) -> np.ndarray:
        return affinity.transitions_best_to_all_LEE(self.trace).astype(float)

    @functools.cached_property
    def tokens_of_size_LK(self) -> np.ndarray:
        """int64 [L, K + 1]: tokens with that many experts."""
        real_TL = (self.trace.expert_ids_TLK != self.trace.no_expert).sum(axis=2)
        return np.stack([np.bincount(n, minlength=self.trace.top_k + 1) for n in real_TL.T])

    @functools.cached_property
    def token_layers(self) -> int:
        """Tokens with an expert, over layers; 1 if none has: per token, nothing is still 0."""
        return max(int(self.tokens_of_size_LK[:, 1:].sum()), 1)

    @functools.cached_property
    def packed_LE(self) -> np.ndarray:
        """int64 [L, E]: the most even placement that packing and swaps find."""
        speed_M = None if self.even_speed else self.topology.speed_M
        return greedy.balanced(self.load_LE, self.num_devices, speed_M)

    @property
    def balanced_LE(self) -> np.ndarray:
        """int64 [L, E]: the same, where that is above an absolute cap an exact program's."""
        device_LE, was_cut = self._balanced
        if was_cut:  # for every search that uses it, whoever made it
            clock.cut()
        return device_LE

    @functools.cached_property
    def _balanced(self) -> tuple[np.ndarray, bool]:
        """`balanced_LE`, and whether time cut its programs short."""
        if self.load_cap is None or self.load_cap.relative:
            return self.packed_LE, False
        cap_L = self.load_cap.largest_L(self.mean_L, self.mean_L, self.rows_per_step)
        least_L = np.array([self.least_load(layer) for layer in range(len(cap_L))])
        if (least_L > cap_L * (1 + 1e-9)).any():
            return self.packed_LE, False  # proven: nothing meets the cap
        with clock.watched() as watch:
            device_LE = caps.met(self.load_LE, self.packed_LE, cap_L, self.topology.speed_M)
        return device_LE, watch.cut

    @property
    def mean_L(self) -> np.ndarray:
        """float64 [L]: the mean load of a device."""
        return self.load_LE.sum(axis=1) / self.num_devices

    @property
    def rows_per_step(self) -> float:
        """Rows of a step for each row of the trace."""
        return self.work.batch_tokens / self.trace.num_tokens

    @property
    def even_speed(self) -> bool:
        return not isinstance(self.topology.device_flops, tuple)

    @property
    def shared_load(self) -> float:
        """What shared experts add to every device in `seconds`, in rows of the trace."""
        if self.objective != "seconds":
            return 0.0
        rows = self.work.shared_flops / self.work.row_flops
        return self.trace.num_tokens / self.num_devices * rows

    def largest_L(self, device_LE: np.ndarray) -> np.ndarray:
        """float64 [L]: the largest load over its device's speed."""
        return caps.largest_L(self.load_LE, device_LE, self.topology.speed_M)

    def relative_M(self, layer: int, device_E: np.ndarray) -> np.ndarray:
        """float64 [M]: loads over speeds."""
        load_M = np.bincount(device_E, weights=self.load_LE[layer], minlength=self.num_devices)
        return load_M / self.topology.speed_M

    @property
    def tier_ratio(self) -> float:
        """What a row between nodes costs, in rows inside a node."""
        return self.topology.fast.bandwidth / self.topology.slow.bandwidth

    @functools.cached_property
    def cap_L(self) -> np.ndarray:
        """float64 [L]: largest device load that is allowed; inf without a cap."""
        layers = self.trace.num_layers
        if self.load_cap is None:
            return np.full(layers, np.inf)
        mean_L, reachable_L = self.mean_L, self.largest_L(self.balanced_LE)
        cap_L = self.load_cap.largest_L(mean_L, reachable_L, self.rows_per_step)
        if (reachable_L > cap_L * (1 + 1e-9)).any():
            raise self._cap_refused()
        return cap_L

    def _cap_refused(self) -> Refused:
        """Names the smallest cap that can be kept, and the layer that decides it."""
        assert self.load_cap is not None
        share_L = 1 / np.maximum(self.mean_L, 1e-300)
        least_L = np.array([self.least_load(n) for n in range(self.trace.num_layers)]) * share_L
        args = self.load_LE, self.balanced_LE, float(least_L.max()), self.topology.speed_M
        reachable_L = self.largest_L(caps.evened(*args))
        layer = int((reachable_L * share_L).argmax())
        return Refused(
            "load_cap",
            str(self.load_cap),
            f"layer {self.trace.layer_ids[layer]} was not balanced better than "
            f"{reachable_L[layer] * share_L[layer]:.4f} (proven: cannot be below "
            f"{least_L[layer]:.4f})",
            self.load_cap.advice(reachable_L[layer], self.mean_L[layer], self.rows_per_step),
        )

    @property
    def node_likeness(self) -> float:
        """What sharing a node is worth, sharing a device being 1, for this objective."""
        if self.topology.num_nodes == 1:
            return 0.0
        ratio = self.tier_ratio
        if self.objective in ("exflow", "moetuner"):
            return (ratio - 1) / ratio
        if self.dispatch != "hierarchical":
            return 0.0
        nodes, devices = self.topology.nodes, self.num_devices
        slow = ratio * float((devices - nodes.size_N).mean())
        return slow / (slow + float((devices - nodes.relayed_M).mean()))

    @property
    def devices_differ(self) -> bool:
        """It matters which group of experts goes on which device."""
        if self.objective == "rows":
            return self.dispatch == "hierarchical" and not self.topology.nodes.equal
        return self.objective == "seconds" and not self.topology.alike

    @property
    def labels_count(self) -> bool:
        """Even devices of one kind may not change places: hops matter, or ties of homes."""
        on_torus = self.objective == "seconds" and self.topology.torus is not None
        by_number = self.dispatch == "shuffled" and not self.separable
        return on_torus or by_number or self.objective == "hops"

    @functools.cached_property
    def hop_costs(self) -> hops_lib.Costs:
        return hops_lib.costs_of(self.load_LE, self.hop_ways)

    @property
    def kind_M(self) -> np.ndarray | None:
        """int64: labels that may change places in a node, costing nothing; None: all of them."""
        nodes, flops_M = self.topology.nodes, self.topology.flops_M
        relayed_M = nodes.relayed_M if self.dispatch == "hierarchical" else np.ones_like(flops_M)
        kinds, kind_M = np.unique(
            np.stack([flops_M, relayed_M], axis=1), axis=0, return_inverse=True
        )
        return None if len(kinds) == 1 else kind_M.reshape(-1)

    @property
    def unrestricted(self) -> "Problem":
        """The same without pins and without a plan in use."""
        return dataclasses.replace(self, pins=None, previous=None)

    def prepare(self) -> None:
        """Counts what every value needs, so that later timings do not contain it."""
        _ = self.load_LE, self.top1_LEE, self.coactivation_LEE, self.tokens_of_size_LK
        if self.separable and self.objective != "load":
            _ = self.sets

    def over(self, layer: int, load_PM: np.ndarray) -> np.ndarray:
        """bool [P]: a device passes the layer's load cap."""
        relative_PM = load_PM / self.topology.speed_M
        return relative_PM.max(axis=1) > self.cap_L[layer] * (1 + 1e-9)

    def allowed(self, layer: int, device_E: np.ndarray) -> bool:
        """The layer keeps its load cap and its pins."""
        if self.pins is not None and not self.pins.kept(layer, device_E):
            return False
        if not np.isfinite(self.cap_L[layer]):
            return True
        load_M = np.bincount(device_E, weights=self.load_LE[layer], minlength=self.num_devices)
        return not self.over(layer, load_M[None])[0]

    def all_allowed(self, device_LE: np.ndarray) -> bool:
        if self.previous is not None and self.previous.left(device_LE) < 0:
            return False
        return all(self.allowed(layer, row_E) for layer, row_E in enumerate(device_LE))

    def repaired(self, device_LE: np.ndarray) -> np.ndarray:
        """Layers above their cap are replaced by the most even ones."""
        over = [not self.allowed(layer, row_E) for layer, row_E in enumerate(device_LE)]
        return np.where(np.array(over)[:, None], self.balanced_LE, device_LE)

    def load_excess(self, layer: int, device_E: np.ndarray) -> float:
        """How far the largest load is above what is proven, as a share."""
        least = self.least_load(layer)
        return float(self.relative_M(layer, device_E).max() / max(least, 1e-300) - 1)

    def least_load(self, layer: int) -> float:
        """Proven: no placement has a smaller largest load in this layer."""
        speed_M = None if self.even_speed else self.topology.speed_M
        return bounds.load_lower(self.load_LE[layer], self.num_devices, speed_M)

    def layer(self, layer: int, cap: float) -> clusters.Layer:
        """The clustering problem of one layer."""
        like_MM = chain.likeness(self.topology.nodes, self.node_likeness)
        cap_M = cap if self.even_speed else cap * self.topology.speed_M
        return clusters.Layer(self.coactivation_LEE[layer], self.load_LE[layer], like_MM, cap_M)

    def chain(self, keep_LEE: np.ndarray) -> chain.Chain:
        """The transition problem over all layers."""
        return chain.Chain(
            keep_LEE,
            self.num_devices,
            self.topology.devices_per_node,
            self.node_likeness,
            self.load_LE,
            self.cap_L,
            self.topology.speed_M,
            self.kind_M,
        )

    @functools.cached_property
    def tuner(self) -> moetuner.Tuner:
        """MoETuner's quantities."""
        pairs_LEE = affinity.transitions_all_LEE(self.trace).astype(float)
        return moetuner.tuner(
            self.load_LE, pairs_LEE, self.cap_L, self.topology, self.work, self.trace.num_tokens
        )

    def value(self, device_LE: np.ndarray) -> float:
        """The objective of a whole placement."""
        if self.objective == "moetuner":
            return self.tuner.value(device_LE)
        if self.objective == "exflow":
            return self.hops(self.chain(self.top1_LEE).value(device_LE))
        if self.separable:
            return float(self.values_L(device_LE).mean())
        key = device_LE.astype(np.int64).tobytes()
        if key not in self._last_value:  # token by token: a search and who keeps its best both ask
            self._last_value.clear()
            self._last_value[key] = float(self.values_L(device_LE).mean())
        return self._last_value[key]

    @functools.cached_property
    def _last_counts(self) -> dict[Placement, tied_counts.Counted]:
        """The last plan with copies that was counted, and its counts."""
        return {}

    @functools.cached_property
    def _last_value(self) -> dict[bytes, float]:
        """The last placement that was counted, and its value."""
        return {}

    def value_of(self, placement: Placement) -> float:
        """The objective of a whole placement, replicas allowed."""
        if not placement.has_replicas:
            return self.value(placement.device_LE)
        if self.objective == "exflow":
            return self._hops_of(placement)
        return float(self.counted_L(placement).mean())

    def counted_L(self, placement: Placement) -> np.ndarray:
        """The objective by layer, counted token by token. Not for `exflow` and `moetuner`."""
        if self.objective == "hops":
            scale = self.trace.num_layers / self.token_layers
            return scale * self.counted_hops(placement).hops_L
        if self.objective == "load":
            return evidence.over_mean(self.computed_LM(placement), self.topology.speed_M)
        rows, load_LM = self.counts(placement)
        if self.objective == "rows":
            weighted_LMM = rows.total_LMM * self.row_weight_MM
            return weighted_LMM.sum(axis=(1, 2)) * (self.trace.num_layers / self.token_layers)
        return seconds_lib.seconds(
            rows, load_LM, self.topology, self.work, self.dispatch, self.trace.num_tokens
        ).total_L

    def computed_LM(self, placement: Placement) -> np.ndarray:
        """float64 [L, M]: rows that every device computes; the mean over homes."""
        ids_TLK, topology = self.trace.expert_ids_TLK, self.topology
        if placement.has_replicas:
            if self.dispatch in cost.TIED:
                return self.counts(placement).load_LM
            if placement.share_LNP is None:
                return hops_counts.loads_LM(self._uniform, placement)
        where = (topology.devices_per_node, None, self.work.batch_tokens)
        return cost.computed_LM(ids_TLK, placement, self.dispatch, None, *where)

    def counts(self, placement: Placement) -> tied_counts.Counted:
        """Rows [L, M, M] on the wire and rows [L, M] computed, token by token; means over homes."""
        where = (self.topology.devices_per_node, self.work.batch_tokens)
        args = self.trace.expert_ids_TLK, placement, self.dispatch
        if placement.has_replicas and self.dispatch in cost.TIED:
            if placement not in self._last_counts:  # asked for its loads, then for its rows
                self._last_counts.clear()
                self._last_counts[placement] = tied_counts.counted(*args, *where)
            return self._last_counts[placement]
        local = placement.has_replicas and placement.share_LNP is None
        if local and self.dispatch in uniform_counts.DISPATCHES:
            rows = uniform_counts.rows(*args, self.topology.nodes)
        else:
            each, step_tokens = where
            rows = cost.rows(*args, devices_per_node=each, step_tokens=step_tokens)
        return tied_counts.Counted(rows, self.computed_LM(placement))

    @functools.cached_property
    def _uniform(self) -> list[hops_counts.Layer]:
        """What loads of copies follow from, counted once for all plans."""
        trace, nodes = self.trace, self.topology.nodes
        return hops_counts.uniform(trace.expert_ids_TLK, trace.num_experts, nodes)

    def counted_hops(self, placement: Placement) -> hops_counts.Counted:
        """Hops and loads of the objective `hops`, counted token by token."""
        ids_TLK, nodes = self.trace.expert_ids_TLK, self.topology.nodes
        return hops_counts.counted(ids_TLK, placement, self.hop_ways, nodes)

    @functools.cached_property
    def hop_ways(self) -> list[hops_lib.Ways]:
        """From where the tokens of every layer are sent, and where to."""
        sizes, block = (self.topology.hops_MM, self.trace.num_layers), self.block
        if block is not None and self.dispatcher == "blocks":
            return [hops_lib.between(self.topology.hops_MM, *block)]
        return hops_lib.ways(*sizes, self.dispatcher)

    @property
    def row_weight_MM(self) -> np.ndarray:
        """What a row counts in the objective `rows`: more between nodes if it is hierarchical."""
        node_M = self.topology.node_M
        slow = self.tier_ratio if self.dispatch == "hierarchical" else 1.0
        return np.where(node_M[:, None] == node_M[None, :], 1.0, slow)

    @property
    def hop_MM(self) -> np.ndarray:
        """What a transition costs in the objective `exflow`."""
        node_M = self.topology.node_M
        hop_MM = np.where(node_M[:, None] == node_M[None, :], 1.0, self.tier_ratio)
        np.fill_diagonal(hop_MM, 0.0)
        return hop_MM

    def _hops_of(self, placement: Placement) -> float:
        best_TL1, total = self.trace.expert_ids_TLK[:, :, :1], 0.0
        homes = cost.homes(placement, self.trace.num_tokens)
        for home_T in homes:
            before_T = np.full(self.trace.num_tokens, cost.UNKNOWN)
            each = self.topology.devices_per_node
            for step in cost.walk(best_TL1, placement, "coherent", home_T, each):
                device_T = step.device_TK[:, 0]
                real_T = (before_T >= 0) & (device_T >= 0)
                total += self.hop_MM[before_T[real_T], device_T[real_T]].sum()
                before_T = device_T
        moves = max(self.top1_LEE.sum(), 1.0)
        return float(len(self.top1_LEE) * total / len(homes) / moves)

    def hops(self, kept: float) -> float:
        """Weighted hops per token, from the transitions that are kept."""
        ratio = self.tier_ratio if self.topology.num_nodes > 1 else 1.0
        moves = self.top1_LEE.sum()
        return float(len(self.top1_LEE) * ratio * (moves - kept) / max(moves, 1.0))

    def values_L(self, device_LE: np.ndarray) -> np.ndarray:
        """The objective by layer; the whole is their mean. Not for `exflow` and `moetuner`."""
        if self.separable:
            return np.array([self.layer_value(n, row_E) for n, row_E in enumerate(device_LE)])
        rows = cost.rows(
            self.trace.expert_ids_TLK,
            uneven.of_devices(device_LE, self.num_devices),
            self.dispatch,
            step_tokens=self.work.batch_tokens,
        )
        if self.objective == "rows":
            return rows.total_LMM.sum(axis=(1, 2)) * (self.trace.num_layers / self.token_layers)
        load_LM = loads(self.load_LE, device_LE, self.num_devices)
        return seconds_lib.seconds(
            rows, load_LM, self.topology, self.work, self.dispatch, self.trace.num_tokens
        ).total_L

    def layer_value(self, layer: int, device_E: np.ndarray) -> float:
        """The objective of one layer, where it depends on that layer alone."""
        load_M = np.bincount(device_E, weights=self.load_LE[layer], minlength=self.num_devices)
        if self.objective == "hops":
            scale = self.trace.num_layers / self.token_layers
            return scale * self.hop_costs.layer_value(layer, device_E)
        if self.objective == "load":
            return float(evidence.over_mean(load_M, self.topology.speed_M))
        node_E = self.topology.node_M[device_E]
        return float(
            self.scores(
                layer,
                self.sets[layer].touched_M(device_E, self.num_devices)[None],
                self.sets[layer].touched_M(node_E, self.topology.num_nodes)[None],
                load_M[None],
            )[0]
        )

    def scores(self, layer: int, touched_PM, node_PN, load_PM) -> np.ndarray:
        """float64 [P]: `rows` or `seconds` of one layer from contacts and loads, P at a time."""
        if self.objective == "rows":
            scale = self.trace.num_layers / self.token_layers
            return scale * ways.rows(self.topology, self.dispatch, touched_PM, node_PN)
        scale = self.rows_per_step
        way_P = ways.seconds(
            self.topology,
            self.dispatch,
            touched_PM * (scale * self.work.row_bytes),
            node_PN * (scale * self.work.row_bytes),
            self.tokens_of_size_LK[layer, 1:].sum() * (scale * self.work.row_bytes),
        )
        compute_PM = seconds_lib.compute_seconds(
            load_PM, self.topology, self.work, self.trace.num_tokens
        )
        return way_P + compute_PM.max(axis=1)

    @functools.cached_property
    def sets(self) -> list[contacts.Sets]:
        """The distinct expert sets of every layer."""
        return [contacts.sets_of(self.trace, layer) for layer in range(self.trace.num_layers)]


def loads(load_LE: np.ndarray, device_LE: np.ndarray, devices: int) -> np.ndarray:
    """float64 [L, M]: load of every device."""
    return np.stack(
        [
            np.bincount(device_E, weights=load_E, minlength=devices)
            for load_E, device_E in zip(load_LE, device_LE, strict=True)
        ]
    )
