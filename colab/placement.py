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
# # Where should experts live? Objectives, dispatches, replicas, verdict
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/moe_jax/blob/main/colab/placement.ipynb)
#
# You serve or train a Mixture-of-Experts model, and somebody proposes to move its experts. Good idea? It depends on three things: on
# what your tokens do, on how their rows travel, and on what you want less of. This notebook looks at each in turn, with a picture.
#
# Planning needs a *trace*: the experts of every token in every layer. It needs no accelerator and no model, so everything here runs on
# the host.

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

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from moe_jax.placement import cost, evidence, solve, topology, verdict, verdict_text
from moe_jax.placement.plan import Placement
from moe_jax.placement.problem import LoadCap, Problem
from moe_jax.routing import affinity, synthetic
from moe_jax.routing import trace as trace_lib

# Machines with an accelerator have larger hosts: more tokens, longer searches.
SIZES = {
    "cpu": {"tokens": 12_000, "seconds": 2.0},
    "gpu": {"tokens": 60_000, "seconds": 10.0},
    "tpu": {"tokens": 60_000, "seconds": 10.0},
}[jax.default_backend()]

# %% [markdown]
# ## A trace
#
# Record your own (`quickstart.ipynb` shows how, `python -m moe_jax.placement convert` reads those of other programs), or make one. This
# one is made: every token has a topic, topics like certain experts, and some topics are more common than others.

# %%
trace = synthetic.realistic(
    num_tokens=SIZES["tokens"], num_layers=4, num_experts=32, top_k=4, seed=0
)
halves = trace_lib.split(trace, seed=0)  # plan on one half of the sequences, judge on the other

load_LE, pairs_LEE = affinity.load_LE(trace), affinity.coactivation_LEE(trace)
next_LEE = affinity.transitions_top1_LEE(trace)
figure, panels = plt.subplots(1, 3, figsize=(10, 3), dpi=65, layout="constrained")
panels[0].bar(range(trace.num_experts), np.sort(load_LE[0])[::-1] / load_LE[0].mean())
panels[0].set(title="load over the mean, layer 0", xlabel="experts, sorted")
panels[1].imshow(pairs_LEE[0], cmap="YlGnBu")
panels[1].set(title="chosen together, layer 0", xlabel="expert", ylabel="expert")
panels[2].imshow(next_LEE[0], cmap="YlGnBu")
panels[2].set(title="best expert, layer 0 to 1", xlabel="expert in layer 1", ylabel="in layer 0")
plt.show()

# %% [markdown]
# Left: some experts have more work than others (**popularity**). Middle: a token's experts of one layer come in groups
# (**co-activation**). Right: so do those of consecutive layers (**transitions**). A plan can use all three, if the dispatch lets it.
#
# ## Objectives
#
# Two nodes of four devices, 32 experts in a layer: four on each device. Six things that one may want less of, each planned for with the
# same short time limit, and all judged on the *other* half of the sequences.

# %%
machine = topology.nodes_by_devices(num_nodes=2, num_devices=8)
contiguous = Placement.contiguous(trace.num_layers, trace.num_experts, machine.num_devices)


def planned(objective: str, dispatch: str, **extra) -> Placement:
    problem = Problem(halves.plan_half, machine, objective, dispatch, **extra)
    return solve.solve_problem(problem, seed=0, time_limit=SIZES["seconds"]).placement


plans = {"nothing": contiguous}
for objective, dispatch in {
    "seconds": "exchange",
    "rows": "exchange",
    "load": "exchange",
    "exflow": "coherent",
    "moetuner": "exchange",
    "hops": "exchange",
}.items():
    plans[objective] = planned(objective, dispatch)

# %%
judge = halves.judge_half
figures: dict[str, list[float]] = {}
for name, placement in plans.items():
    seen = evidence.judge(judge, placement, machine)
    figures[name] = [
        1e6 * Problem(judge, machine, "seconds", "exchange").value_of(placement),
        *(seen.rows[way].value for way in ("exchange", "hierarchical", "coherent")),
        seen.hops.value,
        seen.load_mean.value,
    ]
