"""The MoE layer: route (logical), dispatch (inside one `shard_map`), experts, combine.

Axes: B batch, S sequence, T = B * S tokens, D d_model, F d_ff, E experts, P physical experts,
K top_k, M devices on the expert axis, A rows computed on one device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax import mesh as mesh_lib
from moe_jax.kernels import grouped_matmul
from moe_jax.model import parameter, router, shared
from moe_jax.model.dispatch import capacity as capacity_lib
from moe_jax.model.dispatch import chunks, schemes, wire
from moe_jax.model.dispatch.table import Home, slots_of
from moe_jax.model.dispatch.traffic import Traffic
from moe_jax.pytree import Leaf

# of gate, up and down, and of their biases
EXPERT_AXES = (
    *(("expert", "embed", "mlp"), ("expert", "embed", "mlp"), ("expert", "mlp", "embed")),
    *(("expert", "mlp"), ("expert", "mlp"), ("expert", "embed")),
)
MATRICES = ("gate_PDF", "up_PDF", "down_PFD")
# of matrices that are stored transposed, see infer/prepared.py
TRANSPOSED_AXES = tuple((names[0], *names[:0:-1]) for names in EXPERT_AXES[:3]) + EXPERT_AXES[3:]


class MoE(nnx.Module):
    """Router [D, E] (logical) and the experts' gate and up [P, D, F] and down [P, F, D].

    `shared` is the expert of all tokens, or None; so are biases [E], [P, F], [P, F] and [P, D].
    `correction_E` moves the choice of experts (see router.py), or is None. Without a gradient and
    without decay training leaves it as it is.
    """

    def __init__(
        self,
        key: jax.Array,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        d_ff_shared: int = 0,
        shared_gate: bool = False,
        correction: bool = False,
        router_bias: bool = False,
        expert_bias: bool = False,
    ):
        r, g, u, d = jax.random.split(key, 4)
        gate, up, down, *of_biases = EXPERT_AXES
        self.router_DE = parameter.normal(r, ("embed", "router"), (d_model, num_experts), d_model)
        self.correction_E = parameter.zeros(("router",), (num_experts,)) if correction else None
        self.gate_PDF = parameter.normal(g, gate, (num_experts, d_model, d_ff), d_model)
        self.up_PDF = parameter.normal(u, up, (num_experts, d_model, d_ff), d_model)
        self.down_PFD = parameter.normal(d, down, (num_experts, d_ff, d_model), d_ff)
        self.shared = (
            shared.SharedExpert(
                jax.random.fold_in(key, 0),
                d_model=d_model,
                d_ff=d_ff_shared,
                has_gate=shared_gate,
            )
            if d_ff_shared
            else None
        )
        self.router_bias_E = parameter.zeros(("router",), (num_experts,)) if router_bias else None
        widths = (d_ff, d_ff, d_model)
        self.gate_bias_PF, self.up_bias_PF, self.down_bias_PD = (
            parameter.zeros(axes, (num_experts, width)) if expert_bias else None
            for axes, width in zip(of_biases, widths, strict=True)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a layer as they are computed with.

    Attributes:
      matrices: gate, up and down.
      biases: theirs in float32, or None.
      layer: which of all layers, where the arrays have those in front, [L, P, ...]; int32 scalar.
        None = the arrays are those of this layer alone.
      transposed: matrices are [P, F, D], [P, F, D] and [P, D, F].
    """

    matrices: tuple[Leaf, ...]
    biases: tuple[Leaf | None, ...] = (None, None, None)
    layer: Leaf | None = None
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    def map(self, change: Callable[[Any, tuple[str, ...]], Any]) -> "Experts":
        """Each array that is there changed, given the names of its dimensions."""
        names = TRANSPOSED_AXES if self.transposed else EXPERT_AXES
        if self.layer is not None:
            names = tuple(("layer", *of) for of in names)
        arrays = [
            None if array is None else change(array, of)
            for array, of in zip((*self.matrices, *self.biases), names, strict=True)
        ]
        return dataclasses.replace(self, matrices=tuple(arrays[:3]), biases=tuple(arrays[3:]))


