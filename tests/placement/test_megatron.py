"""Megatron-LM's traces of several ranks: pipeline stages put together, repeats left out."""

import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import __main__ as command_line
from moe_jax.placement.formats import convert as convert_lib
from moe_jax.placement.formats.hints import Hints
from moe_jax.routing import trace as trace_lib

LAYERS, STEPS, TOKENS, EXPERTS = 4, 3, 5, 16


def experts(step: int, data: int, layer: int) -> list[list[int]]:
    """The experts of one layer: different in every step, data-parallel rank and layer."""
    rng = np.random.default_rng([step, data, layer])
    return [rng.permutation(EXPERTS)[:2].tolist() for _ in range(TOKENS)]


def write(folder, ranks: dict[int, tuple[int, dict[int, int]]], skip=()) -> None:
    """Files of ranks: rank -> (data-parallel rank, its number of a layer -> the model's)."""
    folder.mkdir(exist_ok=True)
    for rank, (data, layers) in ranks.items():
        lines = [
            {
                "step": step,
                "stage": "pre_dispatch",
                "block": "decoder",
                "layer": said,
                "rank": rank,
                "num_tokens": TOKENS,
                "topk": 2,
                "top_indices": experts(step, data, layer),
            }
            for step in range(STEPS)
            for said, layer in layers.items()
            if (step, rank, layer) not in skip
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"router_trace_rank{rank}.jsonl").write_text(text)


def check(trace, numbers: tuple[int, ...], datas: tuple[int, ...]) -> None:
    """The trace holds every layer of every step and data-parallel rank, token by token."""
    assert trace.layer_ids == numbers
    assert trace.seq_len.tolist() == [TOKENS] * (STEPS * len(datas))
    wanted = [
        [experts(step, data, layer)[token] for layer in range(LAYERS)]
        for step in range(STEPS)
        for data in datas
        for token in range(TOKENS)
    ]
    assert trace.expert_ids_TLK.tolist() == wanted


def whole(*layers: int) -> dict[int, int]:
    return {layer: layer for layer in layers}


@pytest.mark.parametrize("order", ["stages outermost", "data outermost"])
def test_stages_are_put_together(order, tmp_path):
    """Two data-parallel ranks x two stages, in both orders of Megatron-LM's rank numbers."""
    stage, data = (0, 0, 1, 1), (0, 1, 0, 1)
    if order == "data outermost":
        stage, data = data, stage
    layers = [whole(0, 1), whole(2, 3)]
    write(tmp_path / "t", {rank: (data[rank], layers[stage[rank]]) for rank in range(4)})
    hints = Hints()
    check(convert_lib.read(tmp_path / "t", hints).value, (0, 1, 2, 3), (0, 1))
    assert "layers of 2 pipeline stages are put together" in hints.notes


def test_three_stages_of_unequal_size(tmp_path):
    write(tmp_path / "t", {0: (0, whole(0)), 1: (0, whole(1, 2)), 2: (0, whole(3))})
    check(convert_lib.read(tmp_path / "t", Hints()).value, (0, 1, 2, 3), (0,))


def test_stages_that_count_from_0_have_to_be_said(tmp_path, capsys):
    first, second = {0: 0, 1: 1}, {0: 2, 1: 3}
    folder = tmp_path / "t"
    write(folder, {0: (0, first), 1: (1, first), 2: (0, second), 3: (1, second)})
    hints = Hints(pipeline_stages=2)
    check(convert_lib.read(folder, hints).value, (0, 1, 2, 3), (0, 1))
    assert any("dense layers at an end are unseen" in note for note in hints.notes)
    hints = Hints()
    assert convert_lib.read(folder, hints).value.num_layers == 2
    assert any("give --pipeline-stages" in note for note in hints.notes)
    out = tmp_path / "o.npz"
    command = ["convert", str(folder), str(out), "--pipeline-stages=2"]
    assert command_line.main(command) == 0
    check(trace_lib.load(out), (0, 1, 2, 3), (0, 1))
    assert "layers of 2 pipeline stages" in capsys.readouterr().out


def test_dense_layers_inside_keep_their_numbers(tmp_path):
    write(tmp_path / "t", {0: (0, {1: 0, 2: 1}), 1: (0, {0: 2, 1: 3})})
    trace = convert_lib.read(tmp_path / "t", Hints(pipeline_stages=2)).value
    check(trace, (1, 2, 3, 4), (0,))


def test_ranks_that_repeat_another_are_left_out(tmp_path):
    """Tensor-parallel ranks see the same tokens: kept, they would stand in both halves."""
    write(tmp_path / "t", {rank: (rank // 2, whole(0, 1, 2, 3)) for rank in range(4)})
    hints = Hints()
    check(convert_lib.read(tmp_path / "t", hints).value, (0, 1, 2, 3), (0, 1))
    assert any("tensor-parallel" in note for note in hints.notes)


def lines_of(path, layers, *passes) -> None:
    """A step of one rank with several passes, one after the other."""
    lines = [
        {"step": 0, "layer": layer, "rank": 0, "num_tokens": TOKENS, "topk": 2, "top_indices": ids}
        for one in passes
        for layer, ids in ((layer, experts(one, 0, layer)) for layer in layers)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_microbatches_of_a_step_are_passes_and_recomputed_ones_are_left_out(tmp_path):
    lines_of(tmp_path / "router_trace_rank0.jsonl", range(LAYERS), 0, 1, 0, 2)
    hints = Hints()
    trace = convert_lib.read(tmp_path / "router_trace_rank0.jsonl", hints).value
    check(trace, (0, 1, 2, 3), (0,))
    assert trace.seq_name == tuple(f"step 0 rank 0 pass {number}" for number in (0, 1, 3))
    assert any("recomputed" in note for note in hints.notes)


def test_layers_that_count_from_1_have_to_be_said(tmp_path, capsys):
    source, out = tmp_path / "router_trace_rank0.jsonl", tmp_path / "o.npz"
    lines_of(source, (1, 2, 3), 0, 1)
    assert command_line.main(["convert", str(source), str(out)]) == 0
    assert trace_lib.load(out).layer_ids == (1, 2, 3)
    assert "give --layer-base=1" in capsys.readouterr().out
    assert command_line.main(["convert", str(source), str(out), "--layer-base=1"]) == 0
    assert trace_lib.load(out).layer_ids == (0, 1, 2)
    assert "--layer-base" not in capsys.readouterr().out
    lines_of(source, (0, 1, 2), 0, 1)
    with pytest.raises(Refused, match="layer = 0: at least --layer-base=1"):
        convert_lib.read(source, Hints(layer_base=1))


@pytest.mark.parametrize(
    ("ranks", "stages", "skip", "message"),
    [
        ({0: (0, whole(0, 1, 2)), 1: (0, whole(2, 3))}, None, (), "layer 0"),
        ({0: (0, whole(0, 1)), 1: (0, whole(2, 3)), 2: (1, whole(0, 1))}, None, (), "equally many"),
        ({0: (0, whole(0, 1)), 1: (0, whole(2, 3))}, None, [(1, 1, 2)], "step 1 rank 0 layer"),
        ({0: (0, whole(0, 1)), 1: (1, whole(0, 1))}, 3, (), "divides the 2 ranks"),
        ({0: (0, whole(0, 1)), 1: (1, whole(0, 1))}, 0, (), "divides the 2 ranks"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks, stages, skip, message, tmp_path):
    write(tmp_path / "t", ranks, skip)
    with pytest.raises(Refused, match=message):
        convert_lib.read(tmp_path / "t", Hints(pipeline_stages=stages))
