"""Slow hosts, receivers, senders and links are told apart; normal steps raise no alarm."""

import itertools

import jax
import numpy as np
import pytest

from moe_jax import mesh as mesh_lib
from moe_jax.train import stragglers
from moe_jax.train.stragglers import COMPUTES, LINK, RECEIVES, SENDS, Judge
from tests import tiny


class Cluster:
    """Times as hosts would see them, with noise and hiccups; some things are slow."""

    def __init__(self, num_hosts, seed, computes=(), receives=(), sends=(), links=(), times=2.5):
        self.num_hosts, self.rng = num_hosts, np.random.default_rng(seed)
        self.compute_P = np.full(num_hosts, 1e-3)
        self.compute_P[list(computes)] *= times
        distance_PP = (np.arange(num_hosts) - np.arange(num_hosts)[:, None]) % num_hosts
        self.link_PP = 1e-3 * (1 + 0.5 * distance_PP)  # as far as a ring is
        self.link_PP[:, list(receives)] *= times
        self.link_PP[list(sends)] *= times
        for source, destination in links:
            self.link_PP[source, destination] *= times

    def _noisy(self, seconds):
        shape = np.shape(seconds)
        noise = self.rng.lognormal(0, 0.12, shape)
        return seconds * noise * np.where(self.rng.random(shape) < 0.02, 5.0, 1.0)

    def probe(self):
        link_PP = self._noisy(self.link_PP)
        time_RP = []
        for pairs in stragglers.rounds(self.num_hosts):
            time_P = np.full(self.num_hosts, 1e-5)
            for source, destination in pairs:
                for end in (source, destination):
                    time_P[end] = max(time_P[end], link_PP[source, destination])
            time_RP.append(time_P)
        return self._noisy(self.compute_P), np.array(time_RP)


def found(cluster, probes=12):
    judge = Judge(cluster.num_hosts)
    for _ in range(probes):
        last = judge.add(*cluster.probe())
    return {(finding.kind, *finding.hosts) for finding in last}


@pytest.mark.parametrize("num_hosts", range(2, 10))
def test_every_link_is_in_one_round(num_hosts):
    pairs = [pair for one in stragglers.rounds(num_hosts) for pair in one]
    assert sorted(pairs) == list(itertools.permutations(range(num_hosts), 2))
    for one in stragglers.rounds(num_hosts):  # nobody sends or receives twice
        for end in zip(*one, strict=True):
            assert len(set(end)) == len(end)
        ends = {(min(pair), max(pair)) for pair in one}
        assert len(ends) == len(one)  # and no two messages have both ends in common


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 8, 16])
def test_they_are_told_apart(num_hosts):
    for seed in range(20):
        slow = seed % num_hosts
        other = (slow + 1 + seed % (num_hosts - 1)) % num_hosts
        assert found(Cluster(num_hosts, seed, computes=[slow])) == {(COMPUTES, slow)}
        assert found(Cluster(num_hosts, seed, links=[(slow, other)])) == {(LINK, slow, other)}
        if num_hosts > 3:
            assert found(Cluster(num_hosts, seed, receives=[slow])) == {(RECEIVES, slow)}
            assert found(Cluster(num_hosts, seed, sends=[slow])) == {(SENDS, slow)}


def test_several_at_once():
    cluster = Cluster(8, 0, computes=[5], receives=[2], links=[(6, 7)])
    assert found(cluster) == {(COMPUTES, 5), (RECEIVES, 2), (LINK, 6, 7)}


@pytest.mark.parametrize(("num_hosts", "steps"), [(2, 4000), (4, 3000), (16, 3000)])
def test_normal_steps_raise_no_alarm(num_hosts, steps):
    """10,000 of them, with hiccups of 5 x in one time of fifty; at most one in a hundred alarms."""
    cluster, judge = Cluster(num_hosts, 1), Judge(num_hosts)
    alarms = sum(bool(judge.add(*cluster.probe())) for _ in range(steps))
    assert alarms <= 0.01 * steps


def test_it_is_said_soon_and_no_more_when_it_is_over():
    judge, normal = Judge(4), Cluster(4, 0)
    slow = Cluster(4, 1, computes=[2])
    for _ in range(10):
        assert not judge.add(*normal.probe())
    said = [bool(judge.add(*slow.probe())) for _ in range(5)]
    assert said[:2] == [False, False]  # a hiccup before may make it the third
    assert said[3:] == [True, True]
    said = [bool(judge.add(*normal.probe())) for _ in range(5)]
    assert said[-3:] == [False, False, False]


def test_a_change_is_said_once(capsys, monkeypatch):
    config = tiny.config(train__probe_every=2)
    watch = stragglers.Stragglers(config, tiny.mesh(config))
    slow, normal = Cluster(4, 0, receives=[1]), Cluster(4, 1)
    watch._judge, now = Judge(4), slow
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    watch._probe = lambda: now.probe()
    for step in range(30):
        now = slow if step < 16 else normal
        seconds = watch.look(step, jax.numpy.zeros(3))
        names = {f"host_{p}_{what}_seconds" for p in range(4) for what in ("matmul", "message")}
        assert seconds.keys() == (set() if step % 2 else names)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert "host 1 receives slowly" in said[0]
    assert "nobody is slow any more" in said[1]


def test_a_link_is_in_the_times_of_both_ends_and_of_nobody_else():
    """As real hosts have them, each of which is in one message of a round at most."""
    pairs, time_RP = (2, 0), np.full((6, 4), 1e-3)
    number = next(r for r, one in enumerate(stragglers.rounds(4)) if pairs in one)
    time_RP[number, [2, 0]] = 5e-3
    expected_PP = 1e-3 * (1 - np.eye(4))
    expected_PP[pairs] = 5e-3
    np.testing.assert_array_equal(stragglers.link_seconds(time_RP, 4), expected_PP)


def test_words():
    assert "host 3 receives slowly: 2.5 x" in str(stragglers.Finding(RECEIVES, (3,), 2.5))
    assert "link from host 1 to 2" in str(stragglers.Finding(LINK, (1, 2), 2.0))


def test_one_host_has_no_peers():
    probe = stragglers.Probe(mesh_lib.make(2, 4))
    compute_P, time_RP = probe()
    assert compute_P.shape == (1,)
    assert 0 < compute_P[0] < 10
    assert time_RP.shape == (0, 1)
    judge = Judge(1)
    assert all(not judge.add(compute_P, time_RP) for _ in range(stragglers.WINDOW))
