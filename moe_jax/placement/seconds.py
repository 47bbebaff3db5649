"""From rows to seconds: bytes over links, rows through devices, the slowest of each per layer.

Axes: L MoE layers, M devices. A layer costs dispatch + compute + combine. In each exchange a device
sends and receives at the same time, so a tier needs max over devices of max(bytes out, bytes in) /
bandwidth, plus its latency where it is used. The tiers of a direct exchange run at once (the
slower one counts); on a torus the fast tier needs what its busiest link does (torus.py), and the
latency of as many hops as the longest way has; the two hops of hierarchical dispatch follow each
other (they add up). Compute is the slowest device's rows, over its own speed. Counts are scaled
from the trace to a batch of `batch_tokens`.

In shuffled dispatch attention gathers all rows on every device before a layer and scatters them
after: the bytes of a gathered dispatch, whatever the placement. They count, since where tokens
return home attention sends nothing; what is gathered of homes and ids beside them does not.

Shared experts compute every token on the device that holds it, an equal share each (in coherent
dispatch too, where tokens do not lie evenly: attention has the same imbalance and is left out).
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Num

from moe_jax.errors import Refused
from moe_jax.placement.cost import Rows
from moe_jax.placement.topology import Tier, Topology
from moe_jax.placement.torus import Torus


@dataclasses.dataclass(frozen=True)
class Work:
    """Sizes that turn rows into bytes and operations.

    Attributes:
      d_model: values of a row.
      d_ff: hidden size of one expert (three matrices: gate, up, down).
      value_bytes: bytes of a value on the wire.
      kv_values: key and value entries of one token and layer (2 d_kv); `coherent` gathers them on
        every device.
      batch_tokens: tokens of a step, over all devices.
      num_shared_experts: experts that every token uses, besides those that are routed.
      d_ff_shared: hidden size of one of them; 0: as d_ff.
      num_dense_layers: layers without experts, for the seconds of a whole step.
      d_ff_dense: hidden size of one of them.
    """

    d_model: int = 2048
    d_ff: int = 1024
    value_bytes: int = 2
    kv_values: int = 1024
    batch_tokens: int = 65536
    num_shared_experts: int = 0
    d_ff_shared: int = 0
    num_dense_layers: int = 0
    d_ff_dense: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.default == 0 else 1
            if type(value) is not int or not least <= value < 2**40:
                raise Refused(
                    field.name, value, f"a whole number of at least {least}", "Correct it"
                )
        if self.num_dense_layers and not self.d_ff_dense:
            raise Refused(
                "d_ff_dense", 0, "dense layers need their hidden size", "Give --d-ff-dense"
            )

    @property
    def row_bytes(self) -> int:
        return self.d_model * self.value_bytes

    @property
    def row_flops(self) -> int:
        return 6 * self.d_model * self.d_ff

    @property
    def shared_flops(self) -> int:
        """Operations of the shared experts of one layer, for a token."""
        return 6 * self.d_model * self.num_shared_experts * (self.d_ff_shared or self.d_ff)

    @property
    def dense_flops(self) -> int:
        """Operations of one dense layer, attention left out, for a token."""
        return 6 * self.d_model * self.d_ff_dense

    @property
    def expert_bytes(self) -> int:
        """Parameters of one expert of one layer."""
        return 3 * self.d_model * self.d_ff * self.value_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Seconds:
    """Seconds of every layer of one step, by phase (float64)."""

    dispatch_L: Float[np.ndarray, " L"]
    compute_L: Float[np.ndarray, " L"]
    combine_L: Float[np.ndarray, " L"]

    @property
    def total_L(self) -> Float[np.ndarray, " L"]:
        return self.dispatch_L + self.compute_L + self.combine_L


def seconds(
    rows: Rows,
    computed_LM: Num[np.ndarray, "L M"],
    topology: Topology,
    work: Work,
    dispatch: str,
    num_tokens: int,
    sharpness: float = math.inf,
    widths: tuple[float, float] = (1.0, 1.0),
) -> Seconds:
    """Seconds of a step of `work.batch_tokens`, from the counts of `num_tokens` tokens.

    Args:
      sharpness: of `largest`, in place of the slowest device; searches use less than infinity.
      widths: bytes of a row on its way to its experts and home, in `work.row_bytes`.
    """
    to_bytes = work.batch_tokens / num_tokens * work.row_bytes
    out, back = (to_bytes * width for width in widths)
    gathered = dispatch == "gathered"
    one_after_other = dispatch == "hierarchical"
    where = topology, one_after_other, gathered, sharpness
    there_L = exchange_seconds(rows.dispatch_LMM * out, *where)
    return Seconds(
        there_L + attention_seconds(topology, work, dispatch),
        largest(compute_seconds(computed_LM, topology, work, num_tokens), sharpness),
        exchange_seconds(rows.combine_LMM * back, *where),
    )


def largest(seconds_LM: np.ndarray, sharpness: float) -> np.ndarray:
    """float64 [L]: the power mean of every row with this exponent; infinite: its largest value."""
    full_L = seconds_LM.max(axis=1)
    if sharpness == math.inf:
        return full_L
    # What a search adds up of two changes may be below 0 here and there.
    full_L, seconds_LM = np.maximum(full_L, 0.0), np.maximum(seconds_LM, 0.0)
    share_LM = seconds_LM / np.maximum(full_L, 1e-300)[:, None]
    return full_L * (share_LM**sharpness).mean(axis=1) ** (1 / sharpness)


def compute_seconds(computed_LM, topology: Topology, work: Work, num_tokens: int) -> np.ndarray:
    """float64 [L, M]: seconds of every device's experts, shared ones included."""
    scale = work.batch_tokens / num_tokens
    routed_LM = computed_LM * (scale * work.row_flops / topology.flops_M)
    return routed_LM + shared_seconds(topology, work)


