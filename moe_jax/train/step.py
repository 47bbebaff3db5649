"""One training step as a pure function of the state, the batch and the placement table."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.config import Config
from moe_jax.model import parameter, transformer
from moe_jax.model.dispatch.table import Table
from moe_jax.model.dispatch.traffic import Traffic
from moe_jax.pytree import Leaf
from moe_jax.train import optimizer as optimizer_lib
from moe_jax.train import replicas, spikes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and changes.

    Attributes:
      model: parameters, experts in physical order.
      opt_state: optax state, shaped like the parameters.
      key: uint32 PRNG key data; the run's randomness beyond initialisation starts from it.
      bad_steps, bad_in_row: int32 counts of steps that changed nothing.
      recent: losses of the last good steps.
    """

    model: transformer.Transformer
    opt_state: Any
    key: Leaf
    bad_steps: Leaf
    bad_in_row: Leaf
    recent: spikes.Recent


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Scalars of one step, and its traffic by layer [L, ...]. `loss` is cross-entropy in nats.

    `loss_limit`: a loss above it makes a step bad. `expert_LBSK`: where the config asks for new
    plans, the logical experts of the batch, split over it; else None.
    """

    loss: Leaf
    loss_limit: Leaf
    load_balance: Leaf
    z: Leaf
    grad_norm: Leaf
    bad_steps: Leaf
    bad_in_row: Leaf
    traffic: Traffic
    expert_LBSK: Leaf | None = None


def abstract_state(config: Config, mesh: Mesh, num_slots: int | None = None) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array.

    Args:
      num_slots: P, physical experts of a layer; None: one for each expert.
    """
    optimizer = optimizer_lib.make(config.optimizer, config.train.num_steps)
    shapes = jax.eval_shape(lambda: _initial(config, optimizer))
    shapes = parameter.with_slots(shapes, num_slots or config.model.num_experts)
    axes = jax.tree.leaves(parameter.logical_axes(shapes))
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(
        tree,
        [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=mesh_lib.sharding(mesh, *names))
            for leaf, names in zip(leaves, axes, strict=True)
        ],
    )


def initial_state(config: Config, mesh: Mesh) -> TrainState:
    """A fresh state, made where it lives, experts in logical order."""
    optimizer = optimizer_lib.make(config.optimizer, config.train.num_steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    # The same random bits whatever the mesh.
    return jax.jit(lambda: _initial(config, optimizer), out_shardings=shardings)()


def around(config: Config, shardings: TrainState, model: transformer.Transformer) -> TrainState:
    """A fresh state of parameters that were made elsewhere; they are not copied.

    Args:
      shardings: of the state.
    """
    optimizer = optimizer_lib.make(config.optimizer, config.train.num_steps)
    run_key = jax.random.split(jax.random.key(config.train.seed))[1]

    def beside(state: TrainState) -> dict[str, Any]:
        return {name: value for name, value in vars(state).items() if name != "model"}

    made = jax.jit(
        lambda model: beside(_fresh(config, optimizer, model, run_key)),
        out_shardings=beside(shardings),
    )(model)
    return TrainState(model=model, **made)


def _initial(config: Config, optimizer: optax.GradientTransformation) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(config.train.seed))
    return _fresh(config, optimizer, transformer.Transformer(init_key, config.model), run_key)


def _fresh(
    config: Config,
    optimizer: optax.GradientTransformation,
    model: transformer.Transformer,
    run_key: jax.Array,
) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    recent = spikes.Recent.empty(config.train.spike_window)
    return TrainState(
        model, optimizer.init(model), jax.random.key_data(run_key), zero, zero, recent
    )


