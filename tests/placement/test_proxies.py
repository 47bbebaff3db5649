"""Pairwise proxies: against loops, and exact where they claim to be."""

import json

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import cost, evidence, proxies, topology
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.proxies import Pairs
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from moe_jax.routing.trace import Trace

MACHINES = {"flat": topology.flat(4), "nodes": topology.nodes_by_devices(2, 4)}


def made(top_k: int, seed: int, gaps: bool = False) -> Trace:
    trace = synthetic.realistic(
        num_tokens=80, num_layers=3, num_experts=8, top_k=top_k, seed=seed, num_sequences=4
    )
    if not gaps:
        return trace
    ids = trace.expert_ids_TLK.copy()
    rng = np.random.default_rng(seed)
    ids[rng.random(ids.shape) < 0.2] = 255
    ids[::7, 1] = 255  # tokens without any expert in the layer
    ids = np.sort(ids, axis=2)  # "no expert" last, as recorders write it
    return Trace(ids, 8, trace.seq_len)


def placed(seed: int) -> Placement:
    rng = np.random.default_rng(seed)
    return Placement.from_device_LE(rng.permuted(np.tile(np.arange(8) % 4, (3, 1)), axis=1), 4)


def by_loops(trace: Trace, placement: Placement, machine) -> dict[tuple[str, str], float]:
    """What the head of proxies.py says, token by token and pair by pair."""
    devices, nodes = machine.num_devices, machine.num_nodes
    each = devices // nodes
    names = ["exchange", "slow", "fast", "coherent", "best", "shuffled", "waits"]
    total = dict.fromkeys(names, 0.0)
    token_layers = 0
    for ids_LK in trace.expert_ids_TLK.tolist():
        before, at = None, None
        for layer, ids_K in enumerate(ids_LK):
            on = [int(placement.device_LE[layer, e]) for e in ids_K if e != 255]
            pairs = [(on[i], on[j]) for i in range(len(on)) for j in range(i)]
            same = sum(d == e for d, e in pairs)
            same_node = sum(d // each == e // each for d, e in pairs)
            token_layers += bool(on)
            total["exchange"] += (len(on) - same) * 2 * (devices - 1) / devices
            total["fast"] += (len(on) - same) * 2 * (each - 1) / each
            total["slow"] += (len(on) - same_node) * 2 * (nodes - 1) / nodes
            total["coherent"] += 2 * (len(on) - same) - bool(on)
            total["shuffled"] += 2 * (len(on) - same)
            away = len(set(on) - {at}) if at is not None else len(set(on)) * (1 - 1 / devices)
            total["waits"] += 2 * away
            if layer == 0:
                total["coherent"] -= (len(on) - same) / devices
                total["shuffled"] -= 2 * (len(on) - same) / devices
                total["best"] += bool(on) * (devices - 1) / devices
            elif before is not None and on:
                total["coherent"] -= sum(d == before for d in on)
                total["shuffled"] -= 2 * sum(d == before for d in on)
                total["best"] += on[0] != before
            before, at = (on[0] if on else None), (on[0] if on else at)
    share = {name: value / token_layers for name, value in total.items()}
    return {
        ("exchange", "co-activation"): share["exchange"],
        ("hierarchical", "co-activation, by tier"): share["slow"] + share["fast"],
        ("coherent", "co-activation and transitions"): share["coherent"],
        ("coherent", "transitions of the best expert"): share["best"],
        ("shuffled", "co-activation and transitions"): share["shuffled"],
        ("shuffled", "the best expert's device"): share["waits"],
        ("gathered", "the same under every placement"): 2.0 * (devices - 1),
    }


def found(trace: Trace, placement: Placement, machine) -> tuple[proxies.Proxy, ...]:
    figures = evidence.judge(trace, placement, machine)
    true = {name: figure.value for name, figure in figures.rows.items()}
    return proxies.of(Pairs.of(trace), placement, machine, true)


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("machine", MACHINES)
def test_proxies_equal_loops(machine, top_k, gaps):
    for seed in range(3):
        trace, placement = made(top_k, seed, gaps), placed(seed)
        wanted = by_loops(trace, placement, MACHINES[machine])
        got = found(trace, placement, MACHINES[machine])
        assert {(p.dispatch, p.pairs): p.value for p in got} == pytest.approx(wanted)


@pytest.mark.parametrize("machine", MACHINES)
def test_truth_is_what_cost_counts(machine):
    trace, placement = made(4, 0), placed(0)
    for proxy in found(trace, placement, MACHINES[machine]):
        each = MACHINES[machine].devices_per_node
        rows = cost.rows(
            trace.expert_ids_TLK, placement, proxy.dispatch, devices_per_node=each
        ).total_LMM.sum()
        assert proxy.true == pytest.approx(rows / (80 * 3))
        assert proxy.error == pytest.approx(proxy.value / proxy.true - 1)


@pytest.mark.parametrize("machine", MACHINES)
def test_exact_where_they_claim_to_be(machine):
    """Two experts per token: return-home dispatches. One: all but shuffled, whose homes fill up."""
    for seed in range(3):
        proxies_of_one = found(made(1, seed), placed(seed), MACHINES[machine])
        pairs, device = [proxy for proxy in proxies_of_one if proxy.dispatch == "shuffled"]
        assert pairs.value == pytest.approx(device.value)
        for proxy in set(proxies_of_one) - {pairs, device}:
            assert proxy.value == pytest.approx(proxy.true)
        for proxy in found(made(2, seed), placed(seed), topology.flat(4)):
            if proxy.dispatch in ("exchange", "hierarchical", "gathered"):
                assert proxy.error == pytest.approx(0)


def test_more_experts_on_a_device_make_co_activation_say_too_little():
    errors = []
    for top_k in (2, 3, 4):
        placement = Placement.contiguous(3, 8, 2)
        by_name = {p.pairs: p for p in found(made(top_k, 0), placement, topology.flat(2))}
        errors.append(by_name["co-activation"].error)
    assert errors[0] == pytest.approx(0)
    assert 0 > errors[1] > errors[2]


def test_evaluate_prints_them_and_says_where_there_are_none(tmp_path, capsys):
    trace_lib.save(made(4, 0), tmp_path / "t.npz")
    Plan(placed(0)).write(tmp_path / "p.json")
    slots_LP = np.tile([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3], (3, 1))
    Plan(Placement(slots_LP, 8, 4)).write(tmp_path / "copies.json")
    words = ["evaluate", str(tmp_path / "t.npz"), str(tmp_path / "p.json")]
    words.append(str(tmp_path / "copies.json"))
    assert command_line.main(words) == 0
    text = capsys.readouterr().out
    assert "as pairs of experts tell them" in text
    assert "copies.json: none; pairs do not say which copy serves" in text
    assert command_line.main([*words, "--json"]) == 0
    mine, copies = json.loads(capsys.readouterr().out)["plans"]
    assert copies["proxies"] == []
    wanted = by_loops(made(4, 0), placed(0), topology.flat(4))
    for proxy in mine["proxies"]:
        assert proxy["value"] == pytest.approx(wanted[proxy["dispatch"], proxy["pairs"]])
        assert proxy["true"] == pytest.approx(mine["figures"]["rows"][proxy["dispatch"]]["value"])
        assert f"{proxy['value']:.4f}" in text
