"""Every baseline by name, each made from a `Problem`: what `compare` prints beside the planner.

A baseline sees the planning half only, and nothing of the objective or the load cap: it does what
its authors do. Those with integer programs get seconds, and say when these ended them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement import baselines, hops, spare, uneven
from moe_jax.placement.baselines import (
    affinity_groups,
    eplb,
    exflow,
    grace,
    moetuner,
    packing,
    topology_cost,
)
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import Problem


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What a baseline made.

    Attributes:
      placement: its plan; Uneven or Published where it is for counting only.
      cut: its time limit ended it.
      duplicates: slots whose expert is on their device already, over all layers.
    """

    placement: Placement
    cut: bool = False
    duplicates: int = 0

    @property
    def valid(self) -> bool:
        """It may be written and loaded."""
        return type(self.placement) is Placement


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A way to place experts.

    Attributes:
      key: for `--methods`.
      name: in the table.
      text: what it does and whose it is.
      make: (problem, seed, seconds) -> Made.
      slow: it uses the seconds.
      needs: of the machine or the slots: "", "nodes", "replicas", "transitions", "ways".
    """

    key: str
    name: str
    text: str
    make: Callable[[Problem, int, float], Made]
    slow: bool = False
    needs: str = ""

    def applies(self, problem: Problem) -> bool:
        """Is it another method than those above it, on this machine with these slots?"""
        if problem.needs_copies and self.needs not in ("nodes", "replicas"):
            return False
        return {
            "": True,
            "nodes": _equal_nodes(problem) > 1 or problem.has_replicas,
            "replicas": problem.has_replicas,
            "transitions": problem.trace.num_layers > 1,
            "ways": problem.objective == "hops" or _ways_differ(problem),
        }[self.needs]


_NEEDS = {
    "nodes": "equal nodes (--nodes), or copies (--slots)",
    "replicas": "copies (--slots)",
    "transitions": "two layers or more",
    "ways": "devices that are not equally far from each other, or --objective=hops",
}


def chosen(
    keys: Sequence[str] | None, problem: Problem, more: Sequence[str] = ()
) -> list[Baseline]:
    """The baselines to make: those of `keys`, or all that apply. `more` are keys of others."""
    if keys is None:
        return [one for one in ALL if one.applies(problem)]
    known = [one.key for one in ALL] + list(more)
    for key in keys:
        if key not in known:
            raise Refused("methods", key, "not known", f"Use some of {','.join(known)}")
    for one in ALL:
        if one.key in keys and not one.applies(problem):
            needs = "devices that divide the experts"
            if one.needs and not problem.needs_copies:
                needs = _NEEDS[one.needs]
            rule = f"needs {needs}"
            raise Refused("methods", one.key, rule, "Leave it out, or give what it needs")
    return [one for one in ALL if one.key in keys and one.applies(problem)]


def by_key(key: str) -> Baseline:
    return next(one for one in ALL if one.key == key)


def _equal_nodes(problem: Problem) -> int:
    """Nodes for methods that are published for equal ones; others count as one node."""
    return problem.topology.num_nodes if problem.topology.nodes.equal else 1


def _ways_differ(problem: Problem) -> bool:
    """Hops to some device are more than to others: else all placements have as many."""
    return bool(np.ptp(problem.hop_costs.whole_LEM, axis=2).any())


def _sizes(problem: Problem) -> tuple[int, int, int]:
    return problem.trace.num_layers, problem.trace.num_experts, problem.num_devices


def _equal(problem: Problem, device_LE: np.ndarray) -> Made:
    return Made(Placement.from_device_LE(device_LE, problem.num_devices))


def _contiguous(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(problem, baselines.contiguous(*_sizes(problem)))


def _round_robin(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(problem, baselines.round_robin(*_sizes(problem)))


def _zigzag(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(problem, baselines.zigzag(problem.load_LE, problem.num_devices))


def _random(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(problem, baselines.random(*_sizes(problem), seed=seed))


def _lpt(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(problem, baselines.lpt(problem.load_LE, problem.num_devices))


def _smartmoe(problem: Problem, seed: int, seconds: float) -> Made:
    before_LE = baselines.contiguous(*_sizes(problem))
    return _equal(problem, packing.smartmoe(problem.load_LE, before_LE, problem.num_devices))


def _eplb(problem: Problem, groups: int, nodes: int) -> Made:
    experts, devices = problem.trace.num_experts, problem.num_devices
    slots = problem.num_slots or experts
    maps = eplb.rebalance_experts(problem.load_LE, slots, groups, nodes, devices)
    doubled = eplb.duplicates(maps.physical_to_logical_LR, devices)
    kind = eplb.Published if doubled else Placement
    return Made(kind(maps.physical_to_logical_LR, experts, devices), duplicates=doubled)


def _eplb_hierarchical(problem: Problem, seed: int, seconds: float) -> Made:
    experts, nodes = problem.trace.num_experts, _equal_nodes(problem)
    return _eplb(problem, experts, nodes) if experts % nodes == 0 else _eplb(problem, 1, 1)


def _eplb_global(problem: Problem, seed: int, seconds: float) -> Made:
    return _eplb(problem, 1, 1)


def _balanced_slots(problem: Problem, seed: int, seconds: float) -> Made:
    return Made(spare.balanced(problem))


def _cooccurrence(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(
        problem,
        affinity_groups.cooccurrence(
            problem.load_LE, problem.coactivation_LEE, problem.num_devices
        ),
    )


def _topology_cost(problem: Problem, seed: int, seconds: float) -> Made:
    trace, devices = problem.trace, problem.num_devices
    home_S = np.arange(trace.num_sequences) % devices  # as servers deal sequences out
    if trace.seq_home is not None and int(trace.seq_home.max()) < devices:
        home_S = trace.seq_home.astype(np.int64)
    traffic_SLE = topology_cost.traffic_SLE(
        trace.expert_ids_TLK, np.repeat(home_S, trace.seq_len), devices, trace.num_experts
    )
    start = _eplb_hierarchical(spare.without(problem), seed, seconds).placement
    return _equal(
        problem,
        topology_cost.swapped(traffic_SLE.astype(float), problem.hop_MM, start.device_LE),
    )


def _occult(problem: Problem, seed: int, seconds: float) -> Made:
    return _equal(problem, affinity_groups.occult(problem.coactivation_LEE, problem.num_devices))


def _grace(problem: Problem, seed: int, seconds: float) -> Made:
    nodes, devices = _equal_nodes(problem), problem.num_devices
    device_LE = grace.bounded_groups(problem.coactivation_LEE, nodes, devices, seed)
    return Made(uneven.of_devices(device_LE, devices))


def _exflow(problem: Problem, seed: int, seconds: float) -> Made:
    nodes, devices = _equal_nodes(problem), problem.num_devices
    found = exflow.staged(problem.top1_LEE, nodes, devices, seconds)
    return dataclasses.replace(_equal(problem, found.device_LE), cut=found.cut)


def _hops(problem: Problem, seed: int, seconds: float) -> Made:
    hops_MM = problem.topology.hops_MM
    return _equal(problem, hops.hops_optimal(problem.load_LE, hops_MM, problem.dispatcher))


def _moetuner(problem: Problem, seed: int, seconds: float) -> Made:
    found = moetuner.two_stages(problem.tuner, True, seconds)
    return dataclasses.replace(_equal(problem, found.device_LE), cut=found.cut)


def _moetuner_free(problem: Problem, seed: int, seconds: float) -> Made:
    found = moetuner.two_stages(problem.tuner, False, seconds)
    return Made(uneven.of_devices(found.device_LE, problem.num_devices), cut=found.cut)


ALL: tuple[Baseline, ...] = (
    Baseline("contiguous", "contiguous", "neighbouring ids together: nobody planned", _contiguous),
    Baseline("round-robin", "round-robin", "expert e on device e mod M", _round_robin),
    Baseline("zigzag", "zigzag", "heaviest first, dealt out forth and back", _zigzag),
    Baseline("random", "random", "equal groups at random; the mean of 10", _random),
    Baseline(
        "lpt",
        "EPLB-style packing",
        "heaviest first, to the lightest device with room (LPT): EPLB without spare slots",
        _lpt,
    ),
    Baseline(
        "smartmoe", "SmartMoE greedy", "LPT that keeps what it can in place (ATC 2023)", _smartmoe
    ),
    Baseline(
        "eplb-hierarchical",
        "EPLB hierarchical",
        "DeepSeek's, with every expert its own group: nodes, then copies, then devices",
        _eplb_hierarchical,
        needs="nodes",
    ),
    Baseline(
        "eplb-global", "EPLB global", "DeepSeek's on one node", _eplb_global, needs="replicas"
    ),
    Baseline(
        "balanced-slots",
        "balanced slots",
        "EPLB without two copies on one device",
        _balanced_slots,
        needs="replicas",
    ),
    Baseline(
        "cooccurrence",
        "co-occurrence packing",
        "groups by co-activation up to 80 % of slots and load, then LPT (a TensorRT-LLM branch)",
        _cooccurrence,
    ),
    Baseline(
        "topology-cost",
        "topology-cost swaps",
        "swaps towards the devices that ask, price by tier (SGLang pull request 37923)",
        _topology_cost,
    ),
    Baseline(
        "hops",
        "topology ILP",
        "fewest hops of all assignments, layer by layer, without load caps (arXiv 2508.09229)",
        _hops,
        needs="ways",
    ),
    Baseline("occult", "Occult-style groups", "equal groups grown by co-activation alone", _occult),
    Baseline(
        "grace",
        "GRACE-style groups",
        "spectral groups of uneven size, within half of the mean; other slots stay empty",
        _grace,
    ),
    Baseline(
        "exflow",
        "ExFlow",
        "transitions of the best expert: nodes, then devices, a program per pair of layers",
        _exflow,
        slow=True,
        needs="transitions",
    ),
    Baseline(
        "moetuner",
        "MoETuner",
        "even clusters, then devices of least slowest pair: integer programs, equal sizes",
        _moetuner,
        slow=True,
    ),
    Baseline(
        "moetuner-free",
        "MoETuner, free sizes",
        "the same with clusters of any size, as published; other slots stay empty",
        _moetuner_free,
        slow=True,
    ),
)
