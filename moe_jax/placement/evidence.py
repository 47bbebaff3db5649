"""Judges a placement on a trace: locality, rows and load, each with an interval.

Axes: S sequences, L MoE layers, M devices, B bootstrap samples. Everything is tallied per sequence
first, because a bootstrap over tokens is 5 to 9 times too narrow: tokens of a sequence are alike.
Intervals are 95 % percentile intervals over BOOTSTRAPS resamples of the sequences.

Rows are counted as a deduplicating exchange moves them (partial sums, one row each way per device)
with homes drawn uniformly, per token and layer; `coherent` and `shuffled` also as cost.py counts
them. Resampled sequences keep the homes that shuffled dispatch gave them in the steps of the trace.

With replicas the copy rule needs a home, so everything is the mean over all homes, each followed
through the layers. Locality is then counted where tokens stay (coherent dispatch), loads where the
dispatch that is asked for has them, everything else where they return.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num

from moe_jax.placement import cost, ways
from moe_jax.placement.plan import Placement
from moe_jax.placement.topology import Topology
from moe_jax.routing.trace import Trace

BOOTSTRAPS = 1000
MIN_SEQUENCES = 20  # with fewer that judge an interval says too little to recommend anything


@dataclasses.dataclass(frozen=True)
class Figure:
    """A mean over the trace and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    """Sums per sequence, some by layer, whole without replicas; the figures are ratios of them."""

    token_layers_SL: Num[np.ndarray, "S L"]  # tokens with an expert
    distinct_SL: Num[np.ndarray, "S L"]  # distinct devices of a token's experts
    nodes_S: Num[np.ndarray, " S"]  # distinct nodes, over layers
    moves_S: Num[np.ndarray, " S"]  # transitions of the best expert
    stays_S: Num[np.ndarray, " S"]  # ... that stay on their device
    pairs_S: Num[np.ndarray, " S"]  # all K x K transitions
    pair_stays_S: Num[np.ndarray, " S"]  # ... that stay
    exchange_SL: Float[np.ndarray, "S L"]  # rows of exchange dispatch, both ways
    hierarchical_SL: Float[np.ndarray, "S L"]  # ... of hierarchical dispatch
    coherent_SL: Float[np.ndarray, "S L"]  # ... of coherent dispatch
    shuffled_SL: Float[np.ndarray, "S L"]  # ... of shuffled dispatch
    load_SLM: Num[np.ndarray, "S L M"]  # rows computed


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a placement does on a trace.

    Attributes:
      rows: rows per token and layer for every dispatch, both ways.
      rows_worst: the same, of the layer with most.
      top1: share of best-expert transitions that stay on their device.
      hops: transitions of the best expert that leave their device, per token.
      all_pairs: the same share over all K x K transitions.
      distinct_devices: devices per token and layer.
      distinct_devices_worst: the same, of the layer with most.
      distinct_nodes: nodes per token and layer.
      load_mean: max / mean device load (over its speed, 1 on average), mean over layers.
      load_worst: max / mean device load of the worst layer.
      balancedness: mean / max, mean over layers (vLLM, SGLang).
      imbalance_ratio: (max - mean) / mean, mean over layers (TensorRT-LLM).
      load_cv: standard deviation / mean of the device loads, mean over layers.

    With replicas loads depend on where tokens are: where the dispatch has them, or under the copy
    rule `stay`, which is made for it, where they stay.
    """

    rows: dict[str, Figure]
    rows_worst: dict[str, Figure]
    top1: Figure
    hops: Figure
    all_pairs: Figure
    distinct_devices: Figure
    distinct_devices_worst: Figure
    distinct_nodes: Figure
    load_mean: Figure
    load_worst: Figure
    balancedness: float
    imbalance_ratio: float
    load_cv: float

    def to_json(self) -> dict[str, Any]:
        """Every figure as {value, low, high}; the loads under one key."""
        fields = dataclasses.asdict(self)
        loads = {"mean": fields.pop("load_mean"), "worst": fields.pop("load_worst")}
        return {**fields, "load_max_over_mean": loads}


def judge(
    trace: Trace,
    placement: Placement,
    topology: Topology,
    seed: int = 0,
    step_tokens: int | None = None,
    dispatch: str = "exchange",
) -> Evidence:
    """All figures of one placement on one trace.

    Args:
      seed: of the resamples.
      step_tokens: for shuffled dispatch, see row_homes.py; None: the trace is one step.
      dispatch: whose loads are meant, where there are replicas.
    """
    tally = count(trace, placement, topology, step_tokens, dispatch)
    weight_BS = resamples(trace.num_sequences, seed)
    devices = topology.num_devices
    tokens_SL = tally.token_layers_SL
    per_token = (tokens_SL.sum(axis=1), weight_BS)
    rows_SL = {
        "exchange": tally.exchange_SL,
        "hierarchical": tally.hierarchical_SL,
        "coherent": tally.coherent_SL,
        "shuffled": tally.shuffled_SL,
        "gathered": tokens_SL * (2.0 * (devices - 1)),
    }
    load_LM = tally.load_SLM.sum(axis=0)
    speed_M = topology.speed_M
    over_BL = over_mean(np.tensordot(weight_BS, tally.load_SLM, axes=1), speed_M)
    over_L = over_mean(load_LM, speed_M)
    layers = max(placement.num_layers - 1, 1)
    least = _least_rows(placement, topology)
    moves_per_token = _ratio(tally.moves_S - tally.stays_S, tally.moves_S, weight_BS)
    return Evidence(
        rows={name: _ratio(r_SL.sum(axis=1), *per_token) for name, r_SL in rows_SL.items()},
        rows_worst={
            name: _worst(r_SL, tokens_SL, weight_BS, least.get(name, 0.0))
            for name, r_SL in rows_SL.items()
        },
        top1=_ratio(tally.stays_S, tally.moves_S, weight_BS),
        hops=Figure(*(layers * v for v in dataclasses.astuple(moves_per_token))),
        all_pairs=_ratio(tally.pair_stays_S, tally.pairs_S, weight_BS),
        distinct_devices=_ratio(tally.distinct_SL.sum(axis=1), *per_token),
        distinct_devices_worst=_worst(tally.distinct_SL, tokens_SL, weight_BS, 1.0),
        distinct_nodes=_ratio(tally.nodes_S, *per_token),
        load_mean=_largest(over_L.mean(), over_BL.mean(axis=1), 1.0),
        load_worst=_largest(over_L.max(), over_BL.max(axis=1), 1.0),
        balancedness=float((1 / over_L).mean()),
        imbalance_ratio=float((over_L - 1).mean()),
        load_cv=float(variation(load_LM, speed_M).mean()),
    )


def count(
    trace: Trace,
    placement: Placement,
    topology: Topology,
    step_tokens: int | None = None,
    dispatch: str = "exchange",
) -> Tally:
    """The sums per sequence; `step_tokens` and `dispatch` as of `judge`."""
    shuffled_SL, shuffled_SLM = _shuffled(trace, placement, topology, step_tokens)
    homes = cost.homes(placement, trace.num_tokens)
    each = [_count(trace, placement, topology, home_T, shuffled_SL, dispatch) for home_T in homes]
    if len(each) == 1:
        return each[0]
    names = [field.name for field in dataclasses.fields(Tally)]
    mean = Tally(**{n: np.mean([getattr(one, n) for one in each], axis=0) for n in names})
    return dataclasses.replace(mean, load_SLM=shuffled_SLM) if dispatch == "shuffled" else mean


def _shuffled(
    trace: Trace, placement: Placement, topology: Topology, step_tokens
) -> tuple[np.ndarray, np.ndarray]:
    """Of shuffled dispatch: float64 [S, L], rows both ways; int64 [S, L, M], rows computed."""
    rows_LS, load_LSM, dispatch, devices = [], [], "shuffled", placement.num_devices
    sequence_T = np.repeat(np.arange(trace.num_sequences), trace.seq_len)
    (home_T,) = cost.homes(placement, trace.num_tokens, None, dispatch, step_tokens)
    where = (topology.devices_per_node, None, step_tokens)
    for step in cost.walk(trace.expert_ids_TLK, placement, dispatch, home_T, *where):
        away_T = _away(step.device_TK, cost.first_of(step.device_TK), step.home_T, devices)
        rows_LS.append(np.add.reduceat(2 * away_T, _starts(trace)))
        shape = (trace.num_sequences, devices)
        load_LSM.append(per_sequence(step.device_TK, sequence_T, shape))
    return np.stack(rows_LS, axis=1), np.stack(load_LSM, axis=1)


def _starts(trace: Trace) -> np.ndarray:
    """int64 [S]: the first token of every sequence."""
    return np.concatenate([[0], np.cumsum(trace.seq_len[:-1], dtype=np.int64)])


def _count(
    trace: Trace,
    placement: Placement,
    topology: Topology,
    home_T: Int[np.ndarray, " T"],
    shuffled_SL: Float[np.ndarray, "S L"],
    dispatch: str,
) -> Tally:
    start_S = _starts(trace)
    per_token = {name: np.zeros(trace.num_tokens, np.int64) for name in _PER_TOKEN}
    sums_SL = {name: np.zeros((trace.num_sequences, trace.num_layers)) for name in _PER_LAYER}
    load_SLM = np.zeros(
        (trace.num_sequences, placement.num_layers, placement.num_devices), np.int64
    )
    sequence_T = np.repeat(np.arange(trace.num_sequences), trace.seq_len)
    nodes, each, before_TK = topology.nodes, topology.devices_per_node, None
    staying = cost.walk(trace.expert_ids_TLK, placement, "coherent", home_T, each)
    for layer, stay in enumerate(staying):
        device_TK = stay.device_TK
        if placement.has_replicas:  # which copy depends on where the token is
            device_TK = cost.devices_TK(trace.expert_ids_TLK, placement, layer, home_T, each)
        node_TK = nodes.node_of(device_TK)
        first_TK, first_node_TK = cost.first_of(device_TK), cost.first_of(node_TK)
        layer_T = {name: np.zeros(trace.num_tokens) for name in _PER_LAYER}
        layer_T["token_layers"] += (device_TK >= 0).any(axis=1)
        layer_T["distinct"] += first_TK.sum(axis=1)
        per_token["nodes"] += first_node_TK.sum(axis=1)
        stays = dispatch == "coherent" or placement.share_LNP is not None
        served_TK = stay.device_TK if stays else device_TK
        load_SLM[:, layer] = per_sequence(
            served_TK, sequence_T, (trace.num_sequences, placement.num_devices)
        )
        if placement.has_replicas:
            layer_T["exchange"] += 2 * _away(device_TK, first_TK, home_T, placement.num_devices)
            relayed_TK = first_TK & (device_TK != nodes.relay(home_T[:, None], node_TK))
            sent_TK = first_node_TK & (node_TK != nodes.node_of(home_T)[:, None])
            layer_T["hierarchical"] += 2.0 * (relayed_TK.sum(axis=1) + sent_TK.sum(axis=1))
        else:  # homes are uniform and decide nothing else
            far_M, far_N = nodes.devices - nodes.relayed_M, nodes.devices - nodes.size_N
            away_T = (first_TK * far_M[device_TK] + first_node_TK * far_N[node_TK]).sum(axis=1)
            layer_T["hierarchical"] += 2 * away_T / nodes.devices
        stay_first_TK = cost.first_of(stay.device_TK)
        for at_T in (stay.home_T, stay.next_T):
            layer_T["coherent"] += _away(stay.device_TK, stay_first_TK, at_T, placement.num_devices)
        if before_TK is not None:
            _count_stays(per_token, before_TK, stay.device_TK)
        before_TK = stay.device_TK
        for name, sum_SL in sums_SL.items():
            sum_SL[:, layer] = np.add.reduceat(layer_T[name], start_S)
    sums = {f"{name}_S": np.add.reduceat(a_T, start_S) for name, a_T in per_token.items()}
    if not placement.has_replicas:
        sums_SL["exchange"] = sums_SL["distinct"] * (2 * (nodes.devices - 1) / nodes.devices)
    sums |= {f"{name}_SL": sum_SL for name, sum_SL in sums_SL.items()}
    return Tally(**sums, shuffled_SL=shuffled_SL, load_SLM=load_SLM)


_PER_TOKEN = ("nodes", "moves", "stays", "pairs", "pair_stays")
_PER_LAYER = ("token_layers", "distinct", "exchange", "hierarchical", "coherent")


def _count_stays(per_token: dict, before_TK: np.ndarray, device_TK: np.ndarray) -> None:
    for j in range(before_TK.shape[1]):
        for k in range(device_TK.shape[1]):
            real_T = (before_TK[:, j] >= 0) & (device_TK[:, k] >= 0)
            stay_T = real_T & (before_TK[:, j] == device_TK[:, k])
            per_token["pairs"] += real_T
            per_token["pair_stays"] += stay_T
            if j == k == 0:
                per_token["moves"] += real_T
                per_token["stays"] += stay_T


def _away(device_TK, first_TK, home_T, devices: int) -> np.ndarray:
    """float64 [T]: distinct devices other than home; expected where home is unknown."""
    away_T = (first_TK & (device_TK != home_T[:, None])).sum(axis=1).astype(float)
    return np.where(home_T < 0, away_T * (devices - 1) / devices, away_T)


def per_sequence(index_TK, sequence_T, shape: tuple[int, int]) -> np.ndarray:
    """int64 [S, size], the shape: how often each index occurs; negative ones do not count."""
    sequences, size = shape
    counts = np.bincount(
        (sequence_T[:, None] * size + index_TK)[index_TK >= 0], minlength=sequences * size
    )
    return counts.reshape(sequences, size)


def over_mean(load, speed_M: np.ndarray) -> np.ndarray:
    """The largest load over its device's speed, over the mean load; 1 where there is none."""
    mean = load.mean(axis=-1)
    return np.where(mean > 0, (load / speed_M).max(axis=-1) / np.maximum(mean, 1e-300), 1.0)


