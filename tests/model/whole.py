"""A whole model on any mesh: outputs and gradients of the same parameters and tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import mesh as mesh_lib
from moe_jax.model import coherent, parameter, transformer
from tests import tiny

TOKEN_BS = tiny.tokens(8, 8)
WEIGHT_BSV = np.random.default_rng(2).normal(size=(8, 8, 256)).astype(np.float32)


class Whole:
    """Args: `trained`: makes the parameters, on one device."""

    def __init__(self, trained):
        self._trained = trained

    def placed(self, config):
        """The model on its mesh, and its forward pass."""
        mesh, model = tiny.mesh(config), self._trained()
        model = jax.tree.map(
            lambda a, names: jax.device_put(a, mesh_lib.sharding(mesh, *names)),
            model,
            parameter.logical_axes(model),
        )
        layers = coherent if config.model.dispatch == "coherent" else transformer
        table = transformer.identity_table(tiny.LAYERS, tiny.EXPERTS)  # of MoE layers alone
        forward = layers.build_forward(config.model, mesh, "reference")
        return model, lambda model: forward(model, jnp.asarray(TOKEN_BS), table)

    def outputs(self, config):
        """(logits, experts of every token)"""
        model, forward = self.placed(config)
        output = jax.jit(forward)(model)
        return output.logits_BSV, output.record.expert_BSK

    def gradients(self, config):
        """Of a weighted sum of the logits."""
        model, forward = self.placed(config)
        loss = lambda model: (forward(model).logits_BSV * WEIGHT_BSV).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(model)
