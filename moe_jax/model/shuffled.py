"""`shuffled`: attention split by heads over the expert axes, rows put where their experts will be.

Where the devices that share the experts also share the heads, the sums of attention have to be
reduce-scattered anyway, and that may put each row on any device, T rows on each. A row goes where
its experts of the layer before were (dispatch/homes.py): a plan that keeps the experts of
consecutive layers together then saves rows. What follows is an `exchange` from that home; an
all-gather brings the rows together again for the next attention. The gather and the scatter move
the same rows whatever the placement, as split attention always does; they are not in `Traffic`.

Over `tensor` heads are split further: each device of an expert axis has its heads, each of
`tensor` a part of these, and a part of each expert's columns as in other dispatches.

Axes: B sequences and S positions of one group (the devices that share experts), X = B * S its
tokens, M its devices, T = X / M rows here, N rows of all groups, D d_model, K top_k, H query
heads, G key/value heads, C cached positions.

Latent attention is split by its query heads; every device makes the latents of all tokens of its
group, which are few numbers, and keeps them. Dense layers in front have attention that is split
over sequences, as in the other dispatches: rows are at home there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.model import attention, latent, parameter
from moe_jax.model import layers as layers_lib
from moe_jax.model.attention import LayerCache
from moe_jax.model.dispatch import homes as homes_lib
from moe_jax.model.dispatch.table import Table
from moe_jax.model.moe import LayerRecord, MoELayer
from moe_jax.pytree import Leaf

_GROUP = mesh_lib.REPLICAS  # axes over which groups differ
_HEADS = (*mesh_lib.EXPERT, mesh_lib.TENSOR)  # that heads are split over
_ROWS, _SEQUENCES = PartitionSpec(mesh_lib.BATCH), PartitionSpec(_GROUP)


def abstract_cache(
    config: ModelConfig, num_layers: int, batch: int, capacity: int, mesh: Mesh
) -> LayerCache | latent.LatentCache:
    """Shapes, dtypes and shardings for `capacity` positions of `batch` sequences in all layers.

    Each device has its heads of all sequences of the group. Of latent attention it has all their
    rows: the array has as many copies of each sequence as devices share it.
    """
    dtype = jnp.dtype(config.dtype)
    placed = NamedSharding(mesh, PartitionSpec(None, *_spec_of_cache(config)))
    if config.latent.kv_rank:
        devices = mesh_lib.size(mesh, mesh_lib.EXPERT)
        width = config.latent.kv_rank + config.latent.d_rope
        shape: tuple[int, ...] = (num_layers, batch * devices, capacity, width)
        return latent.LatentCache(jax.ShapeDtypeStruct(shape, dtype, sharding=placed))
    num_heads = max(config.num_kv_heads, mesh_lib.size(mesh, _HEADS))
    shape = (num_layers, batch, capacity, num_heads, config.d_head)
    array = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
    return LayerCache(array, array)


def _spec_of_cache(config: ModelConfig) -> PartitionSpec:
    return _ROWS if config.latent.kv_rank else PartitionSpec(_GROUP, None, _HEADS)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens, and which they are.

    Attributes:
      x_ND: the residual stream.
      token_N: int32 the token of each row, counted within its group.
      device_NK: int32 where its experts of the layer before were, best first; -1 = nowhere.
      real_N: False where there is no token.
    """

    x_ND: Leaf
    token_N: Leaf
    device_NK: Leaf
    real_N: Leaf


Norm = tuple[jax.Array, jax.Array | None]  # scale [D], and bias [D] of a layer norm


