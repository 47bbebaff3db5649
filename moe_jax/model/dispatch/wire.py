"""Uneven all-to-all with static shapes: every device sends any number of rows to every device.

`Wire.exchange` has the meaning of `jax.lax.ragged_all_to_all` with dense segments. On TPU and
GPU it is that; the CPU backend has no implementation of it, so there the rows go out in chunks:
for each distance s a loop of `ppermute`s carries `chunk` rows at a time from device i to i + s, as
many times as the fullest pair of that distance needs. All devices of the mesh agree on the count
through a `pmax`, which is what makes a collective inside a loop legal; over the expert axis alone
is not enough: a `ppermute` is one operation of the whole mesh, and the CPU backend waits for ever
for the data replicas that took one turn less. Padding is below one chunk a pair
beyond the fullest pair of its distance. Nothing here is differentiated: the callers' VJPs call it
in the other direction.

Axes: N rows sent, R rows received, D values a row, M devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax import mesh as mesh_lib


def transport_of(platform: str) -> str:
    """How rows travel on the devices of a mesh: the CPU has no `ragged_all_to_all`."""
    return "per_shift" if platform == "cpu" else "ragged"


def exclusive_cumsum(counts_M: jax.Array) -> jax.Array:
    """Start of each segment when segments of these sizes lie end to end."""
    return jnp.cumsum(counts_M) - counts_M


@dataclasses.dataclass(frozen=True)
class Wire:
    """How the rows of one layer travel. Called inside `shard_map`.

    Attributes:
      axis: mesh axis over which rows travel.
      transport: "ragged" or "per_shift", see `transport_of`.
      chunk: rows a `ppermute`, for "per_shift".
    """

    axis: mesh_lib.Axis
    transport: str
    chunk: int

    @classmethod
    def of(cls, axis: mesh_lib.Axis, transport: str, num_tokens: int) -> "Wire":
        """A chunk is about a quarter of what a pair moves when a token goes one place at random."""
        return cls(axis, transport, max(1, num_tokens // (4 * jax.lax.axis_size(axis))))

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
        return _per_shift(rows_ND, *counts, num_received, self.axis, self.chunk)

    def padding_M(self, send_counts_M: jax.Array) -> jax.Array:
        """Rows without a token that `exchange` sends from here to each device, int32 [M]."""
        if self.transport == "ragged":
            return jnp.zeros_like(send_counts_M)
        size, me = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        shift_M = (jnp.arange(size, dtype=jnp.int32) - me) % size
        chunks_M = _chunks_by_shift(send_counts_M, self.chunk, self.axis)
        sent_M = (chunks_M * self.chunk)[shift_M]
        return jnp.where(shift_M == 0, 0, sent_M - send_counts_M)


def _chunks_by_shift(send_counts_M: jax.Array, chunk: int, axis: mesh_lib.Axis) -> jax.Array:
    """Chunks that each distance takes: what its fullest pair needs, equal on all devices."""
    size, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    destination_M = (me + jnp.arange(size, dtype=jnp.int32)) % size
    return jax.lax.pmax(-(-send_counts_M[destination_M] // chunk), mesh_lib.BATCH)


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
    chunks_M = _chunks_by_shift(send_counts_M, chunk, axis)
    # A chunk may reach beyond its segment but never beyond the buffer, where slices would shift.
    rows_ND = jnp.pad(rows_ND, ((0, chunk), (0, 0)))
    received_RD = jnp.pad(jnp.zeros_like(rows_ND[:1]), ((0, num_received + chunk - 1), (0, 0)))

    # The distances are chained through `received_RD`, so that all devices meet in one order.
    for shift in range(size):
        destination, source = (me + shift) % size, (me - shift) % size
        pairs = [(i, (i + shift) % size) for i in range(size)]
        send_start, receive_start = send_start_M[destination], receive_start_M[source]
        receive_count = receive_counts_M[source]

        def move(i, received_RD, *, shift=shift, pairs=pairs, segment=None):
            send_start, receive_start, receive_count = segment
            chunk_CD = jax.lax.dynamic_slice_in_dim(rows_ND, send_start + i * chunk, chunk)
            if shift:
                chunk_CD = jax.lax.ppermute(chunk_CD, axis, pairs)
            at = receive_start + i * chunk
            old_CD = jax.lax.dynamic_slice_in_dim(received_RD, at, chunk)
            ours_C = i * chunk + jnp.arange(chunk, dtype=jnp.int32) < receive_count
            new_CD = jnp.where(ours_C[:, None], chunk_CD, old_CD)
            return jax.lax.dynamic_update_slice_in_dim(received_RD, new_CD, at, axis=0)

        segment = (send_start, receive_start, receive_count)
        received_RD = jax.lax.fori_loop(
            0, chunks_M[shift], functools.partial(move, segment=segment), received_RD
        )
    return received_RD[:num_received]


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
