"""The uneven all-to-all against a loop over pairs, and what it pads."""

import functools
import re
import types
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.model.dispatch import wire as wire_lib
from moe_jax.model.dispatch.wire import LINKS, MEMORY, NEAR_DIGITS, Pairs, Wire, turns

WIDTH = 3


def run(count_RMM, chunk, most, near=1, digits=4, transport=LINKS):
    """Rows, numbered one by one, through `exchange`; count_RMM [replicas, source, destination].

    Returns (received [replicas, M, R, D], expected, padding [replicas, M, M]).
    """
    replicas, size, _ = count_RMM.shape
    num_sent = num_received = size * most
    sent = np.arange(1, replicas * size * num_sent * WIDTH + 1, dtype=np.float32)
    sent = sent.reshape(replicas, size, num_sent, WIDTH)
    expected = np.zeros((replicas, size, num_received, WIDTH), np.float32)
    for r in range(replicas):
        for receiver in range(size):
            at = 0
            for source in range(size):
                start = count_RMM[r, source, :receiver].sum()
                count = count_RMM[r, source, receiver]
                rows = sent[r, source, start : start + count]
                expected[r, receiver, at : at + count] = rows
                at += count
    go = program(replicas, size, chunk, num_received, near, digits, transport)
    received, padding = go(sent, count_RMM.astype(np.int32))
    return np.asarray(received), expected, np.asarray(padding)


@functools.cache
def program(replicas, size, chunk, num_received, near, digits, transport):
    spec, of_replica = PartitionSpec(mesh_lib.DATA, mesh_lib.EXPERT), PartitionSpec(mesh_lib.DATA)
    mesh = mesh_lib.make(replicas, size)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, of_replica), out_specs=spec)
    def go(sent_11ND, count_1MM):
        wire = Wire(mesh_lib.EXPERT, transport, chunk, digits, near)
        pairs = pairs_of(wire, count_1MM, 0, num_received // size)
        received_RD = wire.exchange(sent_11ND[0, 0], pairs, num_received)
        return received_RD[None, None], wire.padding_M(pairs)[None, None]

    return jax.jit(go)


def pairs_of(wire, count_PMM, place, most):
    """As one device knows them."""
    me, count_MM = jax.lax.axis_index(wire.axis), count_PMM[place]
    (most_MM,) = wire.agreed(lambda: count_PMM[None], 1)
    return Pairs(count_MM[me], count_MM[:, me], most_MM, most)


@pytest.mark.parametrize("how", ["blocks", "memory", "links"])
@pytest.mark.parametrize("digits", [0, 2, 5])
@pytest.mark.parametrize(
    ("replicas", "size", "chunk"), [(1, 1, 3), (4, 2, 1), (2, 4, 1), (2, 4, 16), (1, 8, 3)]
)
def test_every_row_arrives_where_it_should(replicas, size, chunk, how, digits):
    """Among devices of one of several processes, of the only one, of one each."""
    near, transport = 1 if how == "links" else size, MEMORY if how == "memory" else LINKS
    most = 21
    rng = np.random.default_rng(size * chunk)
    random = rng.integers(0, most + 1, (replicas, size, size))
    hot = np.zeros_like(random)
    hot[:, :, -1] = most  # all to one device
    for counts in (random, hot, np.zeros_like(random), np.full_like(random, most)):
        received, expected, padding = run(counts, chunk, most, near, digits, transport)
        np.testing.assert_array_equal(received, expected)
        assert (padding >= 0).all()
        assert (np.einsum("rii->ri", padding) == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8, 12, 16])