def layers(
    steps: "Steps",
    inputs: Any,
    x_BSD: Float[Array, "B S D"],
    position_BS: Int[Array, "B S"],
    turn_BS: Int[Array, "B S"],
    real_BS: Bool[Array, "B S"],
    again: Callable[[Any], Any],
) -> tuple[jax.Array, LayerCache | latent.LatentCache | None, LayerRecord]:
    """All layers of a model, by one `lax.scan`.

    Args:
      inputs: blocks, tables, caches and windows (or None), each stacked over layers.
      turn_BS: what copies of experts take turns by (dispatch/table.py).
      again: put around a layer: `jax.checkpoint`, or nothing.

    Returns:
      The residual stream, tokens in order; the caches; records with the home of every token.
    """
    shape = real_BS.shape

    def layer(rows, of_layer):
        block, table, cache, window = of_layer
        with jax.named_scope("attention"):
            norm = steps.norm(block.attention_norm_D, block.attention_norm_bias_D)
            of_sequences = (position_BS, real_BS, cache, window)
            rows, cache = steps.attend(rows, norm, block.attention, *of_sequences)
        x_BSD = rows.x_ND.reshape(*shape, -1)
        norm = steps.norm(block.moe_norm_D, block.moe_norm_bias_D)
        normed_BSD = steps.normed(x_BSD, norm)
        turn_N = steps.of_rows(turn_BS, rows.token_N)
        at_hand = (turn_N.reshape(shape), rows.real_N.reshape(shape))
        y_BSD, record = steps.moe(normed_BSD, block.moe, *at_hand, table)
        expert_NK = record.expert_BSK.reshape(rows.device_NK.shape)
        record = dataclasses.replace(
            record,
            expert_BSK=steps.in_order(expert_NK, rows.token_N).reshape(record.expert_BSK.shape),
            home_BS=steps.homes(rows.token_N).reshape(shape),
        )
        rows = dataclasses.replace(
            rows,
            x_ND=steps.added(x_BSD, y_BSD).reshape(rows.x_ND.shape),
            device_NK=steps.devices_of(expert_NK, table, len(block.moe.gate_PDF[...])),
        )
        return rows, (cache, record)

    rows, (cache, record) = jax.lax.scan(again(layer), steps.start(x_BSD, real_BS), inputs)
    return steps.in_order(rows.x_ND, rows.token_N).reshape(x_BSD.shape), cache, record