def cross_entropy(logits_BSV: jax.Array, target_BS: jax.Array) -> jax.Array:
    """Mean nats a token."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BSV, target_BS).mean()


def build_step(
    config: Config, mesh: Mesh
) -> Callable[[TrainState, jax.Array, Table], tuple[TrainState, StepMetrics]]:
    """`step(state, window_BS1, table) -> (state, metrics)`, jitted; the old state is donated.

    A step whose loss or gradient norm is not finite, or whose loss is a spike, returns parameters,
    optimizer state, key and recent losses with the bits they had, and counts itself.
    """
    optimizer = optimizer_lib.make(config.optimizer, config.train.num_steps)
    clip, replicated = config.optimizer.clip_norm, mesh_lib.sharding(mesh)
    recorded = config.replan.every > 0
    by_batch = mesh_lib.sharding(mesh, None, "batch", None, None)
    loss_and_gradients = _loss_and_gradients(config, mesh)

    def step(state, window_BS1, table):
        (total, parts), grads = loss_and_gradients(state.model, window_BS1, table)
        loss, load_balance, z, traffic, expert_LBSK = parts
        slot_LE = table.logical_to_physical_ER[:, :, 0]
        norm = optimizer_lib.global_norm(grads, slot_LE, replicated)
        limit = state.recent.limit(config.train.spike_sigma)
        good = jnp.isfinite(total) & jnp.isfinite(norm) & (loss <= limit)
        scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.model)
        model = optax.apply_updates(state.model, updates)

        # `where`, not a product: 0 * NaN is NaN.
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
        bad_steps = state.bad_steps + jnp.where(good, 0, 1).astype(jnp.int32)
        bad_in_row = jnp.where(good, 0, state.bad_in_row + 1).astype(jnp.int32)
        recent = keep(state.recent.with_loss(loss), state.recent)
        state = TrainState(
            keep(model, state.model),
            keep(opt_state, state.opt_state),
            state.key,
            bad_steps,
            bad_in_row,
            recent,
        )
        metrics = StepMetrics(
            *(loss, limit, load_balance, z, norm, bad_steps, bad_in_row, traffic),
            expert_LBSK if recorded else None,
        )
        return state, metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    names = {field.name for field in dataclasses.fields(StepMetrics)}
    scalars: dict[str, Any] = dict.fromkeys(names - {"traffic", "expert_LBSK"}, replicated)
    of_metrics = StepMetrics(
        **scalars,
        traffic=Traffic(*[replicated] * len(dataclasses.fields(Traffic))),
        expert_LBSK=by_batch if recorded else None,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, of_metrics))


def build_blame(config: Config, mesh: Mesh) -> Callable[[Any, jax.Array, Table], Any]:
    """`blame(model, window_BS1, table)`: not finite values of each gradient, jitted."""
    loss_and_gradients = _loss_and_gradients(config, mesh)

    def blame(model, window_BS1, table):
        _, grads = loss_and_gradients(model, window_BS1, table)
        return jax.tree.map(lambda grad: jnp.sum(~jnp.isfinite(grad), dtype=jnp.int32), grads)

    return jax.jit(blame, out_shardings=mesh_lib.sharding(mesh))


def _loss_and_gradients(config: Config, mesh: Mesh) -> Callable[..., Any]:
    """`(model, window_BS1, table) -> ((total, parts), gradients)`; `parts` are loss, load_balance,
    z, traffic and expert_LBSK."""
    forward = transformer.build_forward(
        config.model,
        mesh,
        attention_batch=mesh_lib.attention_batch(config.mesh),
        remat=config.train.remat == "layer",
        pre_activations=config.train.pre_activations,
    )
    coefs = (config.model.load_balance_coef, config.model.z_loss_coef)

    def loss_fn(model, window_BS1, table):
        output = forward(model, window_BS1[:, :-1], table)
        loss = cross_entropy(output.logits_BSV, window_BS1[:, 1:])
        load_balance, z = output.record.load_balance.mean(), output.record.z.mean()
        total = loss + coefs[0] * load_balance + coefs[1] * z
        return total, (loss, load_balance, z, output.record.traffic, output.record.expert_BSK)

    def loss_and_gradients(model, window_BS1, table):
        values, grads = jax.value_and_grad(loss_fn, has_aux=True)(model, window_BS1, table)
        return values, replicas.summed(grads, table, mesh)

    return loss_and_gradients


def build_eval(config: Config, mesh: Mesh) -> Callable[[Any, jax.Array, Table], jax.Array]:
    """`evaluate(model, window_BS1, table) -> mean nats a token`, jitted."""
    attention_batch = mesh_lib.attention_batch(config.mesh)
    forward = transformer.build_forward(config.model, mesh, attention_batch=attention_batch)

    def evaluate(model, window_BS1, table):
        output = forward(model, window_BS1[:, :-1], table)
        return cross_entropy(output.logits_BSV, window_BS1[:, 1:])

    return jax.jit(evaluate)
