"""Uneven all-to-all with static shapes: every device sends any number of rows to every device.

`Wire.exchange` has the meaning of `jax.lax.ragged_all_to_all` with dense segments. Transports:

ragged     on TPU and GPU: that operation.
blocks     on CPU devices of one process, between which a row is a copy in memory and a collective
           costs more than the rows: one `all_to_all` of a block per pair, all of one size, the
           smallest of a ladder that holds the fullest pair.
per_shift  on CPU devices of several processes, between which rows cost time on a link: messages of
           static sizes, distance by distance (from device i to device i + s): as many `ppermute`s
           of 16 chunks as the count of the pair holds, then 8, 4, 2 and one chunk where it has that
           binary digit.

A `ppermute` has one size for all of its pairs, and the fullest pair of a distance is the one whose
destination is popular: sending everybody what the fullest pair needs pads by 30 % and more. So
pairs are in groups (each its own where there are at most 4), each group counts for itself, and a
message goes out among the groups that have its bit: `lax.switch` over all sets of groups.

All devices of the mesh agree on the counts through a `pmax`, which is what makes a collective
inside a branch legal; over the expert axis alone is not enough: a `ppermute` is one operation of
the whole mesh, and the CPU backend waits for ever for data replicas that took another branch.

Padding: a count is rounded up to whole chunks, and to the fullest pair of its group over all data
replicas (blocks: to the ladder, and to the fullest pair of all). Nothing here is differentiated:
the callers' VJPs call it in the other direction.

Axes: N rows sent, R rows received, D values a row, M devices, G groups of pairs, C rows a message.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib


def transport_of(mesh: Mesh) -> str:
    """How rows travel on a mesh: the CPU has no `ragged_all_to_all`."""
    devices = mesh.devices.ravel().tolist()
    if devices[0].platform != "cpu":
        return "ragged"
    processes = {device.process_index for device in devices}
    return "blocks" if len(processes) == 1 else "per_shift"


def exclusive_cumsum(counts_M: jax.Array) -> jax.Array:
    """Start of each segment when segments of these sizes lie end to end."""
    return jnp.cumsum(counts_M) - counts_M


@dataclasses.dataclass(frozen=True)
class Wire:
    """How the rows of one layer travel. Called inside `shard_map`.

    Attributes:
      axis: mesh axis over which rows travel.
      transport: "ragged", "blocks" or "per_shift", see the head of this file.
      chunk: of "blocks" and "per_shift", in rows: the smallest message.
    """

    axis: mesh_lib.Axis
    transport: str
    chunk: int

    @classmethod
    def of(cls, axis: mesh_lib.Axis, transport: str, num_tokens: int) -> "Wire":
        """A pair moves about T / M rows where a token goes one place at random.

        Finer chunks save bytes and cost messages (benchmarks/README.md: a saving that a plan makes
        in rows is lost where chunks are coarse).
        """
        parts = 4 if transport == "blocks" else 1 << (LARGEST - 1)
        return cls(axis, transport, max(1, num_tokens // (parts * jax.lax.axis_size(axis))))

    def exchange(
        self,
        rows_ND: jax.Array,
        send_counts_M: jax.Array,
        receive_counts_M: jax.Array,
        num_received: int,
    ) -> jax.Array:
        """Sends segment m of `rows_ND` to device m; returns the received segments by source.

        Args:
          rows_ND: rows for device 0, then for device 1, ...; what follows them is not sent.
          send_counts_M: rows for each device, int32.
          receive_counts_M: rows that each device sends here, int32.
          num_received: static number of rows R of the result, at least the sum received.

        Returns:
          [R, D]: rows from device 0, then from device 1, ...; zeros beyond.
        """
        counts = (send_counts_M, receive_counts_M)
        if self.transport == "ragged":
            return _ragged_all_to_all(rows_ND, *counts, num_received, self.axis)
        if self.transport == "blocks":
            return _blocks(rows_ND, *counts, num_received, self.axis, self.chunk)
        return _per_shift(rows_ND, *counts, num_received, self.axis, self.chunk)

    def padding_M(self, send_counts_M: jax.Array) -> jax.Array:
        """Rows without a token that `exchange` sends from here to each device, int32 [M]."""
        if self.transport == "ragged":
            return jnp.zeros_like(send_counts_M)
        size, me = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        if self.transport == "blocks":
            sizes = _ladder(self.chunk, 2**30)
            step = _step(send_counts_M, sizes, self.axis)
            sent = jnp.asarray(sizes, jnp.int32)[step]
            return jnp.where(jnp.arange(size) == me, 0, sent - send_counts_M)
        shift_M = (jnp.arange(size, dtype=jnp.int32) - me) % size
        chunks_MG = _chunks_by_shift(send_counts_M, self.chunk, self.axis)
        sent_M = chunks_MG[shift_M, me % chunks_MG.shape[1]] * self.chunk
        return jnp.where(shift_M == 0, 0, sent_M - send_counts_M)


LARGEST = 4  # binary digits: a message carries at most 2^LARGEST chunks
EVERY_SET = 4  # groups, where there are no more devices; 2^groups - 1 programs per message


def _ladder(chunk: int, rows: int) -> list[int]:
    """Sizes of blocks: 0, then 1, 2, 3, 4, 6, 8, 12, ... chunks, up to the first that holds all."""
    sizes, digit = [0, chunk], 2 * chunk
    while sizes[-1] < rows:
        sizes += [digit, digit * 3 // 2]
        digit *= 2
    return sizes


def _step(send_counts_M: jax.Array, sizes: list[int], axis: mesh_lib.Axis) -> jax.Array:
    """The first size that holds the fullest pair of the mesh; what stays is not sent."""
    at_home_M = jnp.arange(len(send_counts_M)) == jax.lax.axis_index(axis)
    most = jax.lax.pmax(jnp.where(at_home_M, 0, send_counts_M).max(), mesh_lib.BATCH)
    return jnp.searchsorted(jnp.asarray(sizes, jnp.int32), most).astype(jnp.int32)


def _blocks(
    rows_ND: jax.Array,
    send_counts_M: jax.Array,
    receive_counts_M: jax.Array,
    num_received: int,
    axis: mesh_lib.Axis,
    chunk: int,
) -> jax.Array:
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    send_start_M = exclusive_cumsum(send_counts_M)
    end_M = jnp.cumsum(receive_counts_M)
    row_R = jnp.arange(num_received, dtype=jnp.int32)
    source_R = (row_R[:, None] >= end_M[None]).sum(axis=1, dtype=jnp.int32)
    offset_R = row_R - (end_M - receive_counts_M)[jnp.minimum(source_R, size - 1)]

    def moved(rows_ND, *, block):
        """Blocks from all devices, then the rows of this one: received rows are among them."""
        index_MC = send_start_M[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
        sent_XD = jnp.take(rows_ND, index_MC.reshape(-1), axis=0, mode="clip")
        arrived_XD = sent_XD
        if block:
            arrived_XD = jax.lax.all_to_all(sent_XD, axis, 0, 0, tiled=True)
        at_R = source_R * block + offset_R
        at_R = jnp.where(source_R == me, size * block + send_start_M[me] + offset_R, at_R)
        at_R = jnp.where(source_R == size, size * block + len(rows_ND), at_R)  # none: zeros
        both_XD = jnp.concatenate([arrived_XD, rows_ND])
        return jnp.take(both_XD, at_R, axis=0, mode="fill", fill_value=0)

    sizes = _ladder(chunk, len(rows_ND))
    step = _step(send_counts_M, sizes, axis)
    return jax.lax.switch(step, [functools.partial(moved, block=block) for block in sizes], rows_ND)


def _num_groups(size: int) -> int:
    """Groups of pairs on an axis of this size: device i sends in group i mod G."""
    return size if size <= EVERY_SET else 2


def _chunks_by_shift(send_counts_M: jax.Array, chunk: int, axis: mesh_lib.Axis) -> jax.Array:
    """int32 [distances, G]: chunks that the pairs of a group send; equal on all devices."""
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    destination_M = (me + jnp.arange(size, dtype=jnp.int32)) % size
    chunks_M = -(-send_counts_M[destination_M] // chunk)
    mine_G = jnp.arange(_num_groups(size)) == me % _num_groups(size)
    return jax.lax.pmax(jnp.where(mine_G[None], chunks_M[:, None], 0), mesh_lib.BATCH)


def _per_shift(
    rows_ND: jax.Array,
    send_counts_M: jax.Array,
    receive_counts_M: jax.Array,
    num_received: int,
    axis: mesh_lib.Axis,
    chunk: int,
) -> jax.Array:
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    send_start_M = exclusive_cumsum(send_counts_M)
    receive_start_M = exclusive_cumsum(receive_counts_M)
    chunks_MG = _chunks_by_shift(send_counts_M, chunk, axis)
    num_groups = chunks_MG.shape[1]
    largest = chunk << LARGEST
    # A message may reach beyond its segment but never beyond the buffer, where slices would shift.
    rows_ND = jnp.pad(rows_ND, ((0, largest), (0, 0)))
    received_RD = jnp.pad(jnp.zeros_like(rows_ND[:1]), ((0, num_received + largest - 1), (0, 0)))

    # Messages are chained through `received_RD`, so that all devices meet in one order.
    for shift in range(size):
        destination, source = (me + shift) % size, (me - shift) % size
        chunks_G, moves = chunks_MG[shift], _moves(shift, size, num_groups, axis)
        send_start, receive_start = send_start_M[destination], receive_start_M[source]
        receive_count = receive_counts_M[source]

        def message(sent_G, sends_G, received_RD, *, segment=None, size=0, moves=moves):
            """`size` rows of every group that sends; each has sent `sent_G` before."""
            send_start, receive_start, receive_count, source = segment
            done = sent_G[source % num_groups]
            at = receive_start + done
            chunk_CD = jax.lax.dynamic_slice_in_dim(
                rows_ND, send_start + sent_G[me % num_groups], size
            )
            sets = (sends_G << jnp.arange(num_groups, dtype=jnp.int32)).sum(dtype=jnp.int32)
            chunk_CD = jax.lax.switch(sets - 1, moves, chunk_CD)
            old_CD = jax.lax.dynamic_slice_in_dim(received_RD, at, size)
            # Nothing comes from a group that does not send.
            wanted = (receive_count - done) * sends_G[source % num_groups]
            ours_C = jnp.arange(size, dtype=jnp.int32) < wanted
            new_CD = jnp.where(ours_C[:, None], chunk_CD, old_CD)
            return jax.lax.dynamic_update_slice_in_dim(received_RD, new_CD, at, axis=0)

        message = functools.partial(
            message, segment=(send_start, receive_start, receive_count, source)
        )
        whole_G = chunks_G >> LARGEST

        def turn(i, received_RD, *, message=message, whole_G=whole_G):
            sent_G = jnp.full_like(whole_G, i * largest)
            return message(sent_G, (whole_G > i).astype(jnp.int32), received_RD, size=largest)

        received_RD = jax.lax.fori_loop(0, whole_G.max(), turn, received_RD)
        for bit in reversed(range(LARGEST)):
            sends_G = (chunks_G >> bit) & 1
            sent_G = ((chunks_G >> (bit + 1)) << (bit + 1)) * chunk  # the larger ones went before
            received_RD = jax.lax.cond(
                sends_G.any(),
                functools.partial(message, sent_G, sends_G, size=chunk << bit),
                lambda kept_RD: kept_RD,
                received_RD,
            )
    return received_RD[:num_received]


def _moves(shift: int, size: int, num_groups: int, axis: mesh_lib.Axis):
    """A permutation for every non-empty set of groups, in binary order from 1."""
    if shift == 0:
        return [lambda rows_CD: rows_CD]
    pairs = [(i, (i + shift) % size) for i in range(size)]
    return [
        functools.partial(
            jax.lax.ppermute,
            axis_name=axis,
            perm=[pair for pair in pairs if chosen >> (pair[0] % num_groups) & 1],
        )
        for chosen in range(1, 2**num_groups)
    ]


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
