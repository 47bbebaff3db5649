"""The vectorised counts against a token-by-token oracle that follows every row by hand."""

import json
import pathlib
import tomllib

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import baselines, contacts, cost, evidence, problem, replication, topology
from moe_jax.placement import seconds as seconds_lib
from moe_jax.placement.plan import Placement
from moe_jax.routing import synthetic
from moe_jax.routing.trace import Trace
from tests import slow_homes


def holey_trace(seed: int, experts: int = 8, top_k: int = 3, layers: int = 3) -> Trace:
    """Random tokens, some with fewer experts or none at all."""
    rng = np.random.default_rng(seed)
    ids = np.stack(
        [
            np.stack([rng.permutation(experts)[:top_k] for _ in range(layers)]).astype(np.uint8)
            for _ in range(30)
        ]
    )
    ids[rng.random(ids.shape) < 0.2] = 255
    ids[0] = 255
    return Trace(ids, experts, np.array([10, 5, 15]))


def oracle(trace, placement, dispatch, homes, combine, per_node, step_tokens=30):
    """Follows each token: the set of (from, to) rows it sends, out and back."""
    layers, devices = placement.num_layers, placement.num_devices
    chosen_LT = None
    if dispatch == "shuffled":
        of_expert_LE = np.column_stack([placement.device_LE, np.full(layers, -1)])
        ids_LTK = np.minimum(trace.expert_ids_TLK, trace.num_experts).transpose(1, 0, 2)
        device_LTK = [of_expert_LE[n][ids_TK] for n, ids_TK in enumerate(ids_LTK)]
        chosen_LT = slow_homes.of_layers(device_LTK, devices, step_tokens)
    out, back = (np.zeros((layers, devices, devices), int) for _ in range(2))

    def send(table, layer, source, destination, times=1):
        if source != destination:
            table[layer, source, destination] += times

    for number, (token, home) in enumerate(zip(trace.expert_ids_TLK.tolist(), homes, strict=True)):
        for layer, chosen in enumerate(token):
            home = chosen_LT[layer][number] if chosen_LT else home
            places = [int(placement.device_LE[layer, e]) for e in chosen if e != 255]
            if dispatch == "gathered":
                if places:
                    for other in range(devices):
                        send(out, layer, home, other)
                        answers = len(places) if combine == "exact" else 1
                        send(back, layer, other, home, answers)
                continue
            following = home
            if dispatch == "coherent" and chosen[0] != 255:
                following = int(placement.device_LE[layer, chosen[0]])
            answers = places if combine == "exact" else sorted(set(places))
            if dispatch == "hierarchical":
                entry = {n: n * per_node + home % per_node for n in range(devices // per_node)}
                for node in {place // per_node for place in places}:
                    send(out, layer, home, entry[node])
                for place in set(places):
                    send(out, layer, entry[place // per_node], place)
                if combine == "exact":
                    for place in answers:
                        send(back, layer, place, entry[place // per_node])
                        send(back, layer, entry[place // per_node], home)
                else:
                    for place in answers:
                        send(back, layer, place, entry[place // per_node])
                    for node in {place // per_node for place in places}:
                        send(back, layer, entry[node], home)
            else:
                for place in set(places):
                    send(out, layer, home, place)
                for place in answers:
                    send(back, layer, place, following)
            home = following
    return out, back


@pytest.mark.parametrize("dispatch", cost.DISPATCHES)
@pytest.mark.parametrize("combine", cost.COMBINES)
@pytest.mark.parametrize("seed", range(5))
def test_rows_equal_the_oracle(dispatch, combine, seed):
    trace = holey_trace(seed)
    homes = np.random.default_rng(seed + 50).integers(4, size=30)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, seed), 4)
    counted = cost.rows(trace.expert_ids_TLK, placement, dispatch, homes, combine, 2)
    out, back = oracle(trace, placement, dispatch, homes.tolist(), combine, 2)
    assert counted.dispatch_LMM.dtype == counted.combine_LMM.dtype == np.int64
    np.testing.assert_array_equal(counted.dispatch_LMM, out)
    np.testing.assert_array_equal(counted.combine_LMM, back)


@pytest.mark.parametrize("dispatch", cost.DISPATCHES)
@pytest.mark.parametrize("combine", cost.COMBINES)
def test_unknown_homes_give_the_mean_over_all_homes(dispatch, combine):
    trace = holey_trace(7)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 7), 4)
    expected = cost.rows(trace.expert_ids_TLK, placement, dispatch, None, combine, 2)
    outs, backs = zip(
        *(oracle(trace, placement, dispatch, [home] * 30, combine, 2) for home in range(4)),
        strict=True,
    )
    np.testing.assert_allclose(expected.dispatch_LMM, np.mean(outs, axis=0), atol=1e-12)
    np.testing.assert_allclose(expected.combine_LMM, np.mean(backs, axis=0), atol=1e-12)


@pytest.mark.parametrize("step_tokens", [1, 7, 12, 30, 100])
@pytest.mark.parametrize("combine", cost.COMBINES)
def test_steps_of_shuffled_dispatch(step_tokens, combine):
    """Steps that do not fill up, that four devices do not divide, that hold one token only."""
    trace = holey_trace(9)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 9), 4)
    counted = cost.rows(
        trace.expert_ids_TLK, placement, "shuffled", None, combine, step_tokens=step_tokens
    )
    out, back = oracle(trace, placement, "shuffled", [0] * 30, combine, 2, step_tokens)
    np.testing.assert_array_equal(counted.dispatch_LMM, out)
    np.testing.assert_array_equal(counted.combine_LMM, back)


def test_some_unknown_homes():
    trace = holey_trace(8)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 8), 4)
    homes = np.where(np.arange(30) % 2, cost.UNKNOWN, 3)
    mixed = cost.rows(trace.expert_ids_TLK, placement, "exchange", homes)
    odd = cost.rows(trace.expert_ids_TLK[1::2], placement, "exchange")
    even = cost.rows(trace.expert_ids_TLK[::2], placement, "exchange", np.full(15, 3))
    np.testing.assert_allclose(mixed.total_LMM, odd.total_LMM + even.total_LMM, atol=1e-12)


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent"])
def test_some_unknown_homes_with_copies(dispatch):
    """Rows and rows computed are sums over tokens: of those at home on 0 and of those anywhere."""
    trace = holey_trace(8)
    load_LE = np.random.default_rng(8).lognormal(0, 1.5, (3, 8))
    placement = replication.balanced_slots(load_LE, 12, 4)
    position_T = np.arange(30)
    homes = np.where(position_T % 2, cost.UNKNOWN, 0)

    def counted(pick, home_T):
        ids_TLK, turns = trace.expert_ids_TLK[pick], position_T[pick]
        of = (ids_TLK, placement, dispatch)
        total_LMM = cost.rows(*of, home_T, "partial", 2, turns).total_LMM
        return total_LMM, cost.computed_LP(*of, home_T, 2, turns)

    mixed = counted(slice(None), homes)
    odd, even = counted(slice(1, None, 2), None), counted(slice(None, None, 2), np.zeros(15, int))
    for of_all, of_odd, of_even in zip(mixed, odd, even, strict=True):
        np.testing.assert_allclose(of_all, of_odd + of_even, atol=1e-12)


def test_a_case_to_check_by_hand():
    """Experts 0, 1 on device 0 and 2, 3 on device 1; one layer; two tokens, both on device 0."""
    ids = np.array([[[0, 2]], [[2, 3]]], np.uint8)
    placement = Placement.contiguous(1, 4, 2)
    homes = np.array([0, 0])
    exact = cost.rows(ids, placement, "exchange", homes, "exact")
    np.testing.assert_array_equal(exact.dispatch_LMM, [[[0, 2], [0, 0]]])
    np.testing.assert_array_equal(exact.combine_LMM, [[[0, 0], [3, 0]]])
    partial = cost.rows(ids, placement, "exchange", homes, "partial")
    np.testing.assert_array_equal(partial.combine_LMM, [[[0, 0], [2, 0]]])
    np.testing.assert_array_equal(cost.computed_LP(ids, placement), [[1, 0, 2, 1]])


def test_relabelling_experts_or_devices_changes_nothing():
    trace = holey_trace(3)
    device_LE = baselines.random(3, 8, 4, 3)
    before = cost.rows(trace.expert_ids_TLK, Placement.from_device_LE(device_LE, 4), "coherent")
    rng = np.random.default_rng(0)
    expert, device = rng.permutation(8), rng.permutation(4)
    renamed = np.append(expert, np.full(248, 255)).astype(np.uint8)[trace.expert_ids_TLK]
    moved_LE = device[device_LE][:, np.argsort(expert)]
    after = cost.rows(renamed, Placement.from_device_LE(moved_LE, 4), "coherent")
    np.testing.assert_allclose(
        after.total_LMM[:, device][:, :, device], before.total_LMM, atol=1e-12
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"dispatch": "scattered"},
        {"combine": "none"},
        {"dispatch": "hierarchical"},
        {"dispatch": "hierarchical", "devices_per_node": 3},
        {"home_T": np.zeros(3, int)},
        {"home_T": np.full(30, 4)},
        {"placement": Placement.contiguous(2, 8, 4)},
        {"placement": Placement(np.array([[0, 1, 0, 2]] * 3), 3, 2)},
    ],
)
def test_bad_arguments_are_refused(changes):
    good = {"placement": Placement.contiguous(3, 8, 4), "dispatch": "exchange"}
    with pytest.raises(Refused):
        cost.rows(holey_trace(0).expert_ids_TLK, **{**good, **changes})


TOPOLOGIES = [
    topology.flat(4),
    topology.nodes_by_devices(2, 4),
    topology.nodes_by_devices(4, 8),
    topology.uneven((3, 1)),
    topology.uneven((1, 5, 2)),
]


@pytest.mark.parametrize("machine", TOPOLOGIES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "gathered"])
def test_closed_forms_equal_the_counts(machine, dispatch):
    """ways.py and contacts.py (what the search uses) against cost.py and seconds.py."""
    trace = holey_trace(11, experts=16)
    device_LE = baselines.random(3, 16, machine.num_devices, 5)
    placement = Placement.from_device_LE(device_LE, machine.num_devices)
    rows = cost.rows(
        trace.expert_ids_TLK, placement, dispatch, devices_per_node=machine.devices_per_node
    )
    timed = problem.Problem(trace, machine, "seconds", dispatch)
    by_counts = seconds_lib.seconds(
        rows,
        cost.computed_LM(trace.expert_ids_TLK, placement),
        machine,
        timed.work,
        dispatch,
        trace.num_tokens,
    )
    np.testing.assert_allclose(timed.values_L(device_LE), by_counts.total_L, rtol=1e-12)
    if dispatch != "gathered":
        counted = problem.Problem(trace, machine, "rows", dispatch)
        apart_MM = machine.node_M[:, None] != machine.node_M[None, :]
        slow = counted.tier_ratio if dispatch == "hierarchical" else 1.0
        weighted = (rows.total_LMM * np.where(apart_MM, slow, 1.0)).sum()
        expected = weighted / counted.token_layers
        assert counted.value(device_LE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_contacts_after_every_swap(seed):
    trace = holey_trace(seed, top_k=4)
    device_E = baselines.random(1, 8, 4, seed)[0]
    sets = contacts.sets_of(trace, 1)
    e_P, f_P = np.nonzero(device_E[:, None] != device_E[None, :])
    swapped_PM = sets.swapped_PM(device_E, 4, e_P, f_P)
    for e, f, touched_M in zip(e_P, f_P, swapped_PM, strict=True):
        after_E = device_E.copy()
        after_E[[e, f]] = after_E[[f, e]]
        np.testing.assert_array_equal(sets.touched_M(after_E, 4), touched_M)


@pytest.mark.parametrize("machine", TOPOLOGIES[:2], ids=lambda machine: machine.name)
def test_evidence_equals_the_counts(machine):
    trace = holey_trace(2)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 2), 4)
    found = evidence.judge(trace, placement, machine)
    tokens = (trace.expert_ids_TLK != 255).any(axis=2).sum()
    for dispatch in cost.DISPATCHES:
        rows = cost.rows(
            trace.expert_ids_TLK, placement, dispatch, devices_per_node=machine.devices_per_node
        )
        figure = found.rows[dispatch]
        assert figure.value == pytest.approx(rows.total_LMM.sum() / tokens, rel=1e-12)
        assert figure.low <= figure.value * (1 + 1e-12)
        assert figure.high >= figure.value * (1 - 1e-12)
        tokens_L = (trace.expert_ids_TLK != 255).any(axis=2).sum(axis=0)
        worst = max(rows.total_LMM.sum(axis=(1, 2)) / tokens_L)
        assert found.rows_worst[dispatch].value == pytest.approx(worst, rel=1e-12)
    device = np.append(placement.device_LE, np.full((3, 248), -1), axis=1)
    stays = moves = 0
    for token in trace.expert_ids_TLK:
        for layer in range(2):
            e, f = token[layer, 0], token[layer + 1, 0]
            moves += 255 not in (e, f)
            stays += 255 not in (e, f) and device[layer, e] == device[layer + 1, f]
    assert found.top1.value == pytest.approx(stays / moves)
    load_LM = cost.computed_LM(trace.expert_ids_TLK, placement)
    assert found.load_worst.value == pytest.approx((load_LM.max(1) / load_LM.mean(1)).max())


