"""Dumps of SGLang's recorder, one of each rank: what becomes one trace, and what is refused."""

import pathlib

import numpy as np
import pytest

from moe_jax.errors import Refused
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


def stage_of(ids_TLK: np.ndarray, layers) -> np.ndarray:
    """What a stage with these layers records of them."""
    kept = np.isin(np.arange(LAYERS), list(layers))
    return np.where(kept[:, None], ids_TLK, -1)


def two_stages(folder: pathlib.Path, second=(2, 3), other_tokens: int = 0) -> np.ndarray:
    """Two data-parallel ranks in each of two stages, which number their ranks alike."""
    whole = [routing(7, 0), routing(4, 1), routing(3, 2), routing(2, 3)]
    for time, layers in enumerate(((1,), second)):
        for rank in range(2):
            passes = [
                one_pass(
                    number,
                    stage_of(whole[2 * rank + number], layers),
                    np.arange(len(whole[2 * rank + number])) + 10 * rank + other_tokens * time,
                )
                for number in range(2)
            ]
            dump(folder, rank, passes, time=time)
    return np.concatenate(whole)[:, 1:]


def test_stages_of_a_pipeline_are_put_together(tmp_path):
    ids_TLK = two_stages(tmp_path)
    hints = Hints(num_experts=EXPERTS)
    trace = read(tmp_path, hints)
    assert trace.layer_ids == (1, 2, 3)
    assert sorted(trace.seq_len.tolist()) == [2, 3, 4, 7]
    rows = {row.tobytes() for row in ids_TLK.astype(np.uint8)}
    assert {row.tobytes() for row in trace.expert_ids_TLK} == rows
    assert trace.num_tokens == len(ids_TLK)
    assert "layers of 2 pipeline stages are put together" in hints.notes


@pytest.mark.parametrize(
    ("second", "other_tokens", "missing"), [((1, 2), 0, "2"), ((2, 3), 100, "2-3")]
)
def test_stages_that_do_not_fit_are_refused(second, other_tokens, missing, tmp_path):
    """Layers that two stages share in part, and stages of other requests."""
    two_stages(tmp_path, second, other_tokens)
    with pytest.raises(Refused, match=f"recorder_0.5_0.pt = 'layers 1': layers {missing} of other"):
        read(tmp_path)


def test_identities_that_do_not_fit_their_pass_tell_nothing(tmp_path):
    """Too many in one pass and too few in the next are as many as all tokens."""
    passes = [one_pass(0, routing(3, 0), [5, 6]), one_pass(1, routing(2, 1), [7, 8, 9])]
    dump(tmp_path, 0, passes)
    hints = Hints(num_experts=EXPERTS)
    assert read(tmp_path, hints).token_ids_T is None
    assert any("input_ids are left out" in note for note in hints.notes)


def test_the_same_requests_in_two_ranks_stay_two(tmp_path):
    """Replicas that were sent the same text, and differ in last bits."""
    for rank in range(2):
        dump(tmp_path, rank, [one_pass(0, routing(3, rank), [5, 6, 7])])
    assert read(tmp_path).seq_len.tolist() == [3, 3]


def test_a_rank_without_any_expert_is_idle(tmp_path):
    none_TLK = np.full((2, LAYERS, TOP_K), -1)
    dump(tmp_path, 0, [one_pass(0, none_TLK, [5, 6])])
    with pytest.raises(Refused, match="no token chose an expert"):
        read(tmp_path)
    dump(tmp_path, 1, [one_pass(0, routing(2, 0), [5, 6])])
    assert read(tmp_path).seq_len.tolist() == [2]


def gathered(folder: pathlib.Path, lengths, honest: bool, layers=range(LAYERS)) -> None:
    """Data-parallel ranks whose passes have these tokens; all have one text in the beginning.

    Not honest, every rank keeps as many of the first rows of all as it has tokens.
    """
    passes: list[list[dict]] = [[] for _ in lengths]
    for number, tokens in enumerate(zip(*lengths, strict=True)):
        shared = routing(3, 99)
        rows = [np.r_[shared, routing(n, 10 * number + r)][:n] for r, n in enumerate(tokens)]
        for rank, n in enumerate(tokens):
            ids_TLK = rows[rank] if honest else np.concatenate(rows)[:n]
            ids_TLK = stage_of(ids_TLK, layers)
            text = np.r_[7, 8, 9, np.arange(n) + 1000 * rank][:n]
            passes[rank].append(one_pass(number, ids_TLK, text))
    for rank, records in enumerate(passes):
        dump(folder, rank, records, time=layers[0])