def experts_of(weights: MoE, dtype: Any) -> Experts:
    """Those of one layer, or of all."""
    matrices = (getattr(weights, name) for name in MATRICES)
    biases = (weights.gate_bias_PF, weights.up_bias_PF, weights.down_bias_PD)
    return Experts(
        tuple(param[...].astype(dtype) for param in matrices),
        tuple(map(parameter.value, biases)),
        transposed=is_transposed(weights),
    )


def is_transposed(weights: MoE) -> bool:
    """Whether the matrices are stored [P, F, D], [P, F, D] and [P, D, F]."""
    return tuple(weights.gate_PDF.get_metadata()["axes"]) == TRANSPOSED_AXES[0]


def experts_in_place(weights: MoE, mesh: Mesh, dtype: Any) -> Experts | None:
    """Those of all layers, for a loop over layers that makes no copy of any layer's.

    For forward passes alone: a gradient would have the size of all layers in each of them. None
    where a layer's have to be gathered or cast, which is a copy already.
    """
    as_stored = weights.gate_PDF[...].dtype == dtype
    gathers = mesh_lib.size(mesh, mesh_lib.FSDP) > 1
    return experts_of(weights, dtype) if as_stored and not gathers else None


def bias_once(weight: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """For `Experts.map`: what experts add to whole sums, their last bias, by one of the devices of
    `tensor` alone."""
    is_last = names[-2:] == EXPERT_AXES[-1]
    return mesh_lib.added_once(weight, mesh_lib.TENSOR) if is_last else weight


def compute_experts(
    rows_AD: jax.Array, experts: Experts, group_sizes_e: jax.Array, **how: Any
) -> jax.Array:
    """The rows of the experts here.

    Args:
      how: activation, implementation and pre-activations of `grouped_ffn`.
    """
    if experts.layer is not None:
        how["first_group"] = experts.layer * group_sizes_e.shape[0]
        experts = experts.map(lambda a, _: a.reshape(-1, *a.shape[2:]))
    gate_bias_eF, up_bias_eF, down_bias_eD = experts.biases
    with jax.named_scope("experts"):
        return grouped_matmul.grouped_ffn(
            *(rows_AD, *experts.matrices, group_sizes_e),
            bias_gate_GF=gate_bias_eF,
            bias_up_GF=up_bias_eF,
            bias_down_GD=down_bias_eD,
            transpose_w=experts.transposed,
            **how,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What a MoE layer reports; XLA drops what nobody reads.

    Attributes:
      expert_BSK: int32 logical ids, descending weight; -1 at positions without a token.
      traffic: rows moved and computed.
      load_balance, z: the router's losses, scalars; None where they are not computed.
      home_BS: int32 the device that held each token here, where that is not its sequence's home.
      apart: what moved beside `traffic`, see coherent.py; None for other dispatches.
    """

    expert_BSK: Leaf
    traffic: Traffic
    load_balance: Leaf
    z: Leaf
    home_BS: Leaf | None = None
    apart: Leaf | None = None


def idle_record(shape: tuple[int, ...], num_slots: int, devices: int) -> LayerRecord:
    """Of one layer that routes nothing, with the axis of layers in front.

    Args:
      shape: B, S, K.
      num_slots: P.
      devices: M.
    """
    pairs_LMM = jnp.zeros((1, devices, devices), jnp.int32)
    traffic = Traffic(
        *(pairs_LMM, pairs_LMM, pairs_LMM, pairs_LMM),
        computed_P=jnp.zeros((1, num_slots), jnp.int32),
        dropped_ME=jnp.zeros((1, devices, num_slots), jnp.int32),
    )
    expert_LBSK = jnp.full((1, *shape), -1, jnp.int32)
    return LayerRecord(expert_LBSK, traffic, load_balance=jnp.zeros(1), z=jnp.zeros(1))


MoELayer = Callable[..., tuple[jax.Array, LayerRecord]]


def build(mesh: Mesh, *, scheme: router.Scheme, **how: Any) -> MoELayer:
    """Chooses routing, dispatch and kernels once.

    Args:
      scheme: how tokens choose.
      how: rows travel and are computed: the arguments of `build_dispatch`.

    Returns:
      `layer(x_BSD, weights, turn_BS, real_BS, table, experts=None) -> (y_BSD, LayerRecord)`; turns
      are table.py's `rule_position` of the tokens; experts are the weights' own by default.
    """
    compute = build_dispatch(mesh, **how)
    by_token = mesh_lib.spec("batch", None)
    choose = jax.shard_map(
        router.chooser(scheme),
        mesh=mesh,
        in_specs=(by_token, PartitionSpec()),
        out_specs=(by_token, by_token),
    )

    def layer(x_BSD, weights, turn_BS, real_BS, table, experts=None):
        batch, sequence, width = x_BSD.shape
        x_TD = x_BSD.reshape(-1, width)
        router_DE = mesh_lib.gather(weights.router_DE[...], mesh, "embed", "router")
        with jax.named_scope("route"):
            real_T = real_BS.reshape(-1)
            bias_E = parameter.value(weights.router_bias_E)
            how = (scheme, correction(weights), choose, bias_E)
            routing = router.route(x_TD, router_DE, real_T, *how)
        y_TD, traffic = compute(
            x_TD,
            routing.expert_TK,
            routing.weight_TK,
            table,
            experts or experts_of(weights, x_BSD.dtype),
            position_T=turn_BS.reshape(-1),
        )
        if weights.shared is not None:  # where the token is: its row does not travel
            with jax.named_scope("shared_expert"):
                whole = parameter.gathered(weights.shared, mesh, x_TD.dtype)
                y_TD = y_TD + shared.compute(x_TD, whole)
        expert_BSK = routing.expert_TK.reshape(batch, sequence, scheme.top_k)
        record = LayerRecord(expert_BSK, traffic, routing.load_balance, routing.z)
        return y_TD.reshape(x_BSD.shape), record

    return layer


def correction(weights: MoE) -> jax.Array | None:
    """What is added to the scores of experts for the choice, [E]."""
    return None if weights.correction_E is None else weights.correction_E[...]


def build_dispatch(
    mesh: Mesh,
    *,
    dispatch: str,
    combine: str,
    capacity_factor: float = 0.0,
    overlap_degree: int = 1,
    wire_dtype: str = "",
    activation: str = "swiglu",
    implementation: str | None = None,
    pre_activations: str = "recompute",
) -> Callable[..., tuple[jax.Array, Traffic]]:
    """The part of the layer that knows where experts live, as a function of global arrays.

    Args:
      dispatch: a name in `schemes.SCHEMES`.
      combine: one of `schemes.COMBINES`.
      capacity_factor: see dispatch/capacity.py; 0 = nothing is dropped.
      overlap_degree: see dispatch/chunks.py; 1 = all tokens of a device at once.
      wire_dtype: of rows on their way to the experts: a name in quantise.DTYPES, or "" = x's.
      activation: of experts: a name in kernels/activation.py.
      implementation: of the grouped matmul; None = by platform.
      pre_activations: of experts, as in `grouped_matmul`.

    Raises:
      Refused: the implementation does not run on the mesh, or stores nothing.

    Returns:
      `compute(x_TD, expert_TK, weight_TK, table, experts, position_T=None) -> (y_TD, Traffic)`; T
      is a multiple of the devices, P of the expert axis; `experts` are `Experts`; positions are
      what copies of experts take turns by, by default the index.
    """
    scheme = schemes.SCHEMES[dispatch]
    # The mesh decides, not the machine: programs for a pod are also compiled elsewhere.
    device = mesh.devices.flat[0]
    transport, near = wire.transport_of(mesh), wire.near_of(mesh)
    axes = mesh_lib.EXPERT
    implementation = implementation or grouped_matmul.default_implementation(device)
    grouped_matmul.check_platform(implementation, device.platform)
    if pre_activations == "store":
        grouped_matmul.check_storing(implementation, "train.pre_activations")
    vary_over = lambda axis: functools.partial(jax.lax.pcast, axis_name=axis, to="varying")  # noqa: E731
    vary_over_data, vary_over_tensor = vary_over(mesh_lib.DATA), vary_over(mesh_lib.TENSOR)
    replicas = mesh_lib.REPLICAS

    def on_device(x_TD, expert_TK, weight_TK, position_T, table, experts):
        # Weights are equal on all replicas, rows are not. Saying so here makes this the line at
        # which the gradients of the weights are summed over `data`; over `fsdp` the gradient of a
        # gather is a reduce-scatter. Each device of `tensor` computes a part of every row's result
        # from its columns of the experts, so there the gradients of tokens and weights are summed.
        experts = experts.map(on_replica)
        x_TD, weight_TK = vary_over_tensor(x_TD), vary_over_tensor(weight_TK)
        table = jax.tree.map(vary_over(mesh_lib.BATCH), table)

        def experts_fn(rows_AD, group_sizes_e):
            how = {"activation": activation, "implementation": implementation}
            how["pre_activations"] = pre_activations
            return compute_experts(rows_AD, experts, group_sizes_e, **how)

        num_devices, num_experts = jax.lax.axis_size(axes), table.num_replicas_E.shape[0]
        capacity = capacity_lib.of_factor(
            capacity_factor, num_assignments=expert_TK.size * num_devices, num_experts=num_experts
        )
        setting = schemes.Setting(
            axes,
            num_physical=experts.matrices[0].shape[-3] * num_devices,
            transport=transport,
            near=near,
            combine=combine,
            capacity=capacity if capacity_factor > 0 else None,
            wire_dtype=wire_dtype,
        )
        with jax.named_scope("dispatch"):
            expert_TK, dropped_E = capacity_lib.keep_within(
                expert_TK, capacity, num_experts=num_experts, axis=axes
            )
            way = chunks.in_chunks(
                lambda x_TD, slot_TK, weight_TK: scheme(
                    x_TD, slot_TK, weight_TK, experts_fn, setting
                ),
                overlap_degree,
            )
            home = Home(
                jax.lax.axis_index(axes), jax.lax.axis_size(mesh_lib.DEVICE), setting.num_local
            )
            y_TD, traffic = way(x_TD, slots_of(expert_TK, position_T, table, home), weight_TK)
        # At home, T rows, not A: and so after the sum over the experts of a token.
        y_TD = jax.lax.psum(y_TD, mesh_lib.TENSOR)
        traffic = dataclasses.replace(traffic, dropped_ME=dropped_E[None])
        return y_TD, jax.tree.map(lambda rows: jax.lax.psum(rows, replicas), traffic)

    def on_replica(weight, names):
        weight = vary_over_data(weight)
        weight = bias_once(weight, names)
        if "embed" not in names:
            return jax.lax.pcast(weight, axis_name=mesh_lib.FSDP, to="varying")
        return mesh_lib.gather_inside(weight, *names)

    tokens = mesh_lib.spec("batch", None)

    def compute(x_TD, expert_TK, weight_TK, table, experts, position_T=None):
        if position_T is None:
            position_T = jnp.arange(len(x_TD), dtype=jnp.int32)
        specs = experts.map(lambda _, names: mesh_lib.spec(*names))
        if experts.layer is not None:
            specs = dataclasses.replace(specs, layer=PartitionSpec())
        sharded = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, mesh_lib.spec("batch"), PartitionSpec(), specs),
            out_specs=(tokens, PartitionSpec(mesh_lib.EXPERT)),
        )
        return sharded(x_TD, expert_TK, weight_TK, position_T, table, experts)

    return compute
