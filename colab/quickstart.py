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
# # Experts find a better home: the whole idea in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_jax/blob/main/colab/quickstart.ipynb)
#
# In a Mixture-of-Experts model every token visits only a few experts. When the experts live on several devices, tokens travel to them.
# *Which* device holds *which* expert is up to us, and it decides how far tokens have to go.
#
# In this notebook you
#
# 1. **train** a small MoE on real text, its experts spread over devices,
# 2. **record** which experts the tokens choose,
# 3. **plan** a better home for every expert,
# 4. **move** the experts of the trained model,
# 5. **compare**: fewer rows on the wire, and the same answers in every bit.
#
# Nothing is downloaded: the text is the source code of Python's own standard library.

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
import dataclasses
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from jax.extend import backend as jax_backend

from moe_jax import config as config_lib
from moe_jax import data, metrics, permute
from moe_jax import mesh as mesh_lib
from moe_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from moe_jax.infer import load, record
from moe_jax.infer.sampling import Sampling
from moe_jax.placement import cost, evidence, solve, tables, topology
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import affinity
from moe_jax.train import inputs, loop

# %% [markdown]
# Placement is about several devices. Where JAX finds fewer than four, one CPU plays eight: the program is the same, and so are the
# rows that we count in it.

# %%
EXPERT_DEVICES = 4  # that hold one copy of all experts together

if jax.device_count() < EXPERT_DEVICES:
    jax_backend.clear_backends()
    mesh_lib.initialize("cpu", virtual_devices=8, multi_process="off")
BACKEND = jax.default_backend()
DATA_DEVICES = jax.device_count() // EXPERT_DEVICES
print(f"{BACKEND}: {EXPERT_DEVICES} devices for the experts, times {DATA_DEVICES} for data")

# %% [markdown]
# ## 1. Train
#
# A decoder with 16 experts in every layer, two of them for each token. Sizes follow the machine: small on a CPU, larger on an accelerator.

# %%
SIZES = {
    "cpu": {"d_model": 64, "d_ff": 64, "num_steps": 120, "seq_len": 64},
    "gpu": {"d_model": 512, "d_ff": 512, "num_steps": 600, "seq_len": 256},
    "tpu": {"d_model": 512, "d_ff": 512, "num_steps": 600, "seq_len": 256},
}[BACKEND]

config = Config(
    name="colab",
    mesh=MeshConfig(data=DATA_DEVICES, expert=EXPERT_DEVICES),
    model=ModelConfig(
        vocab_size=256,  # bytes
        num_layers=4,
        d_model=SIZES["d_model"],
        num_heads=4,
        num_kv_heads=2,
        d_head=SIZES["d_model"] // 4,
        d_ff=SIZES["d_ff"],
        num_experts=16,
        top_k=2,
        max_seq_len=2 * SIZES["seq_len"],
        dispatch="exchange",  # a token goes once to every device that holds one of its experts
    ),
    data=DataConfig(
        seq_len=SIZES["seq_len"],
        global_batch=4 * EXPERT_DEVICES * DATA_DEVICES,
        max_bytes=4_000_000,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20),
    train=TrainConfig(
        num_steps=SIZES["num_steps"],
        log_every=SIZES["num_steps"] // 6,
        eval_every=SIZES["num_steps"] // 2,
        checkpoint_every=SIZES["num_steps"],
    ),
)
config_lib.validate(config)

workdir = pathlib.Path(tempfile.mkdtemp()) / "run"
corpus, contiguous = inputs.prepare(config, workdir)
loop.train(config, workdir, corpus, contiguous)

# %% [markdown]
# The run lives in a work directory with its config, metrics and checkpoints. We read the model back, experts where they were
# trained: expert 0 to 3 of each layer on device 0, 4 to 7 on device 1, and so on.

# %%
source = load.find(str(workdir), placement=None)
mesh = mesh_lib.of_config(config.mesh)
model = source.model(mesh)
before = source.plan.placement
engine = load.Engine(config, mesh, model, permute.table(before))