def variation(load_LM: np.ndarray, speed_M: np.ndarray) -> np.ndarray:
    """float64 [L]: standard deviation over mean of the loads, each over its device's speed."""
    relative_LM = load_LM / speed_M
    return relative_LM.std(axis=1) / np.maximum(relative_LM.mean(axis=1), 1e-300)


def resamples(sequences: int, seed: int) -> np.ndarray:
    """float64 [B, S]: how often each sequence is drawn."""
    rng = np.random.default_rng(seed)
    draws_BS = rng.multinomial(sequences, np.full(sequences, 1 / sequences), size=BOOTSTRAPS)
    return draws_BS.astype(float)


def _ratio(above_S, below_S, weight_BS) -> Figure:
    total = below_S.sum()
    if total == 0:
        return Figure(0.0, 0.0, 0.0)
    below_B = weight_BS @ below_S
    return _figure(above_S.sum() / total, (weight_BS @ above_S) / np.maximum(below_B, 1e-300))


def _least_rows(placement: Placement, topology: Topology) -> dict[str, float]:
    """Rows of a token whose experts are together; with replicas they may all be at home."""
    if placement.has_replicas:
        return {}
    alone_MM = np.eye(topology.num_devices)
    where = (alone_MM, topology.nodes.sums(alone_MM), 1.0)
    return {n: float(ways.rows(topology, n, *where).min()) for n in ("exchange", "hierarchical")}


def _worst(above_SL, below_SL, weight_BS, least: float) -> Figure:
    """The ratio of the layer where it is largest; each resample has its own worst layer."""
    value_L = above_SL.sum(axis=0) / np.maximum(below_SL.sum(axis=0), 1e-300)
    value_BL = (weight_BS @ above_SL) / np.maximum(weight_BS @ below_SL, 1e-300)
    return _largest(value_L.max(), value_BL.max(axis=1), least)


def _largest(value, samples_B, least: float) -> Figure:
    """Of a maximum: that of a resample is too large, as the trace's own is.

    The interval reaches as far below as resamples are above, twice: once for each (paired.py), and
    not below `least`, which nothing can be. That is no promise of coverage: on few sequences it
    lies above the figure of many too often (README).
    """
    found = _figure(value, samples_B)
    unbiased = 2 * (found.value - float(samples_B.mean()))
    low, high = min(found.low, found.low + unbiased), max(found.high, found.high + unbiased)
    return Figure(found.value, max(low, min(least, found.value)), high)


def _figure(value, samples_B) -> Figure:
    low, high = np.percentile(samples_B, [2.5, 97.5])
    return Figure(float(value), float(low), float(high))
