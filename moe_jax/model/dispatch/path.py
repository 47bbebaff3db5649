"""The whole way of a layer's rows: hops to the devices of the experts, there a sort by expert.

`spread` takes rows of tokens along a path and gives one row per assignment, sorted by expert;
`collect` and `collect_sums` take rows of assignments back. Each is linear, and differentiated by
its transpose, a movement of the same kind in the other direction:

    spread  <->  sum over k of collect      `exact`: sums are made at home, in rank order
    spread  <->  collect_sums               `partial`, `reproducible`: sums are made on the way

`exact` moves a row for each assignment home, in both derivatives; its sums have one order whatever
the placement. `partial` moves one row for each device and sums where experts happen to live.
`reproducible` does that with integers (grid.py), whose sums have no order: all devices of the path
first agree on an exponent for each token, by one maximum over one integer a token.

Axes: T tokens at hand, K top_k, A rows computed here, e experts here, X tokens at the end of the
path (of all devices that it joins), D d_model.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.model.dispatch import grid, quantise
from moe_jax.model.dispatch import hop as hop_lib
from moe_jax.model.dispatch import sorting as sorting_lib
from moe_jax.model.dispatch.hop import Exchange, Gather
from moe_jax.pytree import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Path:
    """Hops in the order of the way out, and the sort at its end.

    Attributes:
      hops: none where all experts are at hand.
      sorting: of the X tokens at the end.
      assignment_TK: 0, 1, ...: the assignments at hand.
    """

    hops: tuple[Exchange | Gather, ...]
    sorting: sorting_lib.Sorting
    assignment_TK: Leaf


def spread(
    path: Path, x_TD: Float[Array, "T D"], *, combine: str, wire_dtype: str = ""
) -> Float[Array, "A D"]:
    """Rows of tokens to their experts, one for each assignment; zeros beyond the real rows.

    Args:
      combine: "exact", "partial" or "reproducible": how the gradients of a token's rows are summed.
      wire_dtype: of the rows on their way, see quantise.py; "" = that of the rows. Gradients come
        back as if nothing had been rounded, in the dtype of the rows.
    """
    return _spread(combine, wire_dtype if path.hops else "", path, x_TD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(combine: str, wire_dtype: str, path: Path, x_TD: jax.Array) -> jax.Array:
    rows_ND, row_T = x_TD, jnp.arange(len(x_TD), dtype=jnp.int32)
    if wire_dtype:
        rows_ND = quantise.pack(x_TD, wire_dtype)
    for hop in path.hops:
        rows_ND, row_T = hop.tokens_out(rows_ND, row_T)
    top_k = path.assignment_TK.shape[1]
    rows_AD = rows_ND[row_T[path.sorting.order_A // top_k]]
    if wire_dtype:
        rows_AD = quantise.unpack(rows_AD, wire_dtype, x_TD.dtype)
    return _real(rows_AD, path)


def _spread_fwd(combine, wire_dtype, path, x_TD):
    return _spread(combine, wire_dtype, path, x_TD), path


def _spread_bwd(combine, wire_dtype, path, g_AD):
    if combine == "exact":
        g_TD = sorting_lib.sum_in_rank_order(_home(path, g_AD))
    else:
        g_TD = _SUMS_HOME[combine](path, g_AD, g_AD.dtype)
    return sorting_lib.no_gradient(path), g_TD


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect(path: Path, y_AD: Float[Array, "A D"]) -> Float[Array, "T K D"]:
    """The row of every assignment back at its token; zeros for assignments of no expert."""
    return _home(path, y_AD)


def _collect_fwd(path, y_AD):
    return collect(path, y_AD), path


def _collect_bwd(path, g_TKD):
    rows_ND, row_TK = g_TKD.reshape(-1, g_TKD.shape[-1]), path.assignment_TK
    for hop in path.hops:
        rows_ND, row_TK = hop.assignments_out(rows_ND, row_TK)
    g_AD = _real(rows_ND[row_TK.reshape(-1)[path.sorting.order_A]], path)
    return sorting_lib.no_gradient(path), g_AD


collect.defvjp(_collect_fwd, _collect_bwd)


def collect_sums(
    path: Path, y_AD: Float[Array, "A D"], dtype: jax.typing.DTypeLike, *, combine: str
) -> Float[Array, "T D"]:
    """The sum of every token's rows, summed on each device, then on the near side of each hop.

    Args:
      y_AD: float32.
      dtype: of the result, and for "partial" of the rows on the wire.
      combine: "partial", or "reproducible": bits free of the placement, 32-bit rows on the wire.
    """
    return _collect_sums(combine, jnp.dtype(dtype), path, y_AD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _collect_sums(combine, dtype, path, y_AD):
    return _SUMS_HOME[combine](path, y_AD, dtype)


def _collect_sums_fwd(combine, dtype, path, y_AD):
    return _collect_sums(combine, dtype, path, y_AD), path


def _collect_sums_bwd(combine, dtype, path, g_TD):
    return sorting_lib.no_gradient(path), _spread(combine, "", path, g_TD).astype(jnp.float32)


_collect_sums.defvjp(_collect_sums_fwd, _collect_sums_bwd)


def assignments(path: Path, value_TK: Float[Array, "T K"]) -> Float[Array, " A"]:
    """A number of each assignment where it is computed, by an all-gather."""
    if path.hops:
        value_TK = hop_lib.everyone(value_TK, [hop.axis for hop in path.hops])
    return value_TK.reshape(-1)[path.sorting.order_A]


def _home(path: Path, y_AD: jax.Array) -> jax.Array:
    rows_ND, row_XK = y_AD, path.sorting.position_XK
    for hop in reversed(path.hops):
        rows_ND, row_XK = hop.assignments_home(rows_ND, row_XK)
    return sorting_lib.take_rows(rows_ND, row_XK)


def _sums_home(path: Path, y_AD: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    rows_ND, row_XK = y_AD, path.sorting.position_XK
    for hop in reversed(path.hops):
        rows_ND, row_XK = hop.sums_home(rows_ND, row_XK, dtype)
    return sorting_lib.sum_rows(rows_ND, row_XK).astype(dtype)


def _reproducible_sums_home(path: Path, y_AD: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """As `_sums_home`; the same bits wherever the terms are."""
    num_tokens, top_k = path.assignment_TK.shape
    here_A = grid.exponent_of(y_AD)
    here_XK = jnp.take(here_A, path.sorting.position_XK, mode="fill", fill_value=0)
    exponent_X, own = here_XK.max(axis=1), jnp.int32(0)
    size = num_tokens
    if path.hops:  # the X tokens are in the same order on all devices that a path joins
        exponent_X = jax.lax.pmax(exponent_X, hop_lib.joined([hop.axis for hop in path.hops]))
    for hop in path.hops:
        own = own + jax.lax.axis_index(hop.axis) * size
        size = size * jax.lax.axis_size(hop.axis)
    exponent_A = exponent_X[path.sorting.order_A // top_k]
    whole_AD = grid.to_grid(y_AD, exponent_A, num_terms=top_k)
    sum_TD = _sums_home(path, whole_AD, jnp.int32)
    exponent_T = jax.lax.dynamic_slice_in_dim(exponent_X, own, num_tokens)
    return grid.from_grid(sum_TD, exponent_T, num_terms=top_k).astype(dtype)


_SUMS_HOME = {"partial": _sums_home, "reproducible": _reproducible_sums_home}


def _real(rows_AD: jax.Array, path: Path) -> jax.Array:
    real_A = jnp.arange(rows_AD.shape[0]) < path.sorting.group_sizes_e.sum()
    return jnp.where(real_A[:, None], rows_AD, jnp.zeros((), rows_AD.dtype))
