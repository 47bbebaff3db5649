"""Uneven all-to-all with static shapes: every device sends any number of rows to every device.

`Wire.exchange` has the meaning of `jax.lax.ragged_all_to_all` with dense segments. On TPU and
GPU it is that; the CPU backend has no implementation of it, so there the rows go out in messages
of static sizes.

Rows go in turns, each a permutation: every device sends to one and hears from one. A `ppermute` has
one size for all of its pairs; a count is written in binary, and after messages of the largest size
goes one of each smaller size (half, a quarter, ...) where the count in chunks has that digit.
Between processes rows cost time on a link; within one they are copies in memory, and messages cost
more than rows: turns that stay within processes leave out the smallest digits. An axis within a
process of a mesh of several has no turns: one all-to-all of equal blocks, of the smallest of a few
sizes that holds what the fullest pair sends. (Where one process has the whole mesh, its devices
stand for others, and rows without a token are counted as if they cost something: turns.)

The fullest pair of a turn is the one whose destination is popular: sending everybody what it needs
pads by 30 % and more. So pairs are in groups (each its own where there are few), each group counts
for itself, and a message goes out among the groups that have its digit: `lax.switch` over all sets
of groups. Every set is a program to compile, so there are fewer groups within one process.

Gloo sends at half rate where two devices send large messages to each other (benchmarks/README.md).
So turns are not distances, of which M / 2 is such a one: devices trade with neighbours alone, which
live in one process (`turns`). Between two nodes, where all do, large messages go in two halves,
each with as many pairs in either direction.

All devices of the mesh know the same counts (`Pairs`), which is what makes a collective inside a
branch legal; those of one expert axis are not enough: a `ppermute` is one operation of the whole
mesh, and the CPU backend waits for ever for devices that took another branch. Callers gather where
all assignments of an expert group go, from which all counts follow; what other replicas of the data
send is asked of them (`agreed`), where there are any.

Padding: a count is rounded up to whole chunks, and to the fullest pair of its group (in blocks: of
all) over all places of the other axes. Nothing here is differentiated: the callers' VJPs call it in
the other direction.

Axes: N rows sent, R rows received, D values a row, M devices, P places on the other axes over which
experts are split, O turns, G groups of pairs, C rows a message, B rows a block.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.pytree import Leaf

RAGGED, LINKS, MEMORY = "ragged", "links", "memory"
DIGITS = 4  # of a count in chunks, below the largest message
NEAR_DIGITS = 2  # the same in turns within processes, which leave out the smallest
LINK_GROUPS = 6  # of pairs, at most; 2^groups - 1 programs per message
MEMORY_GROUPS, FEW = 4, 2  # within one process: at most, and of more pairs than that
LARGE = 2**19  # bytes of a message that the buffers of a socket do not take in at once


def transport_of(mesh: Mesh) -> str:
    """How rows travel on a mesh: RAGGED, or in messages: between processes, or in one."""
    devices = mesh.devices.ravel().tolist()
    if devices[0].platform != "cpu":
        return RAGGED
    return MEMORY if len({device.process_index for device in devices}) == 1 else LINKS


def near_of(mesh: Mesh) -> int:
    """How many devices of the expert axes, one after the other, share a process everywhere."""
    process_of = np.vectorize(lambda device: device.process_index, otypes=[int])
    axes = [mesh.axis_names.index(name) for name in mesh_lib.EXPERT]
    process_ZM = np.moveaxis(process_of(mesh.devices), axes, [-2, -1])
    return longest_block(process_ZM.reshape(-1, mesh_lib.size(mesh, mesh_lib.EXPERT)))


def longest_block(process_ZM: np.ndarray) -> int:
    """The largest blocks of equal size, each of one process.

    Args:
      process_ZM: process of each device on an axis, at every place of the other axes.
    """
    size = process_ZM.shape[1]
    for length in range(size, 1, -1):
        if size % length == 0:
            blocks = process_ZM.reshape(-1, length)
            if (blocks == blocks[:, :1]).all():
                return length
    return 1


def exclusive_cumsum(counts_M: jax.Array) -> jax.Array:
    """Start of each segment when segments of these sizes lie end to end."""
    return jnp.cumsum(counts_M) - counts_M


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Rows between the devices of an axis in one movement.

    Attributes:
      to_M, from_M: int32 rows from this device to each one, and from each one to this.
      most_MM: int32 [source, destination]: the most rows of this pair at any place of the mesh, the
        same on all its devices; None where no one has to know (RAGGED).
      limit: the most rows that any pair can have.
    """

    to_M: Leaf
    from_M: Leaf
    most_MM: Leaf
    limit: int = dataclasses.field(metadata={"static": True})

    def back(self) -> "Pairs":
        """Of the movement the other way round."""
        most_MM = None if self.most_MM is None else self.most_MM.T
        return Pairs(self.from_M, self.to_M, most_MM, self.limit)