class Steps:
    """The parts of a layer, built once for a mesh."""

    def __init__(self, config: ModelConfig, mesh: Mesh, moe: MoELayer):
        self._mesh, self._groups = mesh, mesh_lib.size(mesh, _GROUP)
        self._devices = mesh_lib.size(mesh, mesh_lib.EXPERT)
        self._split = mesh_lib.size(mesh, _HEADS)
        self._num_kv_heads, self._top_k = config.num_kv_heads, config.top_k
        self._norm_eps, self._residual_scale = config.norm_eps, config.residual_scale
        self._cache = _spec_of_cache(config)
        self._attention: Any = latent if config.latent.kv_rank else attention
        self._setting = self._attention.setting_of(config)
        if not config.latent.kv_rank:
            self._setting = dataclasses.replace(self._setting, heads_over=_HEADS)
        self.moe = moe

    def norm(self, scale_D: Any, bias_D: Any) -> Norm:
        """Parameters of a norm, gathered over `fsdp`."""
        whole_D, whole_bias_D = parameter.gathered((scale_D, bias_D), self._mesh)
        return whole_D[...], parameter.value(whole_bias_D)

    def normed(self, x_BSD: jax.Array, norm: Norm) -> jax.Array:
        """Rows as attention and experts see them."""
        return layers_lib.norm(x_BSD, *norm, self._norm_eps)

    def added(self, x_ZZ: jax.Array, y_ZZ: jax.Array) -> jax.Array:
        """The residual stream with what attention or experts add to it."""
        return x_ZZ + layers_lib.times(self._residual_scale, y_ZZ)

    def start(self, x_BSD: Float[Array, "B S D"], real_BS: Bool[Array, "B S"]) -> Rows:
        """All rows at home: nothing is known of their experts."""
        num_rows = x_BSD.shape[0] * x_BSD.shape[1]
        token_N = jnp.arange(num_rows, dtype=jnp.int32) % (num_rows // self._groups)
        nowhere_NK = jnp.full((num_rows, self._top_k), -1, jnp.int32)
        rows = Rows(x_BSD.reshape(num_rows, -1), token_N, nowhere_NK, real_BS.reshape(-1))
        placed = NamedSharding(self._mesh, _ROWS)
        return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, placed), rows)

    def devices_of(self, expert_NK: jax.Array, table: Table, num_physical: int) -> jax.Array:
        """int32 [N, K]: the device of the first copy of each expert; -1 = nowhere."""
        slot_NK = table.logical_to_physical_ER[:, 0][expert_NK]
        return jnp.where(expert_NK < 0, -1, slot_NK // (num_physical // self._devices))

    def attend(
        self,
        rows: Rows,
        norm: Norm,
        weights: attention.Attention | latent.LatentAttention,
        position_BS: Int[Array, "B S"],
        real_BS: Bool[Array, "B S"],
        cache: LayerCache | latent.LatentCache | None,
        window: Int[Array, ""] | None,
    ) -> tuple[Rows, LayerCache | latent.LatentCache | None]:
        """Attention and its residual; each row then lies where its experts were.

        Args:
          norm: before attention.
          window: of the layer, see `attention.seen`.
        """
        num_local_kv = max(1, self._num_kv_heads // self._split)
        params = parameter.present(weights, self._attention.Heads)
        axes = {name: param.get_metadata()["axes"] for name, param in params.items()}

        def of_device(name, part):
            """The heads of this device; what is added once comes from one device."""
            me, size = jax.lax.axis_index(_HEADS), jax.lax.axis_size(_HEADS)
            part = _vary(mesh_lib.gather_inside(part, *axes[name]))
            if name == "output_bias_D":
                return mesh_lib.added_once(part, _HEADS)
            if "head" not in axes[name] or not _repeated(name):
                return part
            first, axis = me * self._num_kv_heads // size, axes[name].index("head")
            return jax.lax.dynamic_slice_in_dim(part, first, num_local_kv, axis=axis)

        def on_device(rows, norm, parts, position_BS, real_BS, cache, window):
            size = jax.lax.axis_size(mesh_lib.EXPERT)
            mine = {name: of_device(name, part) for name, part in parts.items()}
            heads = self._attention.Heads(**mine)
            x_XD, token_X, device_XK = _gathered((rows.x_ND, rows.token_N, rows.device_NK))
            position_X = _inverse(token_X)
            x_XD = _permuted(x_XD, position_X, token_X)
            x_BSD = x_XD.reshape(*position_BS.shape, -1)
            position_BS = _vary_over_devices(position_BS)
            normed_BSD = self.normed(x_BSD, jax.tree.map(_vary, norm))
            mixed_BSD, cache = self._attention.attend(
                *(normed_BSD, heads, position_BS, self._setting, cache, window)
            )

            home_X = homes_lib.balanced(device_XK[position_X], size)
            token_X = jnp.argsort(home_X, stable=True).astype(jnp.int32)
            position_X = _inverse(token_X)
            mixed_XD = _permuted(mixed_BSD.reshape(x_XD.shape), token_X, position_X)
            x_TD = _mine(_permuted(x_XD, token_X, position_X))
            mixed_TD = jax.lax.psum_scatter(mixed_XD, mesh_lib.EXPERT, tiled=True)
            mixed_TD = jax.lax.psum(mixed_TD, mesh_lib.TENSOR)
            x_TD = self.added(x_TD, mixed_TD)
            real_X = _vary_over_devices(real_BS).reshape(-1)[token_X]
            token_T, real_T = _mine(token_X), _mine(real_X)
            return Rows(x_TD, token_T, jnp.full_like(rows.device_NK, -1), real_T), cache

        everywhere = PartitionSpec()
        heads = {name: _spec_of(name, axes[name]) for name in params}
        step = jax.shard_map(
            on_device,
            mesh=self._mesh,
            in_specs=(_ROWS, everywhere, heads, _SEQUENCES, _SEQUENCES, self._cache, everywhere),
            out_specs=(_ROWS, self._cache),
        )
        cast = {name: param[...].astype(rows.x_ND.dtype) for name, param in params.items()}
        return step(rows, norm, cast, position_BS, real_BS, cache, window)

    def in_order(self, value_NK: jax.Array, token_N: jax.Array) -> jax.Array:
        """What belongs to rows, in the order of tokens, each at its sequence's home."""

        def on_device(value_TK, token_T):
            value_XK, token_X = _gathered((value_TK, token_T))
            return _mine(_permuted(value_XK, _inverse(token_X), token_X))

        return jax.shard_map(on_device, mesh=self._mesh, in_specs=(_ROWS, _ROWS), out_specs=_ROWS)(
            value_NK, token_N
        )

    def of_rows(self, value_BS: jax.Array, token_N: jax.Array) -> jax.Array:
        """What belongs to tokens, [N] in the order of rows."""

        def on_device(value_BS, token_T):
            return _vary_over_devices(value_BS).reshape(-1)[token_T]

        specs = (_SEQUENCES, _ROWS)
        return jax.shard_map(on_device, mesh=self._mesh, in_specs=specs, out_specs=_ROWS)(
            value_BS, token_N
        )

    def homes(self, token_N: jax.Array) -> jax.Array:
        """int32 [N]: the device that holds each token's row, tokens in order."""

        def on_device(token_T):
            token_X = jax.lax.all_gather(token_T, mesh_lib.EXPERT, tiled=True)
            return _mine(_inverse(token_X) // token_T.size)

        return jax.shard_map(on_device, mesh=self._mesh, in_specs=_ROWS, out_specs=_ROWS)(token_N)


def _repeated(name: str) -> bool:
    """Key/value heads may be fewer than devices: every device takes its own from all of them."""
    return name.startswith(("key_", "value_"))


def _spec_of(name: str, axes: tuple[str, ...]) -> PartitionSpec:
    """Of a parameter of attention, by its name in `Heads`: query heads are split."""
    heads = None if _repeated(name) else _HEADS
    return PartitionSpec(*(heads if axis == "head" else mesh_lib.spec(axis)[0] for axis in axes))


def _gathered(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.lax.all_gather(a, mesh_lib.EXPERT, tiled=True), tree)


def _mine(value_X: jax.Array) -> jax.Array:
    """This device's part of what all devices of the group hold alike."""
    size = len(value_X) // jax.lax.axis_size(mesh_lib.EXPERT)
    start = jax.lax.axis_index(mesh_lib.EXPERT) * size
    return jax.lax.dynamic_slice_in_dim(value_X, start, size)


def _inverse(order_X: jax.Array) -> jax.Array:
    place_X = jnp.arange(order_X.size, dtype=jnp.int32)
    return jnp.zeros_like(order_X).at[order_X].set(place_X)


@jax.custom_vjp
def _permuted(value_XD: jax.Array, index_X: jax.Array, inverse_X: jax.Array) -> jax.Array:
    """value_XD[index_X]; backward the same by the inverse, where a scatter would add."""
    return value_XD[index_X]


def _permuted_fwd(value_XD, index_X, inverse_X):
    return value_XD[index_X], inverse_X


def _permuted_bwd(inverse_X, g_XD):
    return g_XD[inverse_X], None, None


_permuted.defvjp(_permuted_fwd, _permuted_bwd)


def _vary(value: jax.Array) -> jax.Array:
    """Over all axes of the batch; over some of them a part of a parameter varies already."""
    varying = jax.typeof(value).manual_axis_type.varying
    missing = tuple(axis for axis in mesh_lib.BATCH if axis not in varying)
    return jax.lax.pcast(value, axis_name=missing, to="varying") if missing else value


def _vary_over_devices(value: jax.Array) -> jax.Array:
    return jax.lax.pcast(value, axis_name=mesh_lib.EXPERT, to="varying")
