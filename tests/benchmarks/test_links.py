"""Namespaces and links: made, limited, and gone afterwards, however the process ends."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.box import links
from moe_jax.config import DISPATCHES
from moe_jax.errors import Refused

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What starts tests in the background may have SIGINT ignored, and children inherit that.
HOLD = """
import signal, subprocess, sys, time
from benchmarks.box import links
signal.signal(signal.SIGINT, signal.default_int_handler)
with links.Network(2) as network:
    inside = subprocess.Popen(network.hosts[0].command("sleep", "1000"))
    print(*(host.namespace for host in network.hosts), flush=True)
    {then}
"""


@functools.cache
def _why_not() -> str:
    probe = f"moejax-{os.getpid()}-probe"  # of this process: others look at the same time
    try:
        links.check_machine()
        subprocess.run(["ip", "netns", "add", probe], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "del", probe], check=True, capture_output=True)
    except (Refused, subprocess.CalledProcessError) as error:
        return str(error)
    return ""


needs_root = pytest.mark.skipif(bool(_why_not()), reason=f"no namespaces here: {_why_not()}")


def hold(then: str) -> tuple[subprocess.Popen, list[str]]:
    """A process with a box, and the names of its hosts' namespaces."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return process, process.stdout.readline().split()


def left(names: list[str], seconds: float = 10.0) -> list[str]:
    """Those of `names` that are still there after some time at most."""
    end = time.monotonic() + seconds
    while (still := sorted(set(names) & set(links.namespaces()))) and time.monotonic() < end:
        time.sleep(0.05)
    return still


def running(namespace: str, seconds: float = 30.0) -> list[str]:
    """Numbers of the processes in this namespace; waits for one, which enters after it started."""
    end = time.monotonic() + seconds
    while True:
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        if listed.stdout.split() or time.monotonic() > end:
            return listed.stdout.split()
        time.sleep(0.05)


@needs_root
@pytest.mark.parametrize("how", ["return", "exception", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left(how):
    then = {"return": "pass", "exception": "1 / 0"}.get(how, "time.sleep(1000)")
    process, names = hold(then)
    try:
        assert len(names) == 2
        if how.startswith("SIG"):
            assert set(names) <= set(links.namespaces())
            assert running(names[0])
            process.send_signal(getattr(signal, how))
        process.wait(timeout=30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert left(names) == []
    assert not any((links.NETNS_FILES / name).exists() for name in names)


@needs_root
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept():
    process, names = hold("time.sleep(1000)")
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = f"{links.PREFIX}-{ended.pid}-h0"
    subprocess.run(["ip", "netns", "add", dead], check=True)
    try:
        removed = links.remove_leftovers()  # and of tests beside this one
        assert dead in removed
        assert not set(names) & set(removed)
        assert set(names) <= set(links.namespaces())
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    assert left([*names, dead]) == []


@needs_root
def test_hosts_reach_each_other_by_name_at_the_limited_rate():
    with links.Network(2) as network:
        network.limit(100)
        first, second = network.hosts
        said = subprocess.run(
            first.command("sh", "-c", "hostname; getent hosts h1; cat /sys/class/net/eth0/mtu"),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert said == ["h0", second.address, "h1", links.MTU]
        for namespace, device in network._ends():
            shown = links._run("tc", "-n", namespace, "qdisc", "show", "dev", device)
            assert "tbf" in shown
            assert "100Mbit" in shown
        network.unlimit()


@needs_root
def test_one_end_or_one_link_is_limited_and_all_others_stay():
    with links.Network(3) as network:

        def rates():
            shown = {}
            for namespace, device in network._ends():
                of = ("tc", "-n", namespace)
                text = links._run(*of, "qdisc", "show", "dev", device)
                text += links._run(*of, "class", "show", "dev", device)
                text += links._run(*of, "filter", "show", "dev", device)
                shown[namespace.split("-")[-1], device] = text
            return shown

        network.limit(100)
        before = rates()
        for limit, end, words in (
            (lambda: network.limit_sending(1, 30), ("h1", "eth0"), ["tbf", "30Mbit"]),
            (lambda: network.limit_receiving(2, 20), ("switch", "h2"), ["tbf", "20Mbit"]),
            (
                lambda: network.limit_link(0, 2, 10, 100),
                ("h0", "eth0"),
                ["htb", "10Mbit", "100Mbit", "0a4d0003/ffffffff"],  # 10.77.0.3
            ),
        ):
            limit()
            now = rates()
            assert all(word in now[end] for word in words), now[end]
            assert {e: t for e, t in now.items() if e != end} == {
                e: t for e, t in before.items() if e != end
            }
            network.limit(100)
            assert "100Mbit" in rates()[end]
            assert "htb" not in rates()[end]


def test_refused_without_root_or_programs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/sbin/{name}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match=r"user id 1000.*need root"):
        links.check_machine()
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else "/usr/sbin/ip")
    with pytest.raises(Refused, match=r"'tc'.*not on the PATH"):
        links.check_machine()


@needs_root
@pytest.mark.slow
def test_every_dispatch_and_combine_runs_between_hosts(tmp_path):
    """The whole benchmark on a model of toy size; rows are those predicted."""
    run = tmp_path / "run"
    here = {"cwd": ROOT, "check": True, "capture_output": True, "text": True}
    config = ("--config=configs/cluster.py:smoke", f"--workdir={run}")
    subprocess.run([sys.executable, "train.py", *config], **here)
    sizes = [f"--{name}=8" for name in ("prefill-sequences", "decode-sequences", "decode-start")]
    sizes += ["--prefill-tokens=16", "--decode-steps=1", "--rounds=1", "--plan-seconds=1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/cluster.py", f"--model={run}", *sizes, "--json"], **here
    )
    (cells,) = json.loads(done.stdout)["cells"].values()
    assert {way.partition(":")[0] for way in cells} == set(DISPATCHES) - {"local"}
    for way, plans in cells.items():
        for plan, phases in plans.items():
            prefill = phases["prefill"]
            if prefill["predicted"] is not None and not way.endswith(":partial"):
                assert prefill["rows"] == prefill["predicted"], (way, plan)
            assert all(seconds > 0 for (seconds, _) in prefill["seconds"])
