"""The parts of the cluster in a box that need no root: ways, plans, statistics, flags."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cluster, stragglers
from benchmarks.box import counters, plans, statistics, subject, ways, worker
from benchmarks.box.plans import Box
from moe_jax import checkpoint
from moe_jax import config as config_lib
from moe_jax.errors import Refused
from moe_jax.infer import text as text_lib
from moe_jax.placement.plan import Placement, Plan
from moe_jax.routing.synthetic import realistic
from moe_jax.routing.trace import Trace
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def command(*flags, **environment):
    return subprocess.run(
        [sys.executable, "benchmarks/cluster.py", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_ways_are_what_the_config_module_lists():
    found = ways.chosen([], tiny.config(mesh={"node": 2, "expert": 2}))
    assert {way.partition(":")[0] for way in found} <= set(config_lib.DISPATCHES) - {"local"}
    assert {"exchange:exact", "exchange:partial"} <= set(found)
    model = ways.applied(tiny.config().model, "exchange:partial")
    assert (model.dispatch, model.combine) == ("exchange", "partial")


def test_ways_that_cannot_be_measured_are_refused():
    for word in ("local", "exchagne", "exchange:exakt"):
        with pytest.raises(Refused):
            ways.chosen([word], tiny.config(mesh={"expert": 1}))


def test_a_box_that_no_way_suits_is_refused():
    config = dataclasses.replace(tiny.config(), mesh=config_lib.MeshConfig(node=3, expert=1))
    with pytest.raises(Refused, match="num_experts"):
        ways.chosen([], config)


def test_batches_of_training_do_not_matter(tmp_path, monkeypatch):
    """16 devices, and a run whose batches have 8 sequences."""
    config = tiny.config(model__num_experts=16)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    contents = checkpoint.Contents(0, {}, Plan(Placement.contiguous(2, 16, 16)), {})
    monkeypatch.setattr(checkpoint, "newest_good", lambda *_, **__: (tmp_path, contents))
    spread, _ = worker.spread(str(tmp_path), 2, 8)
    assert "exchange:partial" in ways.chosen([], spread)


@pytest.mark.parametrize("flag", ["--hosts=1", "--mbit=0", "--times=nan", "--quiet=0"])
def test_what_cannot_be_slowed_is_refused(flag):
    ended = subprocess.run(
        [sys.executable, "benchmarks/stragglers.py", flag], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"stragglers.py: {flag.partition('=')[0]} = ")


@pytest.mark.parametrize(
    ("words", "judged"),
    [
        ([], "NO"),
        (["host 1 sends slowly: 2.0 x"], "yes"),
        (["host 1 sends slowly: 2.0 x", "host 1 sends slowly: 3.1 x"], "yes"),
        (["the link from host 1 to 2: 2.0 x", "host 1 sends slowly: 2.0 x"], "at last"),
        (["host 1 sends slowly: 2.0 x", "nobody is slow any more"], "NO"),
        (["host 1 sends slowly: 2.0 x; host 0 computes slowly: 1.7 x"], "NO"),
    ],
)
def test_what_a_run_said_is_judged_by_all_of_it(words, judged):
    assert stragglers.Heard(words, 1, 1).judged("host 1 sends slowly") == judged


def test_rows_between_hosts():
    rows_MM = np.arange(16).reshape(4, 4)
    between = plans.between_hosts(rows_MM, Box(2, 2))
    assert between.tolist() == [[0, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 0]]


@pytest.mark.parametrize(("hosts", "devices"), [(2, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("combine", ["exact", "partial"])
def test_integers_between_hosts_are_those_of_a_ring(hosts, devices, combine):
    """Every device hands each block on to the next one, until all have it."""
    tokens, layers, top_k = 12, 3, 4  # 12 is a multiple of all numbers of devices
    ring = [(host, place) for host in range(hosts) for place in range(devices)]
    arrays = 1 if combine == "exact" else 2  # slots, weights
    block = tokens // (hosts * devices) * top_k * 4 * arrays * layers
    expected = 0
    for first in range(len(ring)):
        for step in range(len(ring) - 1):
            one, other = (ring[(first + step + n) % len(ring)] for n in range(2))
            expected += block * (one[0] != other[0])
    for dispatch in ("exchange", "hierarchical"):
        box = plans.Box(hosts, devices)
        found = plans.integer_bytes(f"{dispatch}:{combine}", box, tokens, layers, top_k)
        assert found == expected


def test_every_plan_is_a_placement_of_the_box():
    box, trace = Box(2, 2), realistic(num_tokens=400, num_layers=2, num_experts=8, top_k=2, seed=0)
    made = plans.baselines(trace, box)
    model = tiny.config().model
    made["ours"] = plans.ours(trace, box, model, "exchange", 400, 200.0, 1.0)
    assert set(made) == set(plans.NAMES)
    for placement in made.values():
        assert isinstance(placement, Placement)
        assert placement.device_LE.shape == (2, 8)
    home_T = np.zeros(trace.num_tokens, np.int32)
    rows = [
        plans.predicted_between_hosts(
            trace.expert_ids_TLK, home_T, made[name], box, "exchange", "partial"
        ).sum()
        for name in ("contiguous", "ours")
    ]
    assert rows[1] <= rows[0]


def test_seconds_of_the_box_are_those_of_a_link_that_a_host_has_to_all_others():
    """Experts 0 to 3 on hosts 0 to 3; homes are uniform, so a quarter of 8 tokens is on each."""
    ids = np.array([[[0, 1]]] * 4 + [[[0, 2]]] * 4, np.uint8)
    trace, plan = Trace(ids, 4, np.array([8])), Placement.contiguous(1, 4, 4)
    model = tiny.config().model
    mbit = 8e-6 * plans.row_bytes(model)  # a row a second
    seconds = plans.box_seconds(trace, plan, Box(4, 1), model, "exchange", mbit)
    assert seconds == pytest.approx(3 * 2 + 3 * 2, rel=1e-3)  # to host 0, and back from it


@pytest.mark.parametrize(("hosts", "devices"), [(2, 2), (2, 3), (3, 2), (2, 5)])
def test_all_that_calibrates_a_link_leaves_its_host(hosts, devices):
    pairs = worker.to_the_next_host(hosts, devices)
    assert all(source // devices != to // devices for source, to in pairs)
    assert sorted(to for _, to in pairs) == [source for source, _ in pairs]
    assert not {(to, source) for source, to in pairs} & set(pairs)


def test_speed_ups_are_paired_by_round():
    ours, base = [1.0, 2.0, 4.0], [1.2, 2.4, 4.8]  # rounds differ, the ratio does not
    found = statistics.speed_up(ours, base)
    np.testing.assert_allclose([found.value, found.low, found.high], 1.2)
    alone = statistics.mean([3.0])
    assert (alone.low, alone.high) == pytest.approx((3.0, 3.0))
    wide = statistics.mean([1.0, 4.0])
    assert wide.value == pytest.approx(2.0)
    assert wide.low < 1 < 4 < wide.high


def test_counters_count_what_loopback_carries():
    before = counters.read("lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(bytes(10_000), ("127.0.0.1", 9))
    moved = counters.read("lo") - before
    assert min(dataclasses.astuple(moved)) >= 10_000


def test_the_command_says_in_one_line_what_it_needs(tmp_path):
    done = command(PATH=str(tmp_path))
    assert done.returncode == 1
    assert "not on the PATH" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("flag", ["--prefill-sequences", "--decode-sequences"])
def test_sequences_are_shared_by_all_devices(flag):
    words = ["--hosts=2", "--devices-per-host=3", "--prefill-sequences=36", f"{flag}=32"]
    flags = cluster.parser().parse_args(words)
    with pytest.raises(Refused, match=rf"{flag} = 32: must be a multiple of the 6 .*use 36"):
        cluster.request_of(flags)


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("--plan-seconds=-1", "--plan-seconds = -1.0: seconds, at least 0"),
        ("--plan-seconds=nan", "--plan-seconds = nan: seconds, at least 0"),
        ("--dispatch=exchagne", "exchagne"),
        ("--dispatch=exchange:exakt", "exakt"),
        ("--prefill-tokens=129", "prompt tokens = 129: held-out windows"),
        ("--decode-steps=105", "prompt tokens = 129: held-out windows"),
        ("--hosts=255", "--hosts = 255: .* has 254 addresses"),
        ("--devices-per-host=17", "num_experts = 32: must be divisible"),
    ],
)
def test_flags_are_refused_before_a_model_is_trained(word, rule, monkeypatch):
    monkeypatch.setattr(subject, "trained", lambda run: pytest.fail("trained"))
    sequences = ["--prefill-sequences=16320", "--decode-sequences=16320"]  # of 2 to 255 hosts
    with pytest.raises(Refused, match=rule):
        cluster.request_of(cluster.parser().parse_args([*sequences, word]))


def test_prompts_are_tokens_of_the_run(tmp_path, monkeypatch):
    class Text:
        @staticmethod
        def corpus(text):
            return np.repeat(text.astype(np.int32) + 1000, 2)

    config = tiny.config()
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    monkeypatch.setattr(text_lib, "of_run", lambda root, config: Text)
    sizes = subject.Sizes(4, 8, 4, 4, 1)
    subject.write_inputs(str(tmp_path), sizes, tmp_path / "inputs.npz")
    prefill_BS = np.load(tmp_path / "inputs.npz")["prefill_BS"]
    assert prefill_BS.min() >= 1000
    np.testing.assert_array_equal(prefill_BS[:, ::2], prefill_BS[:, 1::2])


def test_help_names_every_flag():
    done = command("--help")
    assert done.returncode == 0
    for flag in ("--hosts", "--devices-per-host", "--mbit", "--model", "--dispatch", "--rounds"):
        assert flag in done.stdout