HEADS = [
    "microseconds\n(exchange)",
    "rows\n(exchange)",
    "rows\n(hierarchical)",
    "rows\n(coherent)",
    "transitions\nthat leave",
    "load\nmax / mean",
]
table = np.array(list(figures.values()))
change = 100 * (table / table[0] - 1)

figure, axes = plt.subplots(figsize=(9, 3.6), dpi=65, layout="constrained")
limit = np.abs(change).max()
image = axes.imshow(change, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
axes.set_xticks(range(len(HEADS)), HEADS)
axes.set_yticks(range(len(plans)), ["no plan", *(f"for {name}" for name in list(plans)[1:])])
for (row, column), value in np.ndenumerate(change):
    cell = f"{table[row, column]:.4g}\n{value:+.0f} %"
    ink = "white" if abs(value) > 0.6 * limit else "black"
    axes.text(column, row, cell, ha="center", va="center", color=ink)
axes.set_title("Held-out figures of each plan, and their change from no plan")
plt.show()

# %% [markdown]
# Read a row: a plan that was made for one thing may pay for it elsewhere. Read a column: who does best at it.

# %%
best = {
    head.replace("\n", " "): list(plans)[row]
    for head, row in zip(HEADS, table.argmin(axis=0), strict=True)
}
display(
    Markdown(
        "| figure | least with the plan for |\n|---|---|\n"
        + "\n".join(f"| {head} | {name} |" for head, name in best.items())
    )
)

# %% [markdown]
# `seconds` is the default: it knows the links, the balance and the dispatch together. A *load cap* adds a limit to any objective.
#
# ## Dispatches: how rows travel
#
# | dispatch | a token goes | what a plan can save |
# |---|---|---|
# | `exchange` | to every distinct device of its experts, and home | devices per token |
# | `hierarchical` | to every distinct node first, then inside | nodes per token |
# | `coherent` | on from its best expert: it does not come home | transitions |
# | `shuffled` | as with `exchange`, from where its experts of the layer before were | transitions and devices per token |
# | `gathered` | to every device | nothing but balance |
#
# For each one a plan of its own, rows counted token by token on the judging half:

# %%
counted: dict[str, dict[str, cost.Rows]] = {}
for dispatch in cost.DISPATCHES:
    objective = "load" if dispatch == "gathered" else "rows"
    own = planned(objective, dispatch, load_cap=LoadCap.parse("1.3x"))
    counted[dispatch] = {
        name: cost.rows(
            judge.expert_ids_TLK, placement, dispatch, devices_per_node=machine.devices_per_node
        )
        for name, placement in (("no plan", contiguous), ("planned", own))
    }

node_M = machine.node_M
between_MM = node_M[:, None] != node_M[None, :]
per = judge.num_tokens * judge.num_layers
figure, axes = plt.subplots(figsize=(8, 3), dpi=65, layout="constrained")
for offset, name in ((-0.2, "no plan"), (0.2, "planned")):
    for number, rows in enumerate(counted.values()):
        total_MM = rows[name].total_LMM.sum(0) / per
        inside, between = total_MM[~between_MM].sum(), total_MM[between_MM].sum()
        colour = "#999999" if name == "no plan" else "#0072B2"
        first = number == 0
        axes.bar(
            number + offset, between, 0.36, color=colour, label=f"{name}, between nodes" * first
        )
        axes.bar(
            number + offset,
            inside,
            0.36,
            bottom=between,
            color=colour,
            alpha=0.45,
            label=f"{name}, inside nodes" * first,
        )
axes.set_xticks(range(len(counted)), counted)
axes.set(ylabel="rows per token and layer", title="Rows on the wire, both ways, held out")
axes.legend(frameon=False)
plt.show()

changes = {
    dispatch: rows["planned"].total_LMM.sum() / rows["no plan"].total_LMM.sum() - 1
    for dispatch, rows in counted.items()
}
display(Markdown(", ".join(f"`{name}`: **{100 * x:+.1f} %**" for name, x in changes.items())))

# %% [markdown]
# So the first question is never "which plan?" but "how do my rows travel?".
#
# ## Replicas: balance
#
# A device that holds the most popular expert is busy, whatever else it holds. Spare slots hold copies. Here is a trace with few but very
# popular experts; the largest load over the mean, by the number of slots in a layer:

# %%
skewed = synthetic.realistic(
    num_tokens=SIZES["tokens"],
    num_layers=4,
    num_experts=32,
    top_k=2,
    seed=1,
    zipf=1.5,
    popularity=1.0,
    affinity=0.6,
)
skewed_halves = trace_lib.split(skewed, seed=0)


def balanced(num_slots: int) -> Placement:
    problem = Problem(skewed_halves.plan_half, machine, "load", "exchange", num_slots=num_slots)
    return solve.solve_problem(problem, seed=0, time_limit=SIZES["seconds"]).placement


copies = {slots: balanced(slots) for slots in (32, 40, 48, 64)}
loads = {
    slots: evidence.judge(skewed_halves.judge_half, placement, machine).load_mean
    for slots, placement in copies.items()
}
unplanned = evidence.judge(skewed_halves.judge_half, contiguous, machine).load_mean

figure, axes = plt.subplots(figsize=(5, 2.6), dpi=65, layout="constrained")
values = np.array([dataclasses.astuple(one) for one in loads.values()])
ends = np.abs(values[:, 1:] - values[:, :1]).T
axes.errorbar(list(loads), values[:, 0], ends, marker="o", capsize=4, color="#0072B2")
axes.axhline(1, color="#555555", linestyle="--")
axes.set(xlabel="slots of a layer (32 experts)", ylabel="load, max / mean", xticks=list(loads))
plt.show()

# %%
display(
    Markdown(
        f"Without a plan: {unplanned.value:.2f}. "
        + ", ".join(f"{slots} slots: **{one.value:.2f}**" for slots, one in loads.items())
        + ". A value of 1 is perfect balance; the price of a copy is its memory."
    )
)

# %% [markdown]
# ## Verdict: is it worth it?
#
# Planned on one half, judged on the other, with the interval of the *difference*. A null test shuffles the affinity away: what is still
# saved then is popularity alone. The cost of the move is counted, too.

# %%
problem = Problem(trace, machine, "seconds", "exchange")
found = verdict.verdict(problem, settings=verdict.Settings(time_limit=SIZES["seconds"]))
print(verdict_text.text(found, "contiguous"))

# %%
shares = {
    "trace": found.gains["seconds"].share,
    "affinity\nshuffled away": found.null["seconds"].share,
}
figure, axes = plt.subplots(figsize=(5, 2.6), dpi=65, layout="constrained")
for number, one in enumerate(shares.values()):
    low, high = 100 * (one.value - one.low), 100 * (one.high - one.value)
    axes.bar(number, 100 * one.value, 0.5, color=("#0072B2", "#999999")[number])
    axes.errorbar(
        number, 100 * one.value, [[max(low, 0)], [max(high, 0)]], capsize=5, color="black"
    )
axes.set_xticks(range(len(shares)), shares)
axes.set(ylabel="% of a layer's time", title="Predicted time saved, held out")
plt.show()

# %%
share = found.gains["seconds"].share
display(
    Markdown(
        f"**{found.answer.capitalize()}**: {found.reason}. The time is that of the cost model "
        f"({100 * share.value:.1f} % saved, 95 % interval {100 * share.low:.1f} to "
        f"{100 * share.high:.1f} %), not of a clock; rows are exact."
    )
)

# %% [markdown]
# ## With your own trace
#
# Replace the made trace by `trace_lib.load("trace.npz")` and the machine by yours (`topology.flat(8)`, or a preset of
# `moe_jax/placement/topologies/` by name), then run the notebook again. The same on the command line, with a plan file at the end of it:
#
# ```
# python -m moe_jax.placement verdict trace.npz --devices=8 --nodes=2 --out=plan.json
# ```