@dataclasses.dataclass(frozen=True)
class Wire:
    """How the rows of one layer travel. Called inside `shard_map`.

    Attributes:
      axis: mesh axis over which rows travel.
      transport: of `transport_of`.
      chunk: what counts are rounded up to, in rows, where there are messages.
      digits: the largest message has 2^digits chunks.
      near: devices of the axis, one after the other, that share a process.
      beside: axes whose devices share a link with this one, in the mesh's order behind `axis`;
        (): not known, or none.
    """

    axis: mesh_lib.Axis
    transport: str
    chunk: int
    digits: int
    near: int
    beside: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        axis: mesh_lib.Axis,
        transport: str,
        num_tokens: int,
        *,
        near: int,
        beside: tuple[str, ...] = (),
    ) -> "Wire":
        """The largest message is 2 T / M rows: twice what a pair moves if tokens go one place each.

        Finer chunks save bytes and cost messages: where chunks are coarse, what a plan saves in
        rows can be lost (benchmarks/README.md).
        """
        largest = max(1, 2 * num_tokens // jax.lax.axis_size(axis))
        digits = min(DIGITS, largest.bit_length() - 1)
        chunk = largest >> digits
        return cls(axis, transport, chunk, digits, near, beside)

    def agreed(self, count: Callable[[], jax.Array], movements: int) -> list[jax.Array | None]:
        """`Pairs.most_MM` of each of Z movements.

        Args:
          count: makes int32 [Z, P, M, M]: rows of each movement at each place, from each device to
            each one, as all devices that share a set of experts know them.
          movements: Z.

        Returns:
          int32 [M, M] each, or None where no one has to know.
        """
        if self.transport == RAGGED:
            return [None] * movements
        most_ZMM = count().max(axis=1)
        if jax.lax.axis_size(mesh_lib.REPLICAS) > 1:
            # A maximum (JAX 0.12) is over axes that the counts vary over, or over others, not both.
            varying = jax.typeof(most_ZMM).manual_axis_type.varying
            same = tuple(axis for axis in mesh_lib.REPLICAS if axis not in varying)
            if varying and same:
                most_ZMM = jax.lax.pcast(most_ZMM, same, to="varying")
            most_ZMM = jax.lax.pmax(most_ZMM, mesh_lib.REPLICAS)
        return list(most_ZMM)

    def exchange(self, rows_ND: jax.Array, pairs: Pairs, num_received: int) -> jax.Array:
        """Sends segment m of `rows_ND` to device m; returns the received segments by source.

        Args:
          rows_ND: rows for device 0, then for device 1, ...; what follows them is not sent.
          pairs: how many.
          num_received: static number of rows R of the result, at least the sum received.

        Returns:
          [R, D]: rows from device 0, then from device 1, ...; zeros beyond.
        """
        if self.transport == RAGGED:
            return _ragged_all_to_all(rows_ND, pairs.to_M, pairs.from_M, num_received, self.axis)
        if self._has_blocks():
            return self._in_blocks(rows_ND, pairs, num_received)
        return self._in_turns(rows_ND, pairs, num_received)

    def _in_blocks(self, rows_ND: jax.Array, pairs: Pairs, num_received: int) -> jax.Array:
        size, total = len(pairs.to_M), pairs.from_M.sum()
        send_start_M = exclusive_cumsum(pairs.to_M)
        receive_start_M = exclusive_cumsum(pairs.from_M)
        cut, put = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim

        def move(block: int) -> Callable[[jax.Array], jax.Array]:
            def branch(rows_ND: jax.Array) -> jax.Array:
                # A block may reach beyond its segment but never beyond the buffer.
                rows_ND = jnp.pad(rows_ND, ((0, block), (0, 0)))
                blocks = [cut(rows_ND, send_start_M[m], block) for m in range(size)]
                came_MBD = jax.lax.all_to_all(jnp.stack(blocks), self.axis, 0, 0, tiled=True)
                room = num_received + block - 1
                received_RD = jnp.pad(jnp.zeros_like(rows_ND[:1]), ((0, room), (0, 0)))
                for m in range(size):  # what is too much of one is written over by the next
                    received_RD = put(received_RD, came_MBD[m], receive_start_M[m], axis=0)
                real_R1 = (jnp.arange(num_received, dtype=jnp.int32) < total)[:, None]
                return jnp.where(real_R1, received_RD[:num_received], 0)

            return branch

        sizes = self._block_sizes(pairs.limit)
        return jax.lax.switch(self._block_step(pairs, sizes), [*map(move, sizes)], rows_ND)

    def _block_sizes(self, limit: int) -> list[int]:
        """Rows of a block, rising by a quarter: from a quarter of the largest message of a turn to
        what holds `limit`."""
        sizes = [max(1, (self.chunk << self.digits) // 4)]
        while sizes[-1] < limit:
            sizes.append(sizes[-1] + max(1, sizes[-1] // 4))
        return sizes

    def _block_step(self, pairs: Pairs, sizes: Sequence[int]) -> jax.Array:
        """Index of the first size that holds the fullest pair."""
        return (jnp.array(sizes, jnp.int32) < pairs.most_MM.max()).sum(dtype=jnp.int32)

    def _in_turns(self, rows_ND: jax.Array, pairs: Pairs, num_received: int) -> jax.Array:
        digits, me = self.digits, jax.lax.axis_index(self.axis)
        largest = self.chunk << digits
        send_start_M = exclusive_cumsum(pairs.to_M)
        receive_start_M = exclusive_cumsum(pairs.from_M)
        # A message may reach beyond its segment but never beyond the buffer, where slices shift.
        rows_ND = jnp.pad(rows_ND, ((0, largest), (0, 0)))
        room = num_received + largest - 1
        received_RD = jnp.pad(jnp.zeros_like(rows_ND[:1]), ((0, room), (0, 0)))

        # Messages are chained through `received_RD`, so that all devices meet in one order.
        in_turns = turns(len(pairs.to_M))
        for to, chunks_G in zip(in_turns, self._chunks_OG(pairs), strict=True):
            destination = jnp.array(to)[me]
            source = jnp.array(np.argsort(to))[me]
            starts = (send_start_M[destination], receive_start_M[source])
            turn = _Turn(to, rows_ND, *starts, pairs.from_M[source], source)
            whole_G = chunks_G >> digits

            def whole(i, received_RD, *, turn=turn, whole_G=whole_G):
                sent_G, sends_G = jnp.full_like(whole_G, i * largest), whole_G > i
                return self._message(turn, sent_G, sends_G, received_RD, size=largest)

            received_RD = jax.lax.fori_loop(0, whole_G.max(), whole, received_RD)
            for bit in reversed(range(self._spared(to), digits)):
                sends_G = ((chunks_G >> bit) & 1) == 1
                # The larger ones went before.
                sent_G = ((chunks_G >> (bit + 1)) << (bit + 1)) * self.chunk
                received_RD = jax.lax.cond(
                    sends_G.any(),
                    functools.partial(self._message, turn, sent_G, sends_G, size=self.chunk << bit),
                    lambda kept_RD: kept_RD,
                    received_RD,
                )
        return received_RD[:num_received]

    def _message(
        self,
        turn: "_Turn",
        sent_G: jax.Array,
        sends_G: jax.Array,
        received_RD: jax.Array,
        *,
        size: int,
    ) -> jax.Array:
        """`size` rows of every group that sends, each of which has sent `sent_G` before."""
        groups, me = len(sends_G), jax.lax.axis_index(self.axis)
        at = turn.send_start + sent_G[me % groups]
        chunk_CD = jax.lax.dynamic_slice_in_dim(turn.rows_ND, at, size)
        sets = (sends_G.astype(jnp.int32) << jnp.arange(groups, dtype=jnp.int32)).sum(
            dtype=jnp.int32
        )
        moves = self._moves(turn.to, groups, large=chunk_CD.nbytes >= LARGE)
        chunk_CD = jax.lax.switch(sets - 1, moves, chunk_CD)
        done = sent_G[turn.source % groups]
        at = turn.receive_start + done
        old_CD = jax.lax.dynamic_slice_in_dim(received_RD, at, size)
        # Nothing comes from a group that does not send.
        wanted = jnp.where(sends_G[turn.source % groups], turn.receive_count - done, 0)
        ours_C = jnp.arange(size, dtype=jnp.int32) < wanted
        new_CD = jnp.where(ours_C[:, None], chunk_CD, old_CD)
        return jax.lax.dynamic_update_slice_in_dim(received_RD, new_CD, at, axis=0)

    def padding_M(self, pairs: Pairs) -> jax.Array:
        """Rows without a token that `exchange` sends from here to each device, int32 [M]."""
        if self.transport == RAGGED:
            return jnp.zeros_like(pairs.to_M)
        me = jax.lax.axis_index(self.axis)
        if self._has_blocks():
            sizes = self._block_sizes(pairs.limit)
            sent = jnp.array(sizes, jnp.int32)[self._block_step(pairs, sizes)]
            return jnp.where(jnp.arange(len(pairs.to_M)) == me, 0, sent - pairs.to_M)
        chunks_OG = self._chunks_OG(pairs)
        sent_O = chunks_OG[:, me % chunks_OG.shape[1]] * self.chunk
        destination_O = jnp.array(turns(len(pairs.to_M)), jnp.int32)[:, me]
        sent_M = jnp.zeros_like(pairs.to_M).at[destination_O].set(sent_O)
        return jnp.where(jnp.arange(len(sent_M)) == me, 0, sent_M - pairs.to_M)

    def _chunks_OG(self, pairs: Pairs) -> jax.Array:
        """int32 [turns, G]: chunks that the pairs of a group send; equal on all devices."""
        size = len(pairs.to_M)
        groups, to_OM = self._num_groups(size), jnp.array(turns(size), jnp.int32)
        source_M = jnp.arange(size, dtype=jnp.int32)
        most_OM = pairs.most_MM[source_M[None], to_OM]
        in_group_MG = source_M[:, None] % groups == jnp.arange(groups, dtype=jnp.int32)[None]
        most_OMG = jnp.where(in_group_MG[None], most_OM[:, :, None], 0)
        unit_O1 = jnp.array([[1 << self._spared(to)] for to in turns(size)], jnp.int32)
        return -(-most_OMG.max(axis=1) // (self.chunk * unit_O1)) * unit_O1

    def _num_groups(self, size: int) -> int:
        """Groups of pairs on an axis of this size: device i sends in group i mod G."""
        if self.transport == LINKS:
            return min(size, LINK_GROUPS)
        return size if size <= MEMORY_GROUPS else FEW

    def _has_blocks(self) -> bool:
        """Whether rows go in one all-to-all: among devices of one of several processes."""
        return self.transport == LINKS and 1 < jax.lax.axis_size(self.axis) == self.near

    def _spared(self, to: tuple[int, ...]) -> int:
        """Smallest binary digits that the chunks of a turn do not have."""
        return max(0, self.digits - NEAR_DIGITS) if self._stays_near(to) else 0

    def _stays_near(self, to: tuple[int, ...]) -> bool:
        """Whether every device of a turn sends to one in its own process."""
        return all(source // self.near == device // self.near for source, device in enumerate(to))

    def _moves(
        self, to: tuple[int, ...], num_groups: int, *, large: bool
    ) -> list[Callable[[jax.Array], jax.Array]]:
        """A permutation for every non-empty set of groups, in binary order from 1."""
        if to == tuple(range(len(to))):
            return [lambda rows_CD: rows_CD]
        both_ways = all(to[destination] == source for source, destination in enumerate(to))
        beside = jax.lax.axis_size(self.beside) if self.beside else 1
        halves = large and both_ways and beside % 2 == 0 and not self._stays_near(to)
        move = self._halves if halves else self._move
        return [
            functools.partial(
                move,
                [pair for pair in enumerate(to) if chosen >> (pair[0] % num_groups) & 1],
            )
            for chosen in range(1, 2**num_groups)
        ]

    def _move(self, pairs: list[tuple[int, int]], rows_CD: jax.Array) -> jax.Array:
        return jax.lax.ppermute(rows_CD, self.axis, pairs)

    def _halves(self, pairs: list[tuple[int, int]], rows_CD: jax.Array) -> jax.Array:
        """First devices send whose index on the axis plus that beside it is even, then odd ones."""
        axes = (*((self.axis,) if isinstance(self.axis, str) else self.axis), *self.beside)
        count, place = jax.lax.axis_size(self.beside), jax.lax.axis_index(self.beside)
        even, odd = (
            [
                (source * count + at, destination * count + at)
                for source, destination in pairs
                for at in range(count)
                if (source + at) % 2 == half
            ]
            for half in range(2)
        )
        # Neighbours differ by one, so what comes from an even device comes to an odd one.
        is_odd = (jax.lax.axis_index(self.axis) + place) % 2 == 1
        first_CD = jax.lax.ppermute(rows_CD, axes, even)
        # The second waits for the first: all devices meet in one order.
        second_CD = jax.lax.ppermute(jnp.where(is_odd, rows_CD, first_CD), axes, odd)
        return jnp.where(is_odd, first_CD, second_CD)


class _Turn(NamedTuple):
    """A turn as this device sees it.

    Attributes:
      to: of `turns`.
      rows_ND: what is sent from, padded.
      send_start: where the rows for this turn's destination begin there.
      receive_start, receive_count: where those of its source belong among the received, how many.
      source: index of the device that is heard from.
    """

    to: tuple[int, ...]
    rows_ND: jax.Array
    send_start: jax.Array
    receive_start: jax.Array
    receive_count: jax.Array
    source: jax.Array


@functools.cache
def turns(size: int) -> tuple[tuple[int, ...], ...]:
    """Turns in which every device of an axis sends to every one once, itself first.

    Entry i of a turn is where device i sends to; each hears from one. An even number of devices is
    taken as couples of neighbours, (couple h, place s), and turns go from (h, s) to (h + a, s + b)
    for all a, b. Where that would lead back, at half of the couples, the upper half goes to
    s + b + 1: i sends to j and j to i in the turn of neighbours alone, which no schedule of 4
    devices can avoid.
    """
    if size % 2:
        return tuple(tuple((i + s) % size for i in range(size)) for s in range(size))
    couples = size // 2
    made = []
    for across in range(couples):
        for along in range(2):
            to = []
            for device in range(size):
                couple, place = divmod(device, 2)
                more = along + (2 * across == couples and couple >= across)
                to.append((couple + across) % couples * 2 + (place + more) % 2)
            made.append(tuple(to))
    return tuple(made)


def _ragged_all_to_all(
    rows_ND: jax.Array,
    send_counts_M: jax.Array,
    receive_counts_M: jax.Array,
    num_received: int,
    axis: mesh_lib.Axis,
) -> jax.Array:
    # Where our segment starts in each receiver's buffer: the receivers know, so they tell us.
    output_start_M = jax.lax.all_to_all(
        exclusive_cumsum(receive_counts_M), axis, split_axis=0, concat_axis=0, tiled=True
    )
    received_RD = jnp.pad(jnp.zeros_like(rows_ND[:1]), ((0, num_received - 1), (0, 0)))
    return jax.lax.ragged_all_to_all(
        rows_ND,
        received_RD,
        exclusive_cumsum(send_counts_M),
        send_counts_M,
        output_start_M,
        receive_counts_M,
        axis_name=axis,
    )