def test_the_worst_layer_of_distinct_devices_and_its_interval():
    """Counted token by token, and drawn sequence by sequence."""
    made = holey_trace(5)
    ids, lens = made.expert_ids_TLK.copy(), [4, 6, 9, 3, 8]
    ids[4:10, 1] = 255  # a sequence without an expert in a layer
    trace = Trace(ids, 8, np.array(lens))
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, 5), 4)
    distinct, tokens = np.zeros((5, 3)), np.zeros((5, 3))
    ends = np.cumsum(lens)
    for number, token in enumerate(ids.tolist()):
        sequence = int(np.searchsorted(ends, number, side="right"))
        for layer, chosen in enumerate(token):
            places = {int(placement.device_LE[layer, e]) for e in chosen if e != 255}
            distinct[sequence, layer] += len(places)
            tokens[sequence, layer] += bool(places)
    figure = evidence.judge(trace, placement, topology.flat(4)).distinct_devices_worst
    assert figure.value == pytest.approx(max(distinct.sum(axis=0) / tokens.sum(axis=0)))
    samples = []
    for weight in evidence.resamples(5, 0).astype(int):
        drawn = [sequence for sequence in range(5) for _ in range(weight[sequence])]
        samples.append(
            max(sum(distinct[drawn, n]) / max(sum(tokens[drawn, n]), 1) for n in (0, 1, 2))
        )
    low, high = np.percentile(samples, [2.5, 97.5])
    unbiased = 2 * (figure.value - np.mean(samples))  # a largest one is too large, twice
    assert unbiased < 0
    assert (figure.low, figure.high) == pytest.approx((low + unbiased, high))


