# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One matrix product per expert
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_jax/blob/main/colab/kernels.ipynb)
#
# After routing, a device holds rows sorted by expert: some experts have many, some few, some none. A *grouped matmul* multiplies each row
# with the weights of its own expert. How close does it come to one plain matrix product with as many rows? This notebook asks the machine
# that it runs on.

# %% [markdown]
# ## Setup

# %%
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/moe_jax"  # where this notebook comes from
DEVICES = pathlib.Path("/dev")
ON_TPU = any(DEVICES.glob("accel[0-9]*")) or any(DEVICES.glob("vfio/[0-9]*"))
ON_TPU = ON_TPU or any(name.startswith(("TPU_", "COLAB_TPU_")) for name in os.environ)
# On a TPU pip has to bring the libtpu of the JAX that it brings.
EXTRA = "[cuda12]" if shutil.which("nvidia-smi") else "[tpu]" if ON_TPU else ""

# In a checkout there is nothing to install.
sys.path[:0] = [str(p) for p in (pathlib.Path(".."), pathlib.Path(".")) if (p / "moe_jax").is_dir()]
if importlib.util.find_spec("moe_jax") is None:
    package = f"moe_jax{EXTRA} @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from moe_jax.kernels import bench
from moe_jax.kernels import grouped_matmul as gm

BACKEND = jax.default_backend()
IMPLEMENTATION = gm.default_implementation()
# Rows, d_model, d_ff, experts; seconds of measuring for each pattern and direction.
ROWS, D, F, G, SECONDS = {
    "cpu": (2048, 256, 512, 16, 0.7),
    "gpu": (65536, 2048, 1024, 64, 2.0),
    "tpu": (65536, 2048, 1024, 64, 2.0),
}[BACKEND]
DTYPE = bench.default_dtype()
# CPU time hardly moves when other programs run; where an accelerator computes it says nothing.
RATIO = "cpu_ratio" if BACKEND == "cpu" else "ratio"
print(f"{jax.devices()[0].device_kind}: implementation {IMPLEMENTATION!r}, {DTYPE}")

# %% [markdown]
# ## What it computes
#
# `group_sizes_G[g]` rows belong to expert `g`, in order. The obvious way, one expert after the other, is the oracle:

# %%
sizes_G = jnp.asarray(bench.group_sizes("zipf", ROWS, G), jnp.int32)
keys = jax.random.split(jax.random.key(0), 2)
x_ND = jax.random.normal(keys[0], (ROWS, D), DTYPE)
w_GDF = jax.random.normal(keys[1], (G, D, F), DTYPE) / D**0.5

y_NF = jax.jit(gm.grouped_matmul)(x_ND, w_GDF, sizes_G)

ends = np.cumsum(sizes_G)
parts = [
    x_ND[end - size : end] @ w_GDF[g]
    for g, (end, size) in enumerate(zip(ends, np.asarray(sizes_G), strict=True))
]
difference = jnp.abs(y_NF.astype(jnp.float32) - jnp.concatenate(parts).astype(jnp.float32)).max()
display(
    Markdown(
        f"Rows of an expert: {int(sizes_G.min())} to {int(sizes_G.max())}. Largest difference from "
        f"the oracle: {float(difference):.1e}, of values up to {float(jnp.abs(y_NF).max()):.1f}."
    )
)

# %% [markdown]
# ## A row does not see its neighbours
#
# Experts move between devices without changing an answer because a row's bits depend on that row and its expert's weights alone. So we
# compute the rows of one expert again, without all the others:

# %%
expert = int(jnp.argmax(sizes_G))
end, size = int(ends[expert]), int(sizes_G[expert])
alone = jax.jit(gm.grouped_matmul)(
    x_ND[end - size : end], w_GDF[expert : expert + 1], jnp.array([size], jnp.int32)
)
together = y_NF[end - size : end]
differ = int((np.asarray(alone).view(np.uint8) != np.asarray(together).view(np.uint8)).sum())
display(Markdown(f"Expert {expert}, {size} rows: **{differ} of {alone.nbytes:,} bytes differ**."))

