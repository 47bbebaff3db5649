"""The model with tokens that stay with their experts (coherent dispatch), for inference.

ExFlow (arXiv 2401.08383): keys and values of all sequences of an expert group are on every device
of it, so that attention can be computed wherever a token is, and a token need not return between
layers. The whole stack runs inside one `shard_map`; per layer:

    1. keys and values of the tokens here (of latent attention: rows; kept.py), shared with all
       devices of the group
    2. attention, residual, norm and routing of the tokens here; slots and weights shared
    3. the residual row of each token, once to each distinct device of its experts
    4. experts; their rows (`exact`) or sums (`partial`) on to the device of the best expert,
       which got the residual row in 3: there the token is from now on. With top_k = 1 nothing moves

Over `tensor` devices hold the same tokens, each its part of the heads and of the columns of every
expert; what they add to a residual row is summed in 2 and where the row has arrived in 4.

After the last layer rows return to the devices that hold their sequences; logits are made there.
Layers without experts come first and are those of other dispatches: their tokens are at home.

The order of every sum is that of other dispatches; a row is computed in a tile of fixed size
(stay.py), with whatever rows. `exact` is bit-identical under every placement where a matmul gives
a row the same bits at every place of a tile (tested).

Axes: B sequences of the group, S positions at hand, X = B * S tokens of the group (of all its M
devices), C cached positions, R packed rows (room for X), W rows a tile, K top_k, D d_model, L
layers, P physical experts, V values of a query, Z values of what a token keeps.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from moe_jax import mesh as mesh_lib
from moe_jax.config import ModelConfig
from moe_jax.kernels import grouped_matmul
from moe_jax.model import attention, kept, moe, parameter, router, shared, transformer
from moe_jax.model import layers as layers_lib
from moe_jax.model.dispatch import onward, schemes, sorting, stay, wire
from moe_jax.model.dispatch.stay import Leg, Residence
from moe_jax.model.dispatch.table import Home, Table, experts_of, rule_position, slots_of
from moe_jax.pytree import Leaf

_TILE, _DECODE_TILE = 32, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apart:
    """What moved beside the rows of `Traffic`, [source, destination]; int32.

    Attributes:
      shared_LMM: rows of keys and values, or latent ones (`ModelConfig.kv_values` values each),
        and beside each its slots and weights (2 K values).
      shared_padding_LMM: those without a token; with `shared_LMM` all that are sent (by itself it
        may be below 0: `stay.shared_padding_M`).
      home_MM: rows of the last layer back to the devices that hold the sequences.
    """

    shared_LMM: Leaf
    shared_padding_LMM: Leaf
    home_MM: Leaf


def build_forward(
    config: ModelConfig, mesh: Mesh, implementation: str | None = None
) -> transformer.Forward:
    """As `transformer.build_forward`, `Apart` in the record, and a cache as `abstract_cache` says.

    Rows at positions without a token are 0 before the last norm; the router's losses are not
    computed.
    """
    stack = _build_stack(config, mesh, implementation)
    layers = layers_lib.DenseLayers(config, mesh)
    attention_at = transformer.attention_in_stack(config, mesh, "batch")
    dense_window_L, _ = transformer.windows_of_stacks(config)

    def forward(
        model: transformer.Transformer,
        token_BS: Int[Array, "B S"],
        table: Table,
        *,
        position_BS: Int[Array, "B S"] | None = None,
        real_BS: Bool[Array, "B S"] | None = None,
        cache: transformer.Cache | None = None,
        last_B: Int[Array, "B"] | None = None,
    ) -> transformer.Output:
        if position_BS is None:
            position_BS = jnp.broadcast_to(jnp.arange(token_BS.shape[1])[None], token_BS.shape)
        if real_BS is None:
            real_BS = jnp.ones(token_BS.shape, bool)
        x_BSD, embedding_VD = layers.embed(model, token_BS)
        of_stacks = transformer.stacks_of(cache)
        of_dense = of_stacks.dense
        if model.dense_blocks is not None:
            attend_in = attention_at(transformer.of_texts(config, position_BS, real_BS))
            x_BSD, of_dense = transformer.through_dense(
                layers, attend_in, model.dense_blocks, dense_window_L, x_BSD, of_dense
            )
        x_BSD, of_moe, record = stack(
            x_BSD, model.blocks, table, position_BS, real_BS, of_stacks.moe
        )
        cache = of_moe if of_dense is None else transformer.StackedCache(of_dense, of_moe)
        if last_B is not None:
            x_BSD = jnp.take_along_axis(x_BSD, last_B[:, None, None], axis=1)
        return transformer.Output(layers.logits(model, x_BSD, embedding_VD), cache, record)

    return forward


def abstract_cache(config: ModelConfig, batch: int, capacity: int, mesh: Mesh) -> transformer.Cache:
    """As `transformer.abstract_cache`; all devices of an expert group hold all its sequences in
    the layers with experts."""
    kind, dtype = kept.of_config(config), jnp.dtype(config.dtype)
    placed = jax.sharding.NamedSharding(mesh, kind.cache_spec)
    of_moe = kind.cache(
        *(
            jax.ShapeDtypeStruct((config.num_moe_layers, *shape), dtype, sharding=placed)
            for shape in kind.cache_shapes((batch, capacity))
        )
    )
    if not config.num_dense_layers:
        return of_moe
    usual = transformer.stacks_of(transformer.abstract_cache(config, batch, capacity, mesh))
    return transformer.StackedCache(usual.dense, of_moe)


def _build_stack(config: ModelConfig, mesh: Mesh, implementation: str | None):
    """All layers as a function of global arrays, in one `shard_map`."""
    tokens = mesh_lib.spec("batch")
    of_group, of_expert = PartitionSpec(mesh_lib.REPLICAS), PartitionSpec(None, mesh_lib.EXPERT)
    device = mesh.devices.flat[0]
    implementation = (
        implementation or config.kernels or grouped_matmul.default_implementation(device)
    )
    grouped_matmul.check_platform(implementation, device.platform)

    def stack(x_BSD, blocks, table, position_BS, real_BS, cache):
        leaves, tree = jax.tree.flatten(blocks)
        specs = [mesh_lib.spec(*names) for names in jax.tree.leaves(parameter.logical_axes(blocks))]
        of_cache = kept.of_config(config).cache_spec

        # Nothing is differentiated, and that the cache is the same on all devices of a group
        # follows from where rows come from, which types cannot know: hence no check of them.
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(tokens, specs, PartitionSpec(), of_group, of_group, of_cache),
            out_specs=(tokens, of_cache, PartitionSpec(None, mesh_lib.BATCH), of_expert, of_expert,
                       PartitionSpec(mesh_lib.EXPERT)),
            check_vma=False,
        )  # fmt: skip
        def on_devices(x_bSD, leaves, table, position_BS, real_BS, cache):
            blocks = jax.tree.unflatten(tree, leaves)
            num_physical = blocks.moe.gate_PDF.shape[1] * jax.lax.axis_size(mesh_lib.EXPERT)
            how = (wire.transport_of(mesh), wire.near_of(mesh), config.combine)
            setting = schemes.Setting(mesh_lib.EXPERT, num_physical, *how)
            reached_B = jnp.where(real_BS, position_BS, 0).max(axis=1)
            group = _Group(
                *(config, setting, implementation, position_BS, reached_B),
                decoding(x_bSD, cache),
            )
            x_bSD, cache, expert_LbSK, traffic, shared, home_MM = group.run(
                x_bSD, blocks, table, real_BS, cache
            )
            counted = jax.tree.map(
                lambda rows: jax.lax.psum(rows, mesh_lib.REPLICAS), (traffic, shared, home_MM)
            )
            return x_bSD, cache, expert_LbSK, *counted

        x_BSD, cache, expert_LBSK, traffic, shared, home_MM = on_devices(
            x_BSD, leaves, table, position_BS, real_BS, cache
        )
        apart = Apart(shared[0], shared[1], home_MM)
        record = moe.LayerRecord(expert_LBSK, traffic, load_balance=None, z=None, apart=apart)
        return x_BSD, cache, record

    def decoding(x_bSD, cache) -> bool:
        return cache is not None and x_bSD.shape[1] == 1

    return stack


class _Group:
    """The layers as one device of an expert group computes them. Inside `shard_map`."""

    def __init__(self, config, setting, implementation, position_BS, reached_B, decoding: bool):
        """`reached_B`: the last position of each sequence at hand."""
        self._config, self._setting, self._decoding = config, setting, decoding
        self._attention = kept.of_config(config, parts=jax.lax.axis_size(mesh_lib.TENSOR))
        self._implementation = implementation
        self._batch, self._sequence = position_BS.shape
        self._position_X = position_BS.reshape(-1).astype(jnp.int32)
        self._reached_X = jnp.repeat(reached_B, self._sequence)
        first_row = jax.lax.axis_index(mesh_lib.REPLICAS) * self._batch  # of the whole batch
        self._turn_X = rule_position(position_BS).reshape(-1).astype(jnp.int32) + first_row
        self._num_group = position_BS.size
        self._num_tokens = position_BS.size // setting.num_devices
        self._tile = _DECODE_TILE if decoding else _TILE
        self._num_rows = position_BS.size + self._tile
        self._wire = wire.Wire.of(
            *(setting.axes, setting.transport), num_tokens=self._num_tokens, near=setting.near
        )

    def run(self, x_bSD, blocks, table, real_BS, cache):
        """All layers, and home."""
        axes, num_tokens = self._setting.axes, self._num_tokens
        me = jax.lax.axis_index(axes)
        home_X = jnp.arange(self._num_group, dtype=jnp.int32) // num_tokens
        at_X = jnp.where(real_BS.reshape(-1), home_X, -1)
        here = Residence.of(at_X, axes, self._num_rows)
        own_TD = x_bSD.reshape(num_tokens, -1)
        x_RD = own_TD[jnp.clip(here.token_R - me * num_tokens, 0, num_tokens - 1)]

        layer = functools.partial(self._layer, me)
        _, window_L = transformer.windows_of_stacks(self._config)
        (x_RD, at_X), (cache, expert_LXK, traffic, shared) = jax.lax.scan(
            layer, (x_RD, at_X), (blocks, table, cache, window_L)
        )
        here = Residence.of(at_X, axes, self._num_rows)
        leg = Leg.of(at_X, home_X, self._wire, num_sent=self._num_group)
        home_TD = leg.move(
            lambda token_W: x_RD[here.rank_X[token_W]], num_tokens, like_ZZ=x_RD, tile=self._tile
        )
        mine = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=me * num_tokens, slice_size=num_tokens
        )
        x_TD = sorting.take_rows(home_TD, mine(leg.position_N))
        expert_LTK = mine(expert_LXK, axis=1)
        expert_LbSK = expert_LTK.reshape(len(expert_LTK), *x_bSD.shape[:2], -1)
        return x_TD.reshape(x_bSD.shape), cache, expert_LbSK, traffic, shared, leg.rows_M()[None]

    def _layer(self, me, carry, inputs):
        (x_RD, at_X), (block, table, cache, window) = carry, inputs
        block = parameter.gathered_inside(block)
        setting, top_k = self._setting, self._config.top_k
        here = Residence.of(at_X, setting.axes, self._num_rows)
        with jax.named_scope("attention"):
            query_RHV, row_RZ = self._project(x_RD, here, block)
            row_XZ = stay.share(row_RZ, here, setting.axes, self._num_tokens)
            keys, cache = self._remember(row_XZ, at_X, cache)
            x_RD, slot_RK, weight_RK = self._attend(
                x_RD, query_RHV, keys, here, block, table, window
            )
        with jax.named_scope("dispatch"):
            bits_RK = jax.lax.bitcast_convert_type(weight_RK, jnp.int32)
            routed_RZ = jnp.concatenate([slot_RK, bits_RK], axis=1)
            routed_XZ = stay.share(routed_RZ, here, setting.axes, self._num_tokens)
            slot_XK = jnp.where((at_X >= 0)[:, None], routed_XZ[:, :top_k], -1)
            weight_XK = jax.lax.bitcast_convert_type(routed_XZ[:, top_k:], jnp.float32)
            move_on = onward.Onward(setting, self._wire, self._tile, x_RD, here)
            x_RD, at_X, traffic = move_on(
                slot_XK,
                weight_XK,
                self._norm_of(block.moe_norm_D, block.moe_norm_bias_D),
                self._experts_of(block.moe),
                self._with_shared_of(block),
                self._added,
            )
        shared_M = stay.shared_M(here, setting.axes)
        padding_M = stay.shared_padding_M(here, self._num_tokens)
        padding_M = jnp.where(jnp.arange(padding_M.size) == me, 0, padding_M)
        expert_P = experts_of(table.logical_to_physical_ER, setting.num_physical)
        expert_XK = jnp.where(slot_XK < 0, -1, expert_P[slot_XK])
        return (x_RD, at_X), (cache, expert_XK, traffic, (shared_M[None], padding_M[None]))

    def _project(self, x_RD, here: Residence, block):
        """Queries of the tokens here, and the rows that they keep, packed."""
        tile, kind = self._tile, self._attention
        norm = self._norm_of(block.attention_norm_D, block.attention_norm_bias_D)

        def compute(i):
            start = i * tile
            x_WD = jax.lax.dynamic_slice_in_dim(x_RD, start, tile)
            token_W = jax.lax.dynamic_slice_in_dim(here.token_R, start, tile)
            position_W, reached_W = self._position_X[token_W], self._reached_X[token_W]
            query, row = kind.project(
                *(norm(x_WD)[None], block.attention, position_W[None]), reached_W[None]
            )
            return start, (query[0], row[0])

        rows = len(x_RD)
        buffers = (
            jnp.zeros((rows, *kind.query_shape), x_RD.dtype),
            jnp.zeros((rows, kind.width), x_RD.dtype),
        )
        return stay.fill(compute, stay.num_tiles(here.count, tile), buffers)

    def _remember(self, row_XZ, at_X, cache):
        """What is attended to, and the cache with the new rows."""
        kind = self._attention
        new = kind.arrays(row_XZ.reshape(self._batch, self._sequence, -1))
        if not self._decoding:
            if cache is not None:
                cache = cache.with_prefix(*new)
            return kind.cache(*new), cache
        position_B = jnp.where(at_X >= 0, self._position_X, -1)  # -1: written nowhere
        cache = cache.with_one(position_B, *new)
        return cache, cache

    def _attend(self, x_RD, query_RHV, keys, here: Residence, block, table, window):
        """Attention of the tokens here over their own sequences; then norm and router."""
        config, tile = self._config, self._tile
        home = Home(
            jax.lax.axis_index(self._setting.axes),
            jax.lax.axis_size(mesh_lib.DEVICE),
            self._setting.num_local,
        )
        all_tiles = stay.num_tiles(here.count, tile)
        tiles, place = self._tiles_by_sequence(here)
        if self._decoding:
            tiles, place = all_tiles, lambda i: (i * tile, None)
        cached = jax.tree.leaves(keys)[0].shape[1]

        def cut_at(start):
            return functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=tile
            )

        def attend(i):
            start, sequence = place(i)
            query_WHV, token_W = cut_at(start)(query_RHV), cut_at(start)(here.token_R)
            seen_1WC = attention.seen(self._position_X[token_W][None], cached, window)
            if self._decoding:  # a token a sequence
                own = jax.tree.map(lambda a: a[token_W], keys)
                of_tokens = (query_WHV[:, None], own, block.attention, seen_1WC.swapaxes(0, 1))
                return start, self._attention.attend(*of_tokens)[:, 0]
            own = jax.tree.map(
                lambda a: jax.lax.dynamic_slice_in_dim(a, sequence, slice_size=1), keys
            )
            of_tokens = (query_WHV[None], own, block.attention, seen_1WC)
            return start, self._attention.attend(*of_tokens)[0]

        added_RD = stay.fill(attend, tiles, jnp.zeros_like(x_RD))
        added_RD = stay.whole(added_RD, here, self._num_tokens)

        def route(i):
            cut = cut_at(i * tile)
            x_WD = self._added(cut(x_RD), cut(added_RD))
            normed_WD = self._norm_of(block.moe_norm_D, block.moe_norm_bias_D)(x_WD)
            with jax.named_scope("route"):
                routing = router.route(
                    normed_WD,
                    block.moe.router_DE[...],
                    jnp.ones(tile, bool),
                    router.scheme_of(config),
                    moe.correction(block.moe),
                    bias_E=parameter.value(block.moe.router_bias_E),
                )
            turn_W = self._turn_X[cut(here.token_R)]
            slot_WK = slots_of(routing.expert_TK, turn_W, table, home)
            return i * tile, (x_WD, slot_WK, routing.weight_TK)

        shape = (len(x_RD), config.top_k)
        buffers = (
            jnp.zeros_like(x_RD),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )
        return stay.fill(route, all_tiles, buffers)

    def _tiles_by_sequence(self, here: Residence):
        """Tiles of tokens of one sequence each: how many, and (first row, sequence) of a tile.

        Packed rows lie sequence by sequence. A tile that reaches into the next sequence computes
        nonsense there, which the next tile overwrites.
        """
        me = jax.lax.axis_index(self._setting.axes)
        count_B = (here.at_X.reshape(self._batch, -1) == me).sum(axis=1, dtype=jnp.int32)
        row_B = wire.exclusive_cumsum(count_B)
        tiles_B = stay.num_tiles(count_B, self._tile)
        end_B = jnp.cumsum(tiles_B, dtype=jnp.int32)

        def place(i):
            sequence = (end_B <= i).sum(dtype=jnp.int32)
            number = i - (end_B - tiles_B)[sequence]
            return row_B[sequence] + number * self._tile, sequence

        return end_B[-1], place

    def _norm_of(
        self, scale_D: nnx.Param, bias_D: nnx.Param | None
    ) -> Callable[[jax.Array], jax.Array]:
        """[N, D] -> [N, D]"""
        norm = (scale_D[...], parameter.value(bias_D), self._config.norm_eps)
        return lambda x_ND: layers_lib.norm(x_ND[None], *norm)[0]

    def _added(self, x_ND: jax.Array, y_ND: jax.Array) -> jax.Array:
        return x_ND + layers_lib.times(self._config.residual_scale, y_ND)

    def _experts_of(self, weights: moe.MoE) -> schemes.ExpertsFn:
        def experts_fn(rows_AD, group_sizes_e):
            return moe.compute_experts(
                rows_AD,
                moe.experts_of(weights, rows_AD.dtype).map(moe.bias_once),
                group_sizes_e,
                activation=self._config.activation,
                implementation=self._implementation,
            )

        return experts_fn

    def _with_shared_of(
        self, block: transformer.Block
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Of residual rows [N, D] and what their experts say: that with the shared expert's."""
        expert = block.moe.shared
        norm = self._norm_of(block.moe_norm_D, block.moe_norm_bias_D)

        def with_shared(x_ND, y_ND):
            if expert is None:
                return y_ND
            cast = jax.tree.map(lambda a: a.astype(x_ND.dtype), expert)
            return y_ND + shared.compute(norm(x_ND), cast)

        return with_shared
