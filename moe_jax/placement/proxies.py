"""What counts of pairs say about rows, and how far that is from the rows that really travel.

Axes: T tokens, L MoE layers, E experts, K experts per token, M devices, N nodes.

Solvers cannot look at every token in every step; they look at pairs of experts. What such a proxy
says, in rows per token and layer, both ways, homes drawn uniformly:

- exchange, co-activation: 2 (M - 1) / M times (experts - pairs of the token's experts that share a
  device). Exact while no device holds more than two of a token's experts; p of them save p - 1
  contacts, and the proxy counts p (p - 1) / 2, so that it says too little.
- hierarchical, co-activation: the same for devices of a node and for nodes, added up.
- coherent, co-activation and transitions: a token arrives where its best expert of the layer before
  is. 2 (experts - pairs) - 1 - pairs (best expert, any expert of the next layer) that share a
  device; the first layer's homes are uniform. Exact for one expert per token.
- coherent, transitions of the best expert (ExFlow, arXiv 2401.08383): those that leave their
  device. Exact for one expert per token, blind to the other experts.
- shuffled, co-activation and transitions: a token is taken to be where its best expert of the layer
  before is, which saves a row both ways: 2 (experts - pairs - pairs (best expert, any expert of the
  next layer)). Blind to the other experts' pull, and to homes being full.
- shuffled, the best expert's device: the same homes, but sets of experts counted as they are. Not
  one of pairs, yet what its search goes by (coherent.py): the error is that of homes alone.
- gathered moves the same rows under every placement.

Pairs do not say which copy of an expert serves a token: there is no proxy of plans with replicas.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.placement.plan import Placement
from moe_jax.placement.topology import Topology
from moe_jax.routing import affinity
from moe_jax.routing.trace import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The counts that proxies are made of.

    Attributes:
      together_LEE: tokens per pair of experts of a layer, symmetric.
      best_to_all_LEE: pairs (best expert, any expert of the next layer).
      best_LEE: pairs of best experts.
      experts_L: experts that tokens have in a layer, all tokens together.
      token_layers: tokens with an expert, over layers.
      first: tokens with an expert in layer 0.
    """

    together_LEE: Int[np.ndarray, "L E E"]
    best_to_all_LEE: Int[np.ndarray, "pairs E E"]
    best_LEE: Int[np.ndarray, "pairs E E"]
    experts_L: Int[np.ndarray, " L"]
    token_layers: int
    first: int

    @classmethod
    def of(cls, trace: Trace) -> "Pairs":
        real_TLK = trace.expert_ids_TLK != trace.no_expert
        tokens_L = real_TLK.any(axis=2).sum(axis=0)
        return cls(
            affinity.coactivation_LEE(trace),
            affinity.transitions_best_to_all_LEE(trace),
            affinity.transitions_top1_LEE(trace),
            real_TLK.sum(axis=(0, 2)),
            int(tokens_L.sum()),
            int(tokens_L[0]),
        )


@dataclasses.dataclass(frozen=True)
class Proxy:
    """A proxy against the truth, both in rows per token and layer.

    Attributes:
      dispatch: how rows travel.
      pairs: what the proxy counts.
      value: what it says.
      true: what cost.py counts, token by token.
    """

    dispatch: str
    pairs: str
    value: float
    true: float

    @property
    def error(self) -> float:
        """Of the truth, as a share; negative where the proxy says too little."""
        return (self.value - self.true) / self.true if self.true else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "error": self.error}


def of(
    pairs: Pairs, placement: Placement, topology: Topology, true: dict[str, float]
) -> tuple[Proxy, ...]:
    """Every proxy of one placement; none with replicas.

    Args:
      pairs: counts of the trace.
      placement: which devices hold which experts.
      topology: its nodes.
      true: rows per token and layer, by dispatch.
    """
    if placement.has_replicas:
        return ()
    devices, nodes = topology.num_devices, topology.num_nodes
    device_LE = placement.device_LE
    contacts = _contacts(pairs, device_LE)
    on_nodes = _contacts(pairs, topology.node_M[device_LE])
    share = pairs.token_layers
    # where nodes differ in size, the chance of an average one
    by_node = 2 * (nodes - 1) / nodes * on_nodes + 2 * (devices - nodes) / devices * contacts
    found = [
        ("exchange", "co-activation", 2 * (devices - 1) / devices * contacts / share),
        ("hierarchical", "co-activation, by tier", by_node / share),
        (
            "coherent",
            "co-activation and transitions",
            _coherent(pairs, device_LE, devices, contacts) / share,
        ),
        ("coherent", "transitions of the best expert", _leaving(pairs, device_LE) / share),
        (
            "shuffled",
            "co-activation and transitions",
            _shuffled(pairs, device_LE, devices, contacts) / share,
        ),
        ("shuffled", "the best expert's device", _waiting(true, devices)),
        ("gathered", "the same under every placement", 2.0 * (devices - 1)),
    ]
    return tuple(Proxy(name, what, float(value), true[name]) for name, what, value in found)


def _contacts(pairs: Pairs, group_LE: np.ndarray) -> float:
    """Contacts of tokens and groups, if every pair in one group saved one."""
    return float(pairs.experts_L.sum()) - _kept(pairs.together_LEE, group_LE, group_LE) / 2


def _coherent(pairs: Pairs, device_LE: np.ndarray, devices: int, contacts: float) -> float:
    """Every token-layer: away from where it arrives, and away from where it goes on."""
    saved = _at_hand(pairs, device_LE, devices)
    return 2 * contacts - pairs.token_layers - saved


def _shuffled(pairs: Pairs, device_LE: np.ndarray, devices: int, contacts: float) -> float:
    """Every token-layer: away from where it is, and back."""
    return 2 * contacts - 2 * _at_hand(pairs, device_LE, devices)


def _waiting(true: dict[str, float], devices: int) -> float:
    """Rows of an exchange from where coherent dispatch waits: what goes out there, both ways.

    What comes back there is one row less than there are devices of a token's experts.
    """
    distinct = true["exchange"] * devices / (2 * (devices - 1)) if devices > 1 else 1.0
    return 2 * (true["coherent"] - distinct + 1)


def _at_hand(pairs: Pairs, device_LE: np.ndarray, devices: int) -> float:
    """Contacts with the device that a token is on; in layer 0 on any one."""
    first = dataclasses.replace(
        pairs, together_LEE=pairs.together_LEE[:1], experts_L=pairs.experts_L[:1]
    )
    arrives = _kept(pairs.best_to_all_LEE, device_LE[:-1], device_LE[1:])
    return arrives + _contacts(first, device_LE[:1]) / devices


def _leaving(pairs: Pairs, device_LE: np.ndarray) -> float:
    """Transitions that leave their device; into layer 0 from a home drawn uniformly."""
    devices = int(device_LE.max()) + 1
    stay = _kept(pairs.best_LEE, device_LE[:-1], device_LE[1:])
    return float(pairs.best_LEE.sum()) - stay + pairs.first * (devices - 1) / devices


def _kept(count_LEE: np.ndarray, from_LE: np.ndarray, to_LE: np.ndarray) -> float:
    """Counts of pairs whose ends have the same label."""
    return float(
        sum(
            count_EE[from_E[:, None] == to_E[None, :]].sum()
            for count_EE, from_E, to_E in zip(count_LEE, from_LE, to_LE, strict=True)
        )
    )