prompt = "def main("
answer = engine.generate([source.text.encode(prompt)], max_new_tokens=40, sampling=Sampling())
print(source.text.join(source.text.encode(prompt), answer.tokens[0]))

# %% [markdown]
# (A minute of training makes no programmer. The *routing* is what we are after, and it is there already.)
#
# ## 2. Record
#
# The experts of every token leave the step as an output, so recording costs nothing when nobody reads it. We read held-out text.

# %%
PLAN_ON, JUDGE_ON = 96, 32  # held-out sequences; different ones
windows = data.held_out_windows(corpus, config.data.seq_len, PLAN_ON + JUDGE_ON)[:, :-1].tolist()

recorded = engine.generate(windows[:PLAN_ON], 0, Sampling())
trace = record.trace([recorded], config, corpus.name)
display(
    Markdown(
        f"**{trace.num_tokens:,} tokens** of {trace.num_sequences} sequences, "
        f"{trace.num_layers} layers, top {trace.top_k} of {trace.num_experts} experts."
    )
)

# %% [markdown]
# Some experts are chosen *together* far more often than others. Each cell is a pair of experts in the first layer; pairs that are bright
# should live on one device.

# %%
pairs_LEE = affinity.coactivation_LEE(trace)
figure, axes = plt.subplots(figsize=(4.6, 3.6), dpi=70, layout="constrained")
image = axes.imshow(pairs_LEE[0], cmap="YlGnBu")
axes.set(title="Layer 0: chosen together", xlabel="expert", ylabel="expert")
figure.colorbar(image, label="tokens")
plt.show()

# %% [markdown]
# ## 3. Plan
#
# The planner minimises the rows on the wire. The load cap keeps every layer's busiest device within 1.2 times of the best that is
# reachable. A bound is proven, so we know how much a better planner could still find.

# %%
machine = topology.flat(EXPERT_DEVICES)
problem = Problem(trace, machine, "rows", "exchange", load_cap=LoadCap.parse("1.2x"))
planned, report = solve.solve_problem(problem, seed=0, time_limit=5.0)
display(
    Markdown(
        f"Rows per token and layer, one out and one back for each device: "
        f"**{problem.value_of(before):.3f}** before, **{report.objective:.3f}** planned; "
        f"proven bound {report.bound:.3f}."
    )
)

# %% [markdown]
# ## 4. Move
#
# Moving is a gather of the experts' weights. The router does not change at all: the new plan reaches the model as a table, which is read
# *after* routing.

# %%
moved = permute.apply(model, before, planned)
engine_after = engine.placed(moved, permute.table(planned))
changed = int((before.device_LE != planned.device_LE).sum())
display(Markdown(f"{changed} of {before.device_LE.size} experts now live on another device."))

# %% [markdown]
# ## 5. Compare
#
# Both models answer the same prompts, which the planner has not seen. The program counts its rows while it runs.

# %%
judged = windows[PLAN_ON:]
NEW_TOKENS = 8
runs = {
    "before": (engine.generate(judged, NEW_TOKENS, Sampling()), before),
    "after": (engine_after.generate(judged, NEW_TOKENS, Sampling()), planned),
}


@dataclasses.dataclass(frozen=True)
class Counted:
    """Rows of one run, as the program counted them and as the planner predicts them."""

    tokens: int
    out_LMM: np.ndarray
    home_LMM: np.ndarray
    load: float  # of the busiest device over the mean, mean of the layers
    as_predicted: bool


