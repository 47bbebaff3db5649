"""Tiers, pairs, slowest device and link as `evaluate` prints them, against the oracle of rows."""

import json
import re

import numpy as np
import pytest

from moe_jax.placement import __main__ as command_line
from moe_jax.placement import baselines, cost, topology, wires
from moe_jax.placement.plan import Placement, Plan
from moe_jax.placement.problem import Problem
from moe_jax.placement.seconds import Work
from moe_jax.routing import synthetic
from moe_jax.routing import trace as trace_lib
from tests.placement.test_cost import holey_trace, oracle

LAYERS = (3, 4, 7)


def run(*words) -> int:
    return command_line.main([str(word) for word in words])


def made(seed: int, folder):
    """A trace and a plan on 2 x 2 devices, as files."""
    holey = holey_trace(seed)
    trace = trace_lib.Trace(holey.expert_ids_TLK, 8, holey.seq_len, layer_ids=LAYERS)
    placement = Placement.from_device_LE(baselines.random(3, 8, 4, seed), 4)
    trace_lib.save(trace, folder / "t.npz")
    Plan(placement, LAYERS, topology.nodes_by_devices(2, 4).to_json()).write(folder / "p.json")
    return trace, placement


def counted(trace, placement, dispatch):
    """Out and back [L, M, M] by hand, the mean over homes."""
    tokens = trace.num_tokens
    each = [oracle(trace, placement, dispatch, [home] * tokens, "partial", 2) for home in range(4)]
    return [np.mean(way, axis=0) for way in zip(*each, strict=True)]


