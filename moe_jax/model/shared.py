"""The expert that every token visits: computed where the token is, so its row never travels.

DeepSeekMoE (arXiv 2401.06066) isolates shared experts; Qwen1.5-MoE weighs one by a sigmoid of the
token's own row. It is no part of routing, of placement or of `Traffic`.

Axes: T tokens, D d_model, F its width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_jax.model import parameter


class SharedExpert(nnx.Module):
    """Gate and up [D, F], down [F, D], and the weight of its sigmoid [D], or None."""

    def __init__(self, key: jax.Array, *, d_model: int, d_ff: int, has_gate: bool):
        g, u, d, s = jax.random.split(key, 4)
        self.gate_DF = parameter.normal(g, ("embed", "mlp"), (d_model, d_ff), d_model)
        self.up_DF = parameter.normal(u, ("embed", "mlp"), (d_model, d_ff), d_model)
        self.down_FD = parameter.normal(d, ("mlp", "embed"), (d_ff, d_model), d_ff)
        self.share_D = parameter.normal(s, ("embed",), (d_model,), d_model) if has_gate else None


def compute(x_TD: Float[Array, "T D"], weights: SharedExpert) -> Float[Array, "T D"]:
    """down(silu(gate x) * up x), times sigmoid(x w) where there is w; weights in x's dtype."""
    gate_TF, up_TF = x_TD @ weights.gate_DF[...], x_TD @ weights.up_DF[...]
    y_TD = (jax.nn.silu(gate_TF) * up_TF) @ weights.down_FD[...]
    if weights.share_D is None:
        return y_TD
    # Not a product with a vector: on CPU a row's bits would depend on its place (above 8 rows).
    share_D = weights.share_D[...].astype(jnp.float32)
    share_T = jax.nn.sigmoid((x_TD.astype(jnp.float32) * share_D[None]).sum(axis=1))
    return y_TD * share_T.astype(y_TD.dtype)[:, None]