def shared_seconds(topology: Topology, work: Work) -> np.ndarray:
    """float64 [M]: seconds of the shared experts of a layer, for an equal share of the tokens."""
    return work.batch_tokens / topology.num_devices * work.shared_flops / topology.flops_M


def step_seconds(layer_seconds: float, layers: int, topology: Topology, work: Work) -> float:
    """A whole step without attention: `layers` MoE layers of that mean, and the dense ones.

    Dense layers compute an equal share of the tokens on every device; the slowest one counts.
    """
    share = work.batch_tokens / topology.num_devices
    dense = share * work.dense_flops / float(topology.flops_M.min())
    return layers * layer_seconds + work.num_dense_layers * dense


def exchange_seconds(
    bytes_LMM,
    topology: Topology,
    one_after_other: bool,
    gathered: bool = False,
    sharpness: float = math.inf,
) -> np.ndarray:
    """float64 [L]: the slowest device of the slower tier, or of both tiers in turn."""
    tiers = tier_seconds(bytes_LMM, topology, gathered)
    fast_L, slow_L = (largest(tier_LM, sharpness) for tier_LM in tiers)
    return fast_L + slow_L if one_after_other else np.maximum(fast_L, slow_L)


def tier_seconds(bytes_LMM, topology: Topology, gathered: bool = False) -> list[np.ndarray]:
    """float64 [L, M], fast tier and slow tier: what each device needs to send and receive.

    gathered: all devices get the same, which neighbours of a torus pass on.
    """
    same_MM = topology.nodes.same_MM
    slow_LM = _direct_seconds(bytes_LMM * ~same_MM, topology.slow)
    if topology.torus is None:
        return [_direct_seconds(bytes_LMM * same_MM, topology.fast), slow_LM]
    return [_torus_seconds(bytes_LMM * same_MM, topology, topology.torus, gathered), slow_LM]


def _direct_seconds(bytes_LMM, tier: Tier) -> np.ndarray:
    """float64 [L, M]: every device sends and receives at the same time."""
    busy_LM = np.maximum(bytes_LMM.sum(axis=2), bytes_LMM.sum(axis=1))
    return busy_LM / tier.bandwidth + tier.latency * (busy_LM > 0)


def _torus_seconds(bytes_LMM, topology: Topology, torus: Torus, gathered: bool) -> np.ndarray:
    """float64 [L, M]: the busiest link that leaves each device, and the longest way of all rows.

    Gathered rows are received once over all links of a device, and passed on at the same time.
    """
    latency = topology.fast.latency
    if gathered:
        busy_LM = np.maximum(bytes_LMM.sum(axis=2), bytes_LMM.sum(axis=1))
        links_M = np.tile(np.maximum(torus.links_G, 1), topology.num_nodes)
        hops = int(torus.hops_GG.max())
        return busy_LM / (links_M * topology.fast.bandwidth) + latency * hops * (busy_LM > 0)
    busiest_LM = np.empty(bytes_LMM.shape[:2])
    for first in topology.nodes.first_N:
        inside = slice(first, first + torus.size)
        busiest_LM[:, inside] = torus.busiest_LG(bytes_LMM[:, inside, inside])
    hops_L1 = (topology.hops_MM * (bytes_LMM > 0)).max(axis=(1, 2))[:, None]
    return busiest_LM / topology.fast.bandwidth + latency * hops_L1 * (busiest_LM > 0)


def attention_seconds(topology: Topology, work: Work, dispatch: str) -> float:
    """What attention sends in a layer because of the dispatch, the same under every placement.

    Coherent: an all-gather of new keys and values. Shuffled: one of rows, and a reduce-scatter.
    """
    if dispatch == "coherent":
        return gather_seconds(topology, work, work.kv_values)
    if dispatch == "shuffled":
        return 2 * gather_seconds(topology, work, work.d_model)
    return 0.0


def gather_seconds(topology: Topology, work: Work, values: int) -> float:
    """An all-gather of so many values of every token of a step."""
    devices = topology.num_devices
    share = work.batch_tokens / devices * values * work.value_bytes
    bytes_MM = np.full((1, devices, devices), share)
    bytes_MM[0, np.arange(devices), np.arange(devices)] = 0
    return float(exchange_seconds(bytes_MM, topology, False, gathered=True)[0])