# %% [markdown]
# ## How fast
#
# Five ways in which rows may fall on experts, against one dense product over as many rows, which is what hardware does best. Both run interleaved; a ratio is dense time over time within one round, and the median over rounds counts. 1 is
# dense speed. (On a CPU it is CPU time, which other programs disturb less.)

# %%
PATTERNS = ("uniform", "multinomial", "zipf", "half-empty", "one-group")
figure, axes = plt.subplots(figsize=(7, 2.6), dpi=65, layout="constrained")
for pattern in PATTERNS:
    axes.plot(np.sort(bench.group_sizes(pattern, ROWS, G))[::-1], marker=".", label=pattern)
axes.set(xlabel="experts, sorted", ylabel="rows", yscale="symlog", title="Rows of each expert")
axes.legend(frameon=False)
plt.show()

# %%
bench.SHAPES["notebook"] = bench.Shape("matmul", ROWS, ROWS, D, F, G, PATTERNS)
cases = [("notebook", pattern) for pattern in PATTERNS]
results = list(bench.measure(cases, IMPLEMENTATION, SECONDS, opponents=()))

# %%
figure, axes = plt.subplots(figsize=(7, 2.8), dpi=65, layout="constrained")
for offset, direction in ((-0.2, "forward"), (0.2, "dx+dw")):
    ratios = [r[RATIO][IMPLEMENTATION] for r in results if r["direction"] == direction]
    axes.bar(np.arange(len(PATTERNS)) + offset, ratios, 0.36, label=direction)
axes.axhline(1, color="#555555", linestyle="--")
axes.set_xticks(range(len(PATTERNS)), PATTERNS)
axes.set(ylabel="share of dense speed")
axes.legend(frameon=False, loc="lower right")
plt.show()

# %%
lines = ["| rows | pass | dense | grouped | share of dense speed |", "|---" * 5 + "|"]
for r in results:
    ms = r["milliseconds"]
    cells = [r["pattern"], r["direction"]]
    cells += [f"{ms[who]:.2f} ms" for who in ("dense", IMPLEMENTATION)]
    cells.append(f"**{r[RATIO][IMPLEMENTATION]:.2f}**")
    lines.append(f"| {' | '.join(cells)} |")
lines += [
    "",
    f"{ROWS:,} rows of {D} x {F}, {G} experts. Milliseconds are the best of many rounds.",
]
display(Markdown("\n".join(lines)))

# %% [markdown]
# JAX has a grouped product of its own, `jax.lax.ragged_dot`. On an accelerator it is a kernel; on a CPU it multiplies every row with
# every expert. Here, with one of the patterns:

# %%
both = list(bench.measure([("notebook", "multinomial")], IMPLEMENTATION, SECONDS))
shares = both[0][RATIO]
display(
    Markdown(
        f"Forward, share of dense speed: ours {shares[IMPLEMENTATION]:.2f}, "
        f"`ragged_dot` {shares['ragged_dot']:.3f}."
    )
)

# %% [markdown]
# ## Gradients
#
# An expert without rows must get a gradient of exactly zero, and rows past the last group must give exactly zero too: places where
# other implementations have had bugs. Here half of the experts are empty, and the buffer is longer than the rows that are used:

# %%
half_G = jnp.asarray(bench.group_sizes("half-empty", ROWS // 2, G), jnp.int32)


@jax.jit
def gradients(x_ND, w_GDF):
    return jax.grad(lambda x, w: gm.grouped_matmul(x, w, half_G).sum(), argnums=(0, 1))(x_ND, w_GDF)


dx_ND, dw_GDF = gradients(x_ND, w_GDF)
empty = np.flatnonzero(half_G == 0)
display(
    Markdown(
        f"{len(empty)} of {G} experts are empty; largest |gradient| of their weights: "
        f"{float(jnp.abs(dw_GDF[empty]).max()):g}, of unused rows: "
        f"{float(jnp.abs(dx_ND[ROWS // 2 :]).max()):g}."
    )
)

# %% [markdown]
# `python -m moe_jax.kernels.bench --help` measures more shapes, among them those of published models.