def test_no_interval_reaches_what_cannot_be():
    """A sequence a device; in each of three layers another sequence has tokens on two devices."""
    ids = np.repeat(np.arange(0, 8, 2, dtype=np.uint8), 3)[:, None, None] + np.zeros((12, 3, 2))
    ids[:, :, 1] += 1
    ids[[0, 4, 8], [0, 1, 2], 1] = 7
    trace, machine = Trace(ids.astype(np.uint8), 8, np.full(4, 3)), topology.nodes_by_devices(2, 4)
    found = evidence.judge(trace, Placement.contiguous(3, 8, 4), machine)
    rows = [found.rows_worst[name] for name in ("exchange", "hierarchical")]
    for figure, least in zip(
        [found.load_mean, found.load_worst, found.distinct_devices_worst, *rows],
        [1.0, 1.0, 1.0, 2 * 3 / 4, 2 * (2 / 4 + 2 / 4)],
        strict=True,
    ):
        assert figure.value > figure.low == pytest.approx(least)


@pytest.mark.parametrize("dispatch", ["exchange", "hierarchical", "coherent", "shuffled"])
def test_the_worst_layer_with_copies(dispatch):
    trace, machine = holey_trace(6), TOPOLOGIES[1]
    placement = Placement(np.tile([0, 1, 4, 2, 3, 5, 4, 5, 0, 6, 7, 2], (3, 1)), 8, 4)
    rows = cost.rows(
        trace.expert_ids_TLK, placement, dispatch, devices_per_node=machine.devices_per_node
    )
    tokens_L = (trace.expert_ids_TLK != 255).any(axis=2).sum(axis=0)
    found = evidence.judge(trace, placement, machine).rows_worst[dispatch].value
    assert found == pytest.approx(max(rows.total_LMM.sum(axis=(1, 2)) / tokens_L), rel=1e-12)