def test_turns_bring_every_pair_together_once_and_only_neighbours_trade_places(size):
    made = turns(size)
    pairs = [pair for turn in made for pair in enumerate(turn)]
    assert sorted(pairs) == [(i, j) for i in range(size) for j in range(size)]
    assert made[0] == tuple(range(size))
    for turn in made[1:]:
        assert sorted(turn) == list(range(size))
        for source, destination in enumerate(turn):
            if turn[destination] == source:
                assert {source, destination} == {source // 2 * 2, source // 2 * 2 + 1}


@pytest.mark.parametrize(("nodes", "devices"), [(2, 4), (4, 2), (2, 3)])
def test_rows_between_nodes_arrive_where_they_should(nodes, devices, monkeypatch):
    """Each place of the nodes is an exchange of its own, with counts of its own."""
    monkeypatch.setattr(wire_lib, "LARGE", 1 << 6)  # larger than some of the messages
    most, chunk = 21, 2
    rng = np.random.default_rng(nodes)
    counts = rng.integers(0, most + 1, (nodes, devices, nodes), np.int32)  # [from, place, to]
    counts[0, 0] = 0
    num = nodes * most
    sent = np.arange(1, nodes * devices * num * WIDTH + 1, dtype=np.float32)
    sent = sent.reshape(nodes, devices, num, WIDTH)
    spec = PartitionSpec(mesh_lib.NODE, mesh_lib.DEVICE)

    mesh = mesh_lib.make(1, devices, node=nodes)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    def go(sent_11ND, count_PMM):
        wire = Wire(mesh_lib.NODE, LINKS, chunk, 4, near=1, beside=(mesh_lib.DEVICE,))
        pairs = pairs_of(wire, count_PMM, jax.lax.axis_index(mesh_lib.DEVICE), most)
        received_RD = wire.exchange(sent_11ND[0, 0], pairs, num)
        return received_RD[None, None], wire.padding_M(pairs)[None, None]

    at_places = np.ascontiguousarray(counts.transpose(1, 0, 2))
    received, padding = go(sent, at_places)
    expected = np.zeros_like(sent)
    for place in range(devices):
        for to in range(nodes):
            starts = [counts[node, place, :to].sum() for node in range(nodes)]
            rows = np.concatenate(
                [
                    sent[node, place, start : start + counts[node, place, to]]
                    for node, start in enumerate(starts)
                ]
            )
            expected[to, place, : len(rows)] = rows
    np.testing.assert_array_equal(received, expected)
    padding = np.asarray(padding)
    for node in range(nodes):
        assert (padding[node, :, node] == 0).all()
    # A pair sends what the fullest of its nodes does, whatever the place.
    for node in range(nodes):
        for to in set(range(nodes)) - {node}:
            fullest = -(-counts[node, :, to].max() // chunk) * chunk
            np.testing.assert_array_equal(padding[node, :, to], fullest - counts[node, :, to])
    # No two devices send to each other in a permute of a large message.
    text = go.lower(sent, at_places).as_text()
    for size, pairs in permutes(text):
        both_ways = {pair[::-1] for pair in pairs} & pairs
        if devices % 2 == 0 and size * WIDTH * 4 >= wire_lib.LARGE:
            assert not both_ways
            if nodes == 2 and len(pairs) == devices:  # both send: as many pairs in each direction
                assert sum(source < devices for source, _ in pairs) == devices / 2
    assert any(size * WIDTH * 4 >= wire_lib.LARGE for size, _ in permutes(text))
    assert any(size * WIDTH * 4 < wire_lib.LARGE for size, _ in permutes(text))


def permutes(text: str) -> list[tuple[int, set[tuple[int, int]]]]:
    """(rows, pairs of devices) of every collective permute of a lowered program."""
    found = re.findall(
        r'"stablehlo.collective_permute".*?source_target_pairs = dense<(.*?)> : tensor<\d+x2xi64>'
        r".*?\(tensor<(\d+)x",
        text,
    )
    pairs = [(int(rows), re.findall(r"\[(\d+), (\d+)\]", said)) for said, rows in found]
    return [(rows, {(int(a), int(b)) for a, b in each}) for rows, each in pairs]


def test_pairs_of_a_turn_pad_for_themselves():
    counts = np.array([[[0, 20, 3, 0], [1, 0, 0, 7], [5, 0, 0, 0], [16, 2, 9, 0]]])
    _, _, padding = run(counts, 1, 21)
    np.testing.assert_array_equal(padding[0].nonzero()[0], [])
    _, _, padding = run(counts, 4, 21)
    off_diagonal = ~np.eye(4, dtype=bool)
    expected = np.where(off_diagonal, -counts[0] % 4, 0)
    np.testing.assert_array_equal(padding[0], expected)


def test_turns_within_processes_have_coarse_messages():
    """What crosses is as fine as elsewhere."""
    counts = np.random.default_rng(0).integers(0, 80, (1, 4, 4))
    received, expected, padding = run(counts, 1, 80, near=2)
    np.testing.assert_array_equal(received, expected)
    expected, step = np.zeros((4, 4), int), 1 << 4 - NEAR_DIGITS
    for a, b in [(0, 1), (1, 0), (2, 3), (3, 2)]:
        expected[a, b] = -counts[0, a, b] % step
    assert expected.sum() > 0
    np.testing.assert_array_equal(padding[0], expected)
    *_, padding = run(counts, 1, 80, near=1)
    assert not padding.any()
    received, expected, padding = run(counts, 1, 80, near=4, transport=MEMORY)
    np.testing.assert_array_equal(received, expected)
    np.testing.assert_array_equal(padding, np.where(np.eye(4, dtype=bool), 0, -counts % step))


@pytest.mark.parametrize("most", [0, 12, 13, 16, 80])
def test_within_one_of_several_processes_blocks_hold_the_fullest_pair_of_any_replica(most):
    counts = np.random.default_rng(most).integers(0, most + 1, (2, 4, 4))
    counts[1, 2, 1] = most
    received, expected, padding = run(counts, 3, 80, near=4)
    np.testing.assert_array_equal(received, expected)
    block = 3 * 2**4 // 4
    while block < most:
        block += max(1, block // 4)
    np.testing.assert_array_equal(padding, np.where(np.eye(4, dtype=bool), 0, block - counts))


def test_a_turn_that_crosses_anywhere_is_as_fine_as_on_links():
    """Neighbours trade in one turn; of three devices a process, 2 and 3 are apart."""
    counts = np.random.default_rng(0).integers(0, 22, (1, 6, 6))
    received, expected, padding = run(counts, 1, 21, near=3)
    np.testing.assert_array_equal(received, expected)
    assert not padding.any()
    *_, padding = run(counts, 1, 21, near=2)
    neighbours = [(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)]
    assert sum(padding[0, a, b] for a, b in neighbours) == padding.sum() > 0


def test_pairs_that_share_a_group_pad_to_the_fullest_of_it():
    """Devices 0 and 6, and 1 and 7, of eight between processes; even and odd ones within one."""
    counts = np.random.default_rng(0).integers(0, 22, (1, 8, 8))
    for transport, near, groups in ((LINKS, 1, 6), (MEMORY, 1, 2)):
        received, expected, padding = run(counts, 1, 21, near, transport=transport)
        np.testing.assert_array_equal(received, expected)
        for to in turns(8)[1:]:
            sent = [counts[0, source, destination] for source, destination in enumerate(to)]
            for source, destination in enumerate(to):
                fullest = max(sent[other] for other in range(source % groups, 8, groups))
                assert padding[0, source, destination] == fullest - sent[source]


@pytest.mark.parametrize(("near", "halves"), [(1, True), (2, False)])
def test_only_what_crosses_between_processes_goes_in_halves(near, halves, monkeypatch):
    monkeypatch.setattr(wire_lib, "LARGE", 1)
    mesh, spec = mesh_lib.make(1, 2, node=2), PartitionSpec(mesh_lib.EXPERT)

    def go(rows_ND, count_1MM):
        wire = Wire(mesh_lib.NODE, MEMORY, 1, 1, near, beside=(mesh_lib.DEVICE,))
        return wire.exchange(rows_ND, pairs_of(wire, count_1MM, 0, 4), 8)

    sharded = jax.shard_map(go, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    args = np.zeros((4 * 8, WIDTH), np.float32), np.zeros((1, 2, 2), np.int32)
    found = permutes(jax.jit(sharded).lower(*args).as_text())
    both = [pairs for _, pairs in found if len(pairs & {pair[::-1] for pair in pairs})]
    assert bool(both) != halves
    assert found


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([[0, 0, 1, 1]], 2),
        ([[0, 0, 0, 0]], 4),
        ([[0, 1, 0, 1]], 1),
        ([[0, 0, 1, 1], [2, 2, 2, 2]], 2),
        ([[0, 0, 1, 1], [2, 2, 2, 3]], 1),
        ([[0, 0, 1, 2]], 1),
        ([[0, 0, 0, 1, 1, 1]], 3),
        ([[0, 0, 1, 1, 1, 1]], 2),
        ([[0, 0, 0, 1, 1]], 1),
        ([[0]], 1),
    ],
)
def test_devices_that_share_a_process(processes, expected):
    assert wire_lib.longest_block(np.array(processes)) == expected


def test_near_devices_of_a_mesh_are_neighbours_on_the_expert_axes():
    assert wire_lib.near_of(mesh_lib.make(2, 2, node=2)) == 4  # one process has them all
    sizes = {"data": 2, "fsdp": 1, "node": 2, "expert": 4, "tensor": 2}
    for axis, near in (("data", 8), ("node", 4), ("expert", 1), ("tensor", 8)):
        process = np.indices(sizes.values())[list(sizes).index(axis)]
        device = np.vectorize(lambda index: types.SimpleNamespace(process_index=index))
        mesh = mock.Mock(spec=Mesh, axis_names=tuple(sizes), shape=sizes, devices=device(process))
        assert wire_lib.near_of(mesh) == near


def test_replicas_send_what_the_fullest_of_them_needs():
    counts = np.zeros((2, 4, 4), int)
    counts[0, 0, 1], counts[1, 0, 1] = 5, 2
    received, expected, padding = run(counts, 1, 8)
    np.testing.assert_array_equal(received, expected)
    assert padding[1, 0, 1] == 3
    assert padding.sum() == 3


@pytest.mark.parametrize(("size", "allowed"), [(4, 1.1), (8, 1.25)])
def test_padding_on_uneven_traffic(size, allowed):
    """Destinations as popular as on a trained model's traces: 1.4 x the mean for the fullest."""
    rng = np.random.default_rng(0)
    popular_M = 1 + 0.4 * np.linspace(1, -1, size)
    counts = rng.binomial(512, 0.5 * popular_M / popular_M.max(), (1, size, size))
    chunk = 512 // (4 * size)
    _, _, padding = run(counts, chunk, 512)
    true = counts.sum() - np.trace(counts[0])
    assert 1 + padding.sum() / true < allowed