@pytest.mark.parametrize(
    "lengths", [((13, 12), (13, 12)), ((22, 0, 9), (20, 5, 30)), ((30,), (4,))]
)
def test_rows_of_other_ranks_are_refused(lengths, tmp_path):
    """Data-parallel attention without all-to-all: a rank has rows of all, the first rank's first.

    Rows that two ranks with other tokens have in common show it, where there are enough of them.
    """
    gathered(tmp_path, lengths, honest=True)
    assert read(tmp_path).num_tokens == sum(map(sum, lengths))
    gathered(tmp_path, lengths, honest=False)
    if min(map(sum, lengths)) < 16:
        assert read(tmp_path).num_tokens == sum(map(sum, lengths))  # may be chance
        return
    with pytest.raises(Refused, match=r"0.5_1.pt = 'rows of .*0.5_0.pt': .*--moe-a2a-backend"):
        read(tmp_path)
    (tmp_path / "expert_distribution_recorder_0.5_1.pt").unlink()
    assert read(tmp_path).num_tokens == sum(lengths[0])  # as it is told to


def test_rows_of_other_ranks_are_refused_in_stages_too(tmp_path):
    for layers in (range(2), range(2, LAYERS)):
        gathered(tmp_path, ((22,), (19,)), honest=False, layers=layers)
    with pytest.raises(Refused, match="rows of"):
        read(tmp_path)


def test_routers_that_choose_alike_are_not_taken_for_copied_rows(tmp_path):
    """All tokens go to the same experts, or to one of two: ranks agree by chance."""
    for ids_TLK in (
        np.zeros((40, LAYERS, 1)),
        np.arange(40)[:, None, None] % np.full((LAYERS, 1), 2),
    ):
        for rank in range(2):
            dump(tmp_path, rank, [one_pass(0, ids_TLK, np.arange(40) + 100 * rank)])
        assert read(tmp_path).seq_len.tolist() == [40, 40]


def test_passes_of_all_ranks_are_in_order_of_time(tmp_path):
    """So that a half by time is one: the first passes of every rank, identities with them."""
    for rank, time in ((0, 19), (1, 18)):  # later files of earlier ranks
        passes = [
            one_pass(number, routing(3, 10 * rank + number), [rank, number, 7], [1, 2])
            for number in (4, 9, 10)
        ]
        dump(tmp_path, rank, passes[rank:], time=time)
    trace = read(tmp_path)
    wanted = [(0, 4), (0, 9), (1, 9), (0, 10), (1, 10)]
    assert trace.token_ids_T.reshape(-1, 3)[:, :2].tolist() == [list(pair) for pair in wanted]
    assert trace.seq_len.tolist() == [1, 2] * 5
    ids = np.concatenate([routing(3, 10 * rank + number) for rank, number in wanted])
    np.testing.assert_array_equal(trace.expert_ids_TLK, ids)


def test_sequences_that_go_on_from_an_earlier_pass_are_counted(tmp_path):
    """Chunks of a long prompt; both ranks record them, and one stays."""
    whole = routing(9, 0)
    for rank in range(2):
        passes = [
            one_pass(0, whole[:4], lens=[0, 4], positions=numbers(range(4))),
            one_pass(1, whole[4:], lens=[3, 0, 2], positions=numbers([4, 5, 6, 0, 1])),
        ]
        dump(tmp_path, rank, passes)
    hints = Hints(num_experts=EXPERTS)
    assert read(tmp_path, hints).seq_len.tolist() == [4, 3, 2]
    (note,) = [note for note in hints.notes if "position 0" in note]
    assert note.startswith("1 of 3 sequences begin after position 0")
    assert "--chunked-prefill-size" in note
    (tmp_path / "expert_distribution_recorder_17.5_1.pt").unlink()
    for positions in (numbers(range(9)), tb.list_of(numbers(range(9)))):  # the latter tell nothing
        dump(tmp_path, 0, [one_pass(0, whole, lens=[9], positions=positions)])
        hints = Hints(num_experts=EXPERTS)
        read(tmp_path, hints)
        assert not any("position 0" in note for note in hints.notes)


def test_ranks_that_split_their_tokens_are_refused(tmp_path):
    """With an all-to-all, ranks that share their attention each route a part of the rows."""
    whole = routing(8, 0)
    none_TLK = np.full((4, LAYERS, TOP_K), -1)
    for rank, ids_TLK in enumerate((whole[:4], whole[4:])):
        dump(tmp_path, rank, [one_pass(0, np.concatenate([ids_TLK, none_TLK]), np.arange(8))])
    with pytest.raises(Refused, match=r"17.5_0.pt = 'tokens without.*as many data-parallel ranks"):
        read(tmp_path)