def test_seconds_by_hand():
    """Two nodes of one device; 1 GB/s between them; every number checked by hand."""
    tier = topology.Tier(bandwidth=1e9, latency=0.5)
    machine = topology.Topology("by hand", 2, 1, tier, tier, device_flops=1e9)
    work = seconds_lib.Work(d_model=500, d_ff=1, value_bytes=2, batch_tokens=20)
    rows = cost.Rows(np.array([[[0, 3], [1, 0]]]), np.array([[[0, 1], [3, 0]]]))
    found = seconds_lib.seconds(rows, np.array([[4, 6]]), machine, work, "exchange", 10)
    assert found.dispatch_L[0] == pytest.approx(0.5 + 2 * 3 * 1000 / 1e9)
    assert found.combine_L[0] == pytest.approx(0.5 + 2 * 3 * 1000 / 1e9)
    assert found.compute_L[0] == pytest.approx(2 * 6 * 3000 / 1e9)
    wide = synthetic.realistic(num_tokens=30, num_layers=2, num_experts=300, top_k=9, seed=0)
    assert len(contacts.sets_of(wide, 0).count_Q) == 30  # too wide for one whole number per set


@pytest.mark.parametrize("seed", range(5))
def test_intervals_of_maxima_hold_their_own_value(seed):
    """The largest of a resample is larger than that of the trace, and by as much too large."""
    trace = synthetic.realistic(
        num_tokens=400, num_layers=4, num_experts=16, top_k=2, seed=seed, num_sequences=8
    )
    even_LE = problem.Problem(trace, topology.flat(4), "load").balanced_LE
    found = evidence.judge(trace, Placement.from_device_LE(even_LE, 4), topology.flat(4))
    worst = [found.load_mean, found.load_worst, found.distinct_devices_worst]
    for figure in [*worst, *found.rows_worst.values()]:
        assert figure.low <= figure.value <= figure.high
    assert found.load_mean.low < found.load_mean.value


