"""Dumps of SGLang's recorder, one of each rank: what becomes one trace, and what is refused."""

import pathlib

import numpy as np

from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats.hints import Hints
from moe_jax.routing.trace import Trace
from tests import torch_bytes as tb

LAYERS, EXPERTS, TOP_K = 4, 16, 2


def routing(tokens: int, seed: int) -> np.ndarray:
    """Experts [T, L, K]."""
    draws = np.random.default_rng(seed).random((tokens, LAYERS, EXPERTS))
    return draws.argsort(axis=2)[:, :, :TOP_K]


def numbers(values) -> bytes:
    return tb.list_of(*(tb.number(int(value)) for value in values))


def one_pass(number: int, ids_TLK: np.ndarray, tokens=(), lens=(), **more) -> dict:
    """Fields of a record; tensors are arrays."""
    lens = lens or [len(ids_TLK)]
    fields = {"forward_pass_id": tb.number(number), "extend_seq_lens": numbers(lens)}
    if len(tokens):
        fields["input_ids"] = numbers(tokens)
    ids_LTK = np.ascontiguousarray(ids_TLK.transpose(1, 0, 2), "<i4")
    return fields | more | {"topk_ids_of_layer": ids_LTK}


def dump(
    folder: pathlib.Path, rank: int, passes: list[dict], slots_LP: np.ndarray | None = None, time=17
) -> None:
    """`expert_distribution_recorder_TIME_RANK.pt`, as the recorder names it."""
    storages: list[np.ndarray] = []

    def tensor(array: np.ndarray) -> bytes:
        storages.append(array)
        return tb.whole(array, str(len(storages) - 1))

    records = []
    for fields in passes:
        whole = {key: tensor(v) if isinstance(v, np.ndarray) else v for key, v in fields.items()}
        records.append(tb.dict_of(rank=tb.number(rank), **whole))
    whole = {"records": tb.list_of(*records)}
    if slots_LP is not None:
        whole["last_physical_to_logical_map"] = tensor(np.ascontiguousarray(slots_LP, "<i8"))
    path = folder / f"expert_distribution_recorder_{time}.5_{rank}.pt"
    path.write_bytes(tb.archive(tb.dict_of(**whole), *storages))


def read(folder: pathlib.Path, hints: Hints | None = None) -> Trace:
    return convert_lib.read(folder, hints or Hints(num_experts=EXPERTS)).value


def test_ranks_that_choose_other_copies_repeat_each_other(tmp_path):
    """Under a plan with copies every tensor-parallel rank takes the one that is near to it."""
    slots_LP = np.tile(np.r_[np.arange(EXPERTS), np.arange(EXPERTS)], (LAYERS, 1))
    ids_TLK = routing(5, 0)
    for rank in range(2):
        dump(tmp_path, rank, [one_pass(0, ids_TLK + rank * EXPERTS)], slots_LP)
    hints = Hints()
    trace = read(tmp_path, hints)
    np.testing.assert_array_equal(trace.expert_ids_TLK, ids_TLK)
    assert trace.num_experts == EXPERTS
    assert any("repeat another one" in note for note in hints.notes)
