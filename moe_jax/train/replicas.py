"""Training with replicated experts: copies of one expert get one gradient, and so stay equal.

Each copy computes other tokens, so each has its part of the expert's gradient. The parts are added
up in ascending slot order for every copy: copies that start with the same bits keep them, moments
included, since AdamW works element by element. The sum differs from the one without replicas only
by rounding.

Axes: L layers, E experts, R copies of an expert, P physical experts (slots).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import mesh as mesh_lib
from moe_jax.model import parameter
from moe_jax.model.dispatch.table import Table, experts_of


def summed(grads: Any, table: Table, mesh: Mesh) -> Any:
    """The gradients with those of copies added up, in every copy's slot.

    Costs memory for the gradients of all slots of the model on every device, where there are
    copies at all.

    Args:
      grads: a model's; expert arrays are [layer, physical expert, ...].
      table: stacked over layers.
    """
    slot_LER = table.logical_to_physical_ER
    if slot_LER.shape[2] == 1:
        return grads

    def of(grad: jax.Array, names: tuple[str, ...]) -> jax.Array:
        if "expert" not in names:
            return grad
        placed = mesh_lib.sharding(mesh, *names)
        copy_LPR = siblings(slot_LER, grad.shape[1])
        layer_L1 = jnp.arange(len(slot_LER))[:, None]
        total = jnp.zeros_like(grad)
        for copy in range(copy_LPR.shape[2]):
            part = grad[layer_L1, jnp.maximum(copy_LPR[:, :, copy], 0)]
            there = copy_LPR[:, :, copy].reshape(part.shape[:2] + (1,) * (part.ndim - 2)) >= 0
            total = total + jnp.where(there, part, 0.0)
            total = jax.lax.with_sharding_constraint(total, placed)
        return total

    leaves, structure = jax.tree.flatten(grads)
    axes = jax.tree.leaves(parameter.logical_axes(grads))
    return jax.tree.unflatten(structure, map(of, leaves, axes))


def siblings(slot_LER: jax.Array, num_slots: int) -> jax.Array:
    """int32 [L, P, R]: the slots with the expert of each slot, itself included; -1 beyond them."""
    expert_LP = jax.vmap(functools.partial(experts_of, num_physical=num_slots))(slot_LER)
    return jnp.take_along_axis(slot_LER, expert_LP[:, :, None], axis=1)