def test_presets_are_part_of_the_package(tmp_path, monkeypatch):
    """Where there is no checkout around it, and in whatever folder; one's own go first."""
    root = pathlib.Path(topology.__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    [(package, [pattern])] = project["tool"]["setuptools"]["package-data"].items()
    packaged = {path.stem for path in (root / package.replace(".", "/")).glob(pattern)}
    assert {"v5e8", "h100x16", "box2x4"} <= packaged
    monkeypatch.chdir(tmp_path)
    assert all(topology.preset(name).num_devices for name in packaged)
    own = tmp_path / "configs" / "topology"
    own.mkdir(parents=True)
    (own / "v5e8.json").write_text(json.dumps(topology.flat(3).to_json()))
    assert topology.preset("v5e8").num_devices == 3


def test_topology_presets():
    assert topology.preset("h100x16").num_devices == 16
    assert topology.from_json(topology.preset("box2x4").to_json()) == topology.preset("box2x4")
    with pytest.raises(Refused, match="h100x8"):
        topology.preset("h100x9")
    with pytest.raises(Refused, match="Use 2"):
        topology.nodes_by_devices(3, 8)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {},
        {"name": "x", "num_nodes": 1},
        {"name": "x", "num_nodes": 0, "devices_per_node": 2},
        {"name": "x", "num_nodes": 1, "devices_per_node": 2, "colour": 3},
        {"name": "x", "num_nodes": 1, "devices_per_node": 2, "fast": {"bandwidth": 1}},
        {"name": "x", "num_nodes": 1, "devices_per_node": 2, "device_flops": float("nan")},
    ],
)
def test_bad_topologies_are_refused(fields):
    with pytest.raises(Refused):
        topology.from_json(fields)
