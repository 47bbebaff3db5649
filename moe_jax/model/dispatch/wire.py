"""Uneven all-to-all with static shapes: every device sends any number of rows to every device.

`Wire.exchange` has the meaning of `jax.lax.ragged_all_to_all` with dense segments. On TPU and
GPU it is that; the CPU backend has no implementation of it, so there the rows go out in messages
of static sizes, distance by distance (from device i to device i + s): as many `ppermute`s of the
largest size as the count of the pair holds, then one of each smaller size (half, a quarter, ...)
where its count in chunks has that binary digit. How fine the sizes are is a matter of where rows
travel: between processes rows cost time on a link; within one they are copies in memory, and
messages cost more than rows.

A `ppermute` has one size for all of its pairs, and the fullest pair of a distance is the one whose
destination is popular: sending everybody what the fullest pair needs pads by 30 % and more. So
pairs are in groups (each its own where there are at most 4), each group counts for itself, and a
message goes out among the groups that have its bit: `lax.switch` over all sets of groups.

All devices of the mesh agree on the counts through a `pmax`, which is what makes a collective
inside a branch legal; over the expert axis alone is not enough: a `ppermute` is one operation of
the whole mesh, and the CPU backend waits for ever for data replicas that took another branch.

Padding: a count is rounded up to whole chunks, and to the fullest pair of its group over all data
replicas. Nothing here is differentiated: the callers' VJPs call it in the other direction.

Axes: N rows sent, R rows received, D values a row, M devices, G groups of pairs, C rows a message.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib

RAGGED = "ragged"
# Else messages: binary digits of a count in chunks, the largest message being 2^digits chunks.
DIGITS = {"memory": 2, "links": 4}


def transport_of(mesh: Mesh) -> str:
    """How rows travel on a mesh: RAGGED, or on CPU a name in DIGITS."""
    devices = mesh.devices.ravel().tolist()
    if devices[0].platform != "cpu":
        return RAGGED
    processes = {device.process_index for device in devices}
    return "memory" if len(processes) == 1 else "links"


def exclusive_cumsum(counts_M: jax.Array) -> jax.Array:
    """Start of each segment when segments of these sizes lie end to end."""
    return jnp.cumsum(counts_M) - counts_M


@dataclasses.dataclass(frozen=True)
class Wire:
    """How the rows of one layer travel. Called inside `shard_map`.

    Attributes:
      axis: mesh axis over which rows travel.
      transport: of `transport_of`.
      chunk: what counts are rounded up to, in rows, where there are messages.
    """

    axis: mesh_lib.Axis
    transport: str
    chunk: int

    @classmethod
    def of(cls, axis: mesh_lib.Axis, transport: str, num_tokens: int) -> "Wire":
        """The largest message is 2 T / M rows: twice what a pair moves if tokens go one place each.

        Finer chunks save bytes and cost messages: where chunks are coarse, what a plan saves in
        rows can be lost (benchmarks/README.md).
        """
        digits = DIGITS.get(transport, 0)
        return cls(axis, transport, max(1, 2 * num_tokens // (jax.lax.axis_size(axis) << digits)))

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
        if self.transport == RAGGED:
            return _ragged_all_to_all(rows_ND, *counts, num_received, self.axis)
        digits = DIGITS[self.transport]
        return _messages(rows_ND, *counts, num_received, self.axis, self.chunk, digits)

    def padding_M(self, send_counts_M: jax.Array) -> jax.Array:
        """Rows without a token that `exchange` sends from here to each device, int32 [M]."""
        if self.transport == RAGGED:
            return jnp.zeros_like(send_counts_M)
        size, me = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        shift_M = (jnp.arange(size, dtype=jnp.int32) - me) % size
        chunks_MG = _chunks_by_shift(send_counts_M, self.chunk, self.axis)
        sent_M = chunks_MG[shift_M, me % chunks_MG.shape[1]] * self.chunk
        return jnp.where(shift_M == 0, 0, sent_M - send_counts_M)


EVERY_SET = 4  # groups, where there are no more devices; 2^groups - 1 programs per message


def _num_groups(size: int) -> int:
    """Groups of pairs on an axis of this size: device i sends in group i mod G."""
    return size if size <= EVERY_SET else 2


def _chunks_by_shift(send_counts_M: jax.Array, chunk: int, axis: mesh_lib.Axis) -> jax.Array:
    """int32 [distances, G]: chunks that the pairs of a group send; equal on all devices."""
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    destination_M = (me + jnp.arange(size, dtype=jnp.int32)) % size
    chunks_M = -(-send_counts_M[destination_M] // chunk)
    mine_G = jnp.arange(_num_groups(size)) == me % _num_groups(size)
    chunks_MG = jnp.where(mine_G[None], chunks_M[:, None], 0)
    # Counts that come from a table do not vary over all axes of the maximum, as it demands.
    chunks_MG = chunks_MG + 0 * jax.lax.axis_index(mesh_lib.BATCH)
    return jax.lax.pmax(chunks_MG, mesh_lib.BATCH)


def _messages(
    rows_ND: jax.Array,
    send_counts_M: jax.Array,
    receive_counts_M: jax.Array,
    num_received: int,
    axis: mesh_lib.Axis,
    chunk: int,
    digits: int,
) -> jax.Array:
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    send_start_M = exclusive_cumsum(send_counts_M)
    receive_start_M = exclusive_cumsum(receive_counts_M)
    chunks_MG = _chunks_by_shift(send_counts_M, chunk, axis)
    num_groups = chunks_MG.shape[1]
    largest = chunk << digits
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
        whole_G = chunks_G >> digits

        def turn(i, received_RD, *, message=message, whole_G=whole_G):
            sent_G = jnp.full_like(whole_G, i * largest)
            return message(sent_G, (whole_G > i).astype(jnp.int32), received_RD, size=largest)

        received_RD = jax.lax.fori_loop(0, whole_G.max(), turn, received_RD)
        for bit in reversed(range(digits)):
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
