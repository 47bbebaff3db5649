"""One stretch of a row's way: between the devices of one mesh axis (or of several, joined).

A hop takes rows of the T tokens at hand to the devices of their experts on its axis, and takes
sums or single assignments back. It knows two sets of positions: T tokens at hand on this side, and
the X = M * T tokens of all devices of the axis on the far side, where only those that came here are
real. Rows lie packed in buffers; where the row of a token or of an assignment lies is an index
beside it, so that two hops, or a hop and the sort by expert, cost one gather together.

There are four movements, and each is the transpose of another:

    tokens_out        a token's row, once to each device that has an expert of it
    sums_home         one row back from each of those devices        (transpose of tokens_out)
    assignments_out   a row of its own for each (token, k)
    assignments_home  the same back                                  (transpose of assignments_out)

`Exchange` moves rows by the uneven all-to-all of wire.py. `Gather` shows every token to every
device and sums on the way back (all-gather and reduce-scatter): the same four movements.

Axes: T tokens at hand, K top_k, M devices of the axis, X = M * T, P places on the other axes over
which experts are split, D values a row, N rows packed.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from moe_jax.mesh import Axis
from moe_jax.model.dispatch import sorting as sorting_lib
from moe_jax.model.dispatch.wire import Pairs, Wire
from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """A hop of uneven all-to-alls. Segments of buffers are in device order, tokens in theirs.

    Attributes:
      wire: how rows travel.
      token_R: token of each row sent out (by device, then token); R = T * min(K, M).
      arrival_X: where the row of a token lies among those that arrived.
      arrived_X: the tokens that came here, packed (by source, then token); arbitrary beyond.
      assignment_N: assignment (t * K + k) of each row sent out singly (by device, then t * K + k).
      home_position_TK: where the row of an assignment lies among those that come home singly.
      sum_position_TK: where the sum of the assignment's device lies among those that come home;
        beyond all rows if an earlier k has the same device, so that each sum counts once.
      arrived_assignment_A: the assignments that came here, packed; arbitrary beyond.
      rank_XK: where the row of an assignment lies among those that arrived singly.
      tokens, assignments: rows out, one for each device of a token's experts, or singly. Their
        `to` counts what tokens at hand cause, `from` what is done here for others.
    """

    wire: Wire = dataclasses.field(metadata={"static": True})
    token_R: Leaf
    arrival_X: Leaf
    arrived_X: Leaf
    assignment_N: Leaf
    home_position_TK: Leaf
    sum_position_TK: Leaf
    arrived_assignment_A: Leaf
    rank_XK: Leaf
    tokens: Pairs
    assignments: Pairs

    @property
    def axis(self) -> Axis:
        """Of the mesh."""
        return self.wire.axis

    def tokens_out(self, rows_ND: jax.Array, row_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows of tokens, found at `row_T`, to the devices of their experts: rows, `row_X`."""
        num_received = self.arrival_X.size
        sent_RD = rows_ND[row_T[self.token_R]]
        return self.wire.exchange(sent_RD, self.tokens, num_received), self.arrival_X

    def sums_home(
        self, rows_ND: jax.Array, row_XK: jax.Array, dtype: jax.typing.DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """Sums over k of the rows found at `row_XK`, to where their tokens came from, as dtype."""
        sum_XD = sorting_lib.sum_rows(rows_ND, row_XK[self.arrived_X]).astype(dtype)
        home = self.tokens.back()
        return self.wire.exchange(sum_XD, home, self.token_R.size), self.sum_position_TK

    def assignments_out(self, rows_ND: jax.Array, row_TK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A row for each assignment, found at `row_TK`, to its expert's device."""
        sent_ND = rows_ND[row_TK.reshape(-1)[self.assignment_N]]
        num_received = self.arrived_assignment_A.size
        return self.wire.exchange(sent_ND, self.assignments, num_received), self.rank_XK

    def assignments_home(
        self, rows_ND: jax.Array, row_XK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The row of each assignment that came here, found at `row_XK`, back to its token."""
        position_A = row_XK.reshape(-1)[self.arrived_assignment_A]
        sent_AD = sorting_lib.take_rows(rows_ND, position_A)
        home = self.assignments.back()
        return self.wire.exchange(sent_AD, home, self.assignment_N.size), self.home_position_TK

    def rows_out_M(self) -> jax.Array:
        """Rows of `tokens_out` to each device of the axis, this one included."""
        return self.tokens.to_M

    def rows_home_M(self, *, singly: bool) -> jax.Array:
        """Rows of `assignments_home` (singly) or `sums_home` to each device of the axis."""
        return (self.assignments if singly else self.tokens).from_M

    def padding_M(self, *, singly: bool) -> jax.Array:
        """Rows without a token, out and home."""
        home = (self.assignments if singly else self.tokens).back()
        return self.wire.padding_M(self.tokens) + self.wire.padding_M(home)


def exchange(
    device_MTK: jax.Array, everywhere: Callable[[], jax.Array], wire: Wire, most: int
) -> tuple[Exchange, jax.Array]:
    """Plans an exchange from where the assignments of all devices have to go; without talk.

    Args:
      device_MTK: int32 coordinate on the wire's axis of each assignment's expert, -1 = nowhere; of
        each device on that axis.
      everywhere: makes the same at each place on the other axes over which experts are split,
        [P, M, T, K].
      most: the largest number of a token's assignments that one device can have.

    Returns:
      The hop, and bool [X, K]: which assignments of the X tokens came here.
    """
    me = jax.lax.axis_index(wire.axis)
    size, num_tokens, top_k = device_MTK.shape
    device_M, device_TK = jnp.arange(size, dtype=jnp.int32), device_MTK[me]

    # This side: rows out are (device, token) pairs; single rows are assignments, by device.
    at_TKM = device_TK[:, :, None] == device_M[None, None]
    goes_MT = at_TKM.any(axis=1).T
    token_R = indices_of_true(goes_MT, size=num_tokens * min(top_k, size)) % num_tokens
    sent_MT = jnp.cumsum(goes_MT.reshape(-1), dtype=jnp.int32).reshape(goes_MT.shape) - 1
    away_TK = device_TK < 0
    sum_position_TK = jnp.take_along_axis(sent_MT.T, jnp.maximum(device_TK, 0), axis=1)
    sum_position_TK = jnp.where(first_of(device_TK), sum_position_TK, token_R.size)
    by_device_N = jnp.where(away_TK, size, device_TK).reshape(-1)
    assignment_N = sorting_lib.stable_order(by_device_N, num_keys=size + 1)
    place_N = jnp.zeros_like(assignment_N)
    place_N = place_N.at[assignment_N].set(jnp.arange(place_N.size, dtype=jnp.int32))

    # Far side: the same from where everybody's tokens go.
    here_XK = (device_MTK == me).reshape(-1, top_k)
    arrives_X = here_XK.any(axis=1)

    def count() -> jax.Array:
        """Rows of tokens and of assignments, [2, P, M, M]."""
        at_PMTKM = everywhere()[..., None] == device_M[None, None, None, None]
        tokens_PMM = at_PMTKM.any(axis=3).sum(axis=2, dtype=jnp.int32)
        return jnp.stack([tokens_PMM, at_PMTKM.sum(axis=(2, 3), dtype=jnp.int32)])

    most_tokens_MM, most_assignments_MM = wire.agreed(count, 2)
    hop = Exchange(
        wire=wire,
        token_R=token_R,
        arrival_X=jnp.cumsum(arrives_X, dtype=jnp.int32) - 1,
        arrived_X=indices_of_true(arrives_X, size=arrives_X.size),
        assignment_N=assignment_N,
        home_position_TK=jnp.where(away_TK, place_N.size, place_N.reshape(device_TK.shape)),
        sum_position_TK=sum_position_TK,
        arrived_assignment_A=indices_of_true(here_XK, size=arrives_X.size * min(top_k, most)),
        rank_XK=(jnp.cumsum(here_XK.reshape(-1), dtype=jnp.int32) - 1).reshape(here_XK.shape),
        tokens=Pairs(
            goes_MT.sum(1, dtype=jnp.int32),
            arrives_X.reshape(size, -1).sum(1, dtype=jnp.int32),
            most_tokens_MM,
            limit=num_tokens,
        ),
        assignments=Pairs(
            at_TKM.sum((0, 1), dtype=jnp.int32),
            here_XK.reshape(size, -1).sum(1, dtype=jnp.int32),
            most_assignments_MM,
            limit=num_tokens * min(top_k, most),
        ),
    )
    return hop, here_XK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gather:
    """A hop that shows every token to every device and sums on the way back.

    Attributes:
      axis: of the mesh.
      token_T, token_X: 0, 1, ...: rows lie where their tokens do.
      assignment_TK, assignment_XK: 0, 1, ... likewise.
      tokens_M, assignments_M: how many of each device's have an expert; the rows of the others
        travel too, as padding.
    """

    axis: Axis = dataclasses.field(metadata={"static": True})
    token_T: Leaf
    token_X: Leaf
    assignment_TK: Leaf
    assignment_XK: Leaf
    tokens_M: Leaf
    assignments_M: Leaf

    def tokens_out(self, rows_ND: jax.Array, row_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Exchange.tokens_out`."""
        return jax.lax.all_gather(rows_ND[row_T], self.axis, tiled=True), self.token_X

    def sums_home(
        self, rows_ND: jax.Array, row_XK: jax.Array, dtype: jax.typing.DTypeLike
    ) -> tuple[jax.Array, jax.Array]:
        """As `Exchange.sums_home`; devices without an expert of the token add zeros."""
        sum_XD = sorting_lib.sum_rows(rows_ND, row_XK).astype(dtype)
        beyond_TK = jnp.full_like(self.assignment_TK, self.token_T.size)
        position_TK = beyond_TK.at[:, 0].set(self.token_T)
        return jax.lax.psum_scatter(sum_XD, self.axis, tiled=True), position_TK

    def assignments_out(self, rows_ND: jax.Array, row_TK: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Exchange.assignments_out`."""
        sent_ND = rows_ND[row_TK.reshape(-1)]
        return jax.lax.all_gather(sent_ND, self.axis, tiled=True), self.assignment_XK

    def assignments_home(
        self, rows_ND: jax.Array, row_XK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As `Exchange.assignments_home`: one device has the row, the others add zeros."""
        each_ND = sorting_lib.take_rows(rows_ND, row_XK.reshape(-1))
        return jax.lax.psum_scatter(each_ND, self.axis, tiled=True), self.assignment_TK

    def rows_out_M(self) -> jax.Array:
        """Every row goes everywhere, whatever the router says."""
        return jnp.full_like(self.tokens_M, self.tokens_M[jax.lax.axis_index(self.axis)])

    def rows_home_M(self, *, singly: bool) -> jax.Array:
        """Partial sums come back from everywhere, one for each token or for each assignment."""
        return self.assignments_M if singly else self.tokens_M

    def padding_M(self, *, singly: bool) -> jax.Array:
        """As `Exchange.padding_M`: rows of tokens and assignments that have no expert."""
        moved = self.token_T.size + (self.assignment_TK.size if singly else self.token_T.size)
        return moved - self.rows_out_M() - self.rows_home_M(singly=singly)


def gather(device_MTK: jax.Array, axis: Axis) -> tuple[Gather, jax.Array]:
    """As `exchange`, for the hop that gathers; there are no other axes."""
    size, num_tokens, top_k = device_MTK.shape
    here_XK = (device_MTK == jax.lax.axis_index(axis)).reshape(-1, top_k)
    token_T, token_X = (jnp.arange(n, dtype=jnp.int32) for n in (num_tokens, size * num_tokens))
    assignment_TK, assignment_XK = (
        jnp.arange(n * top_k, dtype=jnp.int32).reshape(n, top_k)
        for n in (num_tokens, size * num_tokens)
    )
    real_MTK = device_MTK >= 0
    tokens_M = real_MTK.any(axis=2).sum(axis=1, dtype=jnp.int32)
    counts = (tokens_M, real_MTK.sum(axis=(1, 2), dtype=jnp.int32))
    return Gather(axis, token_T, token_X, assignment_TK, assignment_XK, *counts), here_XK


def everyone(value_TK: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """What all devices have of their tokens, in the order in which a path brings tokens together.

    One all-gather, in the order of the mesh, so that rings of neighbours cross between nodes once.

    Args:
      axes: of the path's hops, in the order of the way out.

    Returns:
      [..., T, K]: the devices of the last hop's axis first, those of the first hop's last.
    """
    sizes = tuple(jax.lax.axis_size(axis) for axis in axes)
    value_ZTK = jax.lax.all_gather(value_TK, joined(axes)).reshape(*sizes, *value_TK.shape)
    last_first = tuple(reversed(range(len(axes))))
    return value_ZTK.transpose(*last_first, *range(len(axes), value_ZTK.ndim))


def joined(axes: Sequence[Axis]) -> tuple[str, ...]:
    """Several axes as one, the first slowest."""
    return tuple(name for axis in axes for name in ((axis,) if isinstance(axis, str) else axis))


def indices_of_true(mask: jax.Array, *, size: int) -> jax.Array:
    """Flat indices of the true entries in order, int32 [size]; arbitrary valid ones beyond."""
    return jnp.nonzero(mask.reshape(-1), size=size, fill_value=0)[0].astype(jnp.int32)


def first_of(device_TK: jax.Array) -> jax.Array:
    """bool [T, K]: the first assignment of its token on its device; False where there is none."""
    top_k = device_TK.shape[1]
    earlier_KK = jnp.tril(jnp.ones((top_k, top_k), bool), -1)
    same_TKK = device_TK[:, :, None] == device_TK[:, None, :]
    return (device_TK >= 0) & ~(same_TKK & earlier_KK[None]).any(axis=2)