@pytest.mark.parametrize("dispatch", cost.DISPATCHES)
@pytest.mark.parametrize("seed", range(3))
def test_tiers_pairs_and_the_slowest(dispatch, seed, tmp_path, capsys):
    trace, placement = made(seed, tmp_path)
    words = ("evaluate", tmp_path / "t.npz", tmp_path / "p.json", f"--pairs={dispatch}")
    assert run(*words, "--json") == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    found, machine, work = plan["wires"][dispatch], topology.nodes_by_devices(2, 4), Work()
    ways = counted(trace, placement, dispatch)
    token_layers = sum((ids_K != 255).any() for ids_LK in trace.expert_ids_TLK for ids_K in ids_LK)
    step = work.batch_tokens / 30 * work.row_bytes
    pair_MM, rows = np.zeros((4, 4)), {"inside": 0.0, "between": 0.0}
    link = {}  # (layer, way, tier, device) -> seconds
    for way, rows_LMM in zip(("out", "back"), ways, strict=True):
        for layer, rows_MM in zip(LAYERS, rows_LMM, strict=True):
            for tier, mine in (("inside", machine.fast), ("between", machine.slow)):
                for m in range(4):
                    others = [o for o in range(4) if (o // 2 == m // 2) == (tier == "inside")]
                    sent = sum(rows_MM[m, o] for o in others)
                    received = sum(rows_MM[o, m] for o in others)
                    rows[tier] += sent / token_layers
                    busy = max(sent, received) * step
                    link[layer, way, tier, m] = busy / mine.bandwidth + mine.latency * (busy > 0)
            pair_MM += rows_MM / token_layers
    assert found["rows"] == pytest.approx(rows, rel=1e-9)
    total = {tier: value * token_layers / 3 * step for tier, value in rows.items()}
    assert found["bytes"] == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(found["pairs"], pair_MM, atol=1e-12)
    others = [name for name in cost.DISPATCHES if name != dispatch]
    assert all("pairs" not in plan["wires"][name] for name in others)
    check_slowest(found["slowest_link"], link, ("layer", "way", "tier", "device"))
    compute = {(layer, m): 0.0 for layer in LAYERS for m in range(4)}
    for ids_LK in trace.expert_ids_TLK.tolist():
        for at, layer in enumerate(LAYERS):
            for expert in ids_LK[at]:
                if expert != 255:
                    device = int(placement.device_LE[at, expert])
                    compute[layer, device] += work.batch_tokens / 30 * work.row_flops / 4e14
    check_slowest(found["slowest_device"], compute, ("layer", "device"))
    assert run(*words) == 0
    check_text(capsys.readouterr().out, dispatch, found, pair_MM)


def check_slowest(said: dict, seconds: dict, keys: tuple[str, ...]) -> None:
    worst = max(seconds.values())
    assert said["worst"] == pytest.approx(worst, rel=1e-9)
    assert seconds[tuple(said[key] for key in keys)] == pytest.approx(worst, rel=1e-9)
    each = [max(s for key, s in seconds.items() if key[0] == layer) for layer in LAYERS]
    assert said["mean"] == pytest.approx(np.mean(each), rel=1e-9)


def check_text(text: str, dispatch: str, found: dict, pair_MM: np.ndarray) -> None:
    """The same figures in the three tables."""
    lines = [line.split() for line in text.splitlines()]
    tiers, slowest = [line for line in lines if line[:2] == ["p.json", dispatch]][:2]
    device, link = found["slowest_device"], found["slowest_link"]
    for cell, value in zip(
        tiers[2:],
        [v for tier in ("inside", "between") for v in
         (f"{found['rows'][tier]:.4f}", f"{1e-6 * found['bytes'][tier]:.1f}")],
        strict=True,
    ):  # fmt: skip
        assert cell == value
    assert " ".join(slowest[2:]) == (
        f"{1e6 * device['mean']:.1f} {1e6 * device['worst']:.1f} {device['device']} in layer "
        f"{device['layer']} {1e6 * link['mean']:.1f} {1e6 * link['worst']:.1f} {link['device']} "
        f"in layer {link['layer']}, {link['way']}, {link['tier']} nodes"
    )
    (head,) = [at for at, line in enumerate(lines) if line[:3] == ["from", "\\", "to"]]
    for m, cells in enumerate(lines[head + 1 : head + 5]):
        wanted = ["-" if m == d else f"{1000 * rows:.1f}" for d, rows in enumerate(pair_MM[m])]
        assert cells == [str(m), *wanted]


@pytest.mark.parametrize("dispatch", ["exchange", "coherent", "shuffled"])
def test_plans_with_copies_are_counted_like_any_other(dispatch):
    trace, machine = holey_trace(4), topology.nodes_by_devices(2, 4)
    slots_LP = np.tile([0, 1, 4, 2, 3, 5, 4, 5, 0, 6, 7, 2], (3, 1))
    placement = Placement(slots_LP, 8, 4)
    problem = Problem(trace, machine, "seconds", dispatch)
    one = wires.of(problem, placement)
    assert one.layer_seconds == pytest.approx(problem.value_of(placement), rel=1e-12)
    load_LM = problem.computed_LM(placement)
    assert one.compute_LM.argmax() == load_LM.argmax()
    weighted = Problem(trace, machine, "rows", dispatch).value_of(placement)
    assert sum(one.tier_rows.values()) == pytest.approx(weighted, rel=1e-12)


def test_of_many_devices_the_heaviest_pairs_are_printed():
    trace = synthetic.realistic(num_tokens=60, num_layers=2, num_experts=36, top_k=4, seed=0)
    machine = topology.nodes_by_devices(2, 18)
    problem = Problem(trace, machine, "seconds", "hierarchical")
    one = wires.of(problem, Placement.contiguous(2, 36, 18))
    rows = [line.split() for line in wires.pair_text(one).splitlines()[1:]]
    assert len(rows) == wires.HEAVIEST
    everything = sorted((1000 * one.pair_MM).ravel(), reverse=True)
    for (source, destination, tier, value), wanted in zip(rows, everything, strict=False):
        s, d = int(source), int(destination)
        assert tier == ("inside" if s // 9 == d // 9 else "between")
        assert value == f"{1000 * one.pair_MM[s, d]:.1f}" == f"{wanted:.1f}"
    assert len({(row[0], row[1]) for row in rows}) == wires.HEAVIEST


def test_one_node_has_one_tier(tmp_path, capsys):
    made(0, tmp_path)
    assert run("evaluate", tmp_path / "t.npz", tmp_path / "p.json", "--devices=4") == 0
    text = capsys.readouterr().out
    assert re.search(r"dispatch +inside nodes +MB\n", text)
    assert "between" not in text
