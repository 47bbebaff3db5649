"""A made-up pair of measured runs, counted token by token in plain loops: the oracle.

Axes: T tokens, L layers, K top_k, M devices, P slots, E experts, B sequences, S positions, V vocab.
"""

import dataclasses
import functools
import itertools
import json
import pathlib

import numpy as np
import pytest

from moe_jax.placement.plan import Placement, Plan
from moe_jax.sim import report

T, L, K, E, M = 60, 3, 2, 8, 4
NONE = 255


def hops(home, device, dispatch):
    """(source, destination) of a row's way; to another of the two nodes it goes over a relay."""
    stops = [home, device]
    if dispatch == "hierarchical" and home // 2 != device // 2:
        stops.insert(1, device // 2 * 2 + home % 2)  # the device with home's place there
    return [(source, end) for source, end in itertools.pairwise(stops) if source != end]


def count(ids_TLK, home_T, placement, dispatch, combine="exact"):
    """Rows out, rows back, rows computed, one token after the other."""
    slots_LP = placement.physical_to_logical_LP
    num_layers = len(slots_LP)
    out_LMM, back_LMM = np.zeros((2, num_layers, M, M), np.int64)
    computed_LP = np.zeros(slots_LP.shape, np.int64)
    for token, home in enumerate(home_T):
        for layer in range(num_layers):
            experts = [int(e) for e in ids_TLK[token, layer] if e != NONE]
            slots = [list(slots_LP[layer]).index(e) for e in experts]
            devices = [slot // placement.slots_per_device for slot in slots]
            for slot in slots:
                computed_LP[layer, slot] += 1
            reached, answers = set(devices), devices
            if dispatch == "gathered":
                reached = set(range(M)) if experts else set()
                answers = list(range(M)) * len(experts)  # `exact`: each row from everywhere
            out = {hop for device in reached for hop in hops(int(home), device, dispatch)}
            back = [hop for device in answers for hop in hops(int(home), device, dispatch)]
            for source, end in out:  # over a hop once
                out_LMM[layer, source, end] += 1
            for source, end in back if combine == "exact" else out:
                back_LMM[layer, end, source] += 1
    return out_LMM, back_LMM, computed_LP


@dataclasses.dataclass
class Case:
    """Files of one comparison; change `before` or `after`, then `run`."""

    folder: pathlib.Path
    before: dict
    after: dict
    plan: Plan

    @property
    def arguments(self) -> list[str]:
        return [
            *(f"--{side}={self.folder}/{side}.npz" for side in ("before", "after")),
            f"--plan={self.folder}/plan.json",
            f"--metrics={self.folder}/metrics.jsonl",
            f"--out={self.folder}/out",
        ]

    def write(self) -> None:
        for side in ("before", "after"):
            arrays = dict(getattr(self, side))
            np.savez(self.folder / f"{side}.npz", **arrays | {"meta": json.dumps(arrays["meta"])})
        self.plan.write(self.folder / "plan.json")

    def run(self, *more: str) -> int:
        self.write()
        return report.main([*self.arguments, *more])


def measured(ids_TLK, home_T, placement, dispatch="exchange", combine="exact") -> dict:
    """What infer.py would have written."""
    out_LMM, back_LMM, computed_LP = count(ids_TLK, home_T, placement, dispatch, combine)
    rng = np.random.default_rng(7)  # the same answers for every placement
    return {
        "meta": {
            "format": "moe_jax.measurement",
            "version": 2,
            "model": "made-up <b>model</b>",
            "num_experts": E,
            "top_k": ids_TLK.shape[2],
            "num_devices": M,
            "num_nodes": 2 if dispatch == "hierarchical" else 1,
            "dispatch": dispatch,
            "combine": combine,
            "plan_digest": placement.digest,
            "logits_digest": "ab" * 32,
            "machine": "none",
        },
        "logits": rng.standard_normal((2, 5, 11)).astype(np.float32),
        "text_ids": rng.integers(0, 11, (2, 9), dtype=np.int32),
        "expert_ids": ids_TLK,
        "token_home": home_T,
        "token_position": np.arange(len(home_T), dtype=np.int32),
        "dispatch_LMM": out_LMM,
        "combine_LMM": back_LMM,
        "padding_LMM": np.full(out_LMM.shape, 3, np.int64),
        "computed_LP": computed_LP,
    }


def routing(seed: int = 0):
    """Skewed ids [T, L, K], distinct within a token, some absent; and homes [T]."""
    rng = np.random.default_rng(seed)
    skew_E = np.arange(1, E + 1) / np.arange(1, E + 1).sum()
    ids_TLK = np.array(
        [[rng.choice(E, K, replace=False, p=skew_E) for _ in range(L)] for _ in range(T)], np.uint8
    )
    ids_TLK[5, 1] = NONE
    ids_TLK[9, 2, 1] = NONE
    return ids_TLK, rng.integers(0, M, T).astype(np.int32)


def shuffled(num_layers: int) -> Placement:
    rng = np.random.default_rng(1)
    return Placement(np.array([rng.permutation(E) for _ in range(num_layers)]), E, M)


def make_case(folder: pathlib.Path, dispatch: str = "exchange") -> Case:
    return case_of(folder, *routing(), Plan(shuffled(L)), dispatch)


def case_of(folder: pathlib.Path, ids_TLK, home_T, plan: Plan, *how: str) -> Case:
    """These tokens under the contiguous placement, and under that of a plan."""
    rows = [
        {"header": True, "unigram_loss": 3.3},
        {"step": 0, "loss": 5.5, "heldout_loss": 5.4},
        {"step": 1, "loss": 2.5, "tokens_per_s": 100.0},
        {"step": 2, "loss": 2.25, "heldout_loss": 2.5},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Case(
        folder,
        before=measured(ids_TLK, home_T, Placement.contiguous(ids_TLK.shape[1], E, M), *how),
        after=measured(ids_TLK, home_T, plan.placement, *how),
        plan=plan,
    )


@pytest.fixture
def case(tmp_path):
    return make_case(tmp_path)


@pytest.fixture
def made(tmp_path):
    """`case_of` in a folder of its own."""
    return functools.partial(case_of, tmp_path)


@pytest.fixture
def shaped(made):
    """A case of the first so many layers and choices, the layers after one that is dense."""

    def shape(num_layers, top_k, *how):
        ids_TLK, home_T = routing()
        plan = Plan(shuffled(num_layers), layer_ids=tuple(range(1, num_layers + 1)))
        return made(np.ascontiguousarray(ids_TLK[:, :num_layers, :top_k]), home_T, plan, *how)

    return shape


@pytest.fixture
def gathered_case(tmp_path):
    return make_case(tmp_path, "gathered")


@pytest.fixture
def no_plots(monkeypatch):
    """Skips drawing where a test is about numbers."""
    monkeypatch.setattr(report, "write", lambda summary, out: {})