def count(generation, placement: Placement) -> Counted:
    out_LMM, home_LMM, computed_LP = (
        sum(getattr(step, name) for step in generation.records)
        for name in ("dispatch_LMM", "combine_LMM", "computed_LP")
    )
    tokens = record.routed_tokens([generation], config.model.num_experts)
    predicted = cost.rows(tokens.expert_TLK, placement, "exchange", tokens.home_T, "exact")
    same_out = np.array_equal(out_LMM, predicted.dispatch_LMM)
    same_home = np.array_equal(home_LMM, predicted.combine_LMM)
    load = metrics.load_imbalance(computed_LP, placement.num_devices)
    return Counted(len(tokens.home_T), out_LMM, home_LMM, load, same_out and same_home)


counted = {name: count(*run) for name, run in runs.items()}

# %%
logits = {name: np.asarray(generation.logits_BSV) for name, (generation, _) in runs.items()}
differ = int((logits["before"].view(np.uint32) != logits["after"].view(np.uint32)).sum())
texts_agree = runs["before"][0].tokens == runs["after"][0].tokens


def per_token(name: str, field: str) -> float:
    rows_LMM = getattr(counted[name], field)
    return rows_LMM.sum() / (counted[name].tokens * len(rows_LMM))


lines = ["| per token and layer, counted | before | after | change |", "|---|---|---|---|"]
for title, field in (("rows out to the experts", "out_LMM"), ("rows back home", "home_LMM")):
    old, new = per_token("before", field), per_token("after", field)
    lines.append(f"| {title} | {old:.3f} | {new:.3f} | {100 * (new / old - 1):+.1f} % |")
old, new = (counted[name].load for name in ("before", "after"))
lines += [
    f"| busiest device, load over the mean | {old:.3f} | {new:.3f} | {100 * (new / old - 1):+.1f} % |",
    "",
    f"- Logits: **{differ:,} of {logits['before'].size:,} differ in any bit**.",
    f"- Texts are {'the same' if texts_agree else 'NOT the same'}.",
    "- The rows that the program counted are "
    + ("" if all(one.as_predicted for one in counted.values()) else "NOT ")
    + "those that the planner predicted, in every entry.",
]
display(Markdown("\n".join(lines)))

# %% [markdown]
# Why does the way back save less? The default combine, `exact`, brings one row home for each of a token's experts and adds them up in one
# fixed order. That is the price of equal bits: the number of rows that come back hardly depends on the plan. `combine="partial"` sends one
# sum per device instead; then both ways shrink, and answers are equal within rounding.
#
# The rows between every pair of devices:

# %%
highest = max(one.out_LMM.sum(0).max() for one in counted.values())
figure, panels = plt.subplots(1, 2, figsize=(7, 3.2), dpi=70, layout="constrained")
for axes, (name, one) in zip(panels, counted.items(), strict=True):
    image = axes.imshow(one.out_LMM.sum(0), cmap="YlGnBu", vmin=0, vmax=highest)
    axes.set(title=f"{name}: {one.out_LMM.sum():,} rows out", xlabel="to device")
    axes.set(ylabel="from device", xticks=range(EXPERT_DEVICES), yticks=range(EXPERT_DEVICES))
figure.colorbar(image, ax=panels, label="rows, all layers")
plt.show()

# %% [markdown]
# And is it luck? The plan was judged on sequences that it has not seen; here with 95 % intervals over sequences (rows both ways, one for
# each device):

# %%
unseen = record.trace([runs["before"][0]], config, corpus.name)
seen = [evidence.judge(unseen, placement, machine) for placement in (before, planned)]
lines = ["| held out | before | after |", "|---|---|---|"]
for title, pick in (
    ("rows, one per device and way", lambda one: one.rows["exchange"]),
    ("devices per token", lambda one: one.distinct_devices),
    ("busiest device over the mean", lambda one: one.load_mean),
):
    lines.append(f"| {title} | {' | '.join(tables.interval(pick(one)) for one in seen)} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## What next?
#
# - `placement.ipynb`: objectives, ways of sending rows, replicas, and whether it is worth it at all.
# - `kernels.ipynb`: one matrix product per expert against a dense one, on this machine.
# - Training that plans again by itself while it runs: set `replan=ReplanConfig(every=...)` in the config.
