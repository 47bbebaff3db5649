"""How far outputs are from a sum in float64, for every combine and wire.

    python tests/model/deviation.py

Each line: the dtype of activations, the combine, the wire of the way out, the worst deviation and
its root mean square, both relative to the greatest output.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model.dispatch import schemes
from moe_jax.model.transformer import identity_table
from tests.model.test_dispatch import E, problem, program


def true_TD(x_TD, expert_TK, weight_TK, *weights):
    """Token by token, in float64."""
    x_TD, weight_TK, gate, up, down = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in (x_TD, weight_TK, *weights)
    )
    y_TD = np.zeros_like(x_TD)
    for t, experts in enumerate(np.asarray(expert_TK)):
        for k, e in enumerate(experts):
            hidden_F = x_TD[t] @ gate[e]
            hidden_F = hidden_F / (1 + np.exp(-hidden_F)) * (x_TD[t] @ up[e])
            y_TD[t] += weight_TK[t, k] * (hidden_F @ down[e])
    return y_TD


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    table = jax.tree.map(lambda t: t[0], identity_table(1, E))
    for dtype in (jnp.float32, jnp.bfloat16):
        args = problem(0, 8 * 13, 8, dtype=dtype)
        expected_TD = true_TD(*args)
        for combine in schemes.COMBINES:
            for wire_dtype in ("", "float8_e4m3fn"):
                step = program((2, 4), "exchange", combine, wire_dtype=wire_dtype)
                (_, (y_TD, _)), _ = step(*args, table, jnp.ones_like(args[0]))
                off_TD = np.asarray(y_TD.astype(jnp.float32)) - expected_TD
                scale = np.abs(expected_TD).max()
                print(
                    f"{np.dtype(dtype).name:9} {combine:13} {wire_dtype or 'full':14} "
                    f"worst {np.abs(off_TD).max() / scale:.1e}, "
                    f"rms {np.sqrt(np.mean(off_TD**2)) / scale:.1e}"
                )


if __name__ == "__main__":
    main()
