"""A measurement that can be read is consistent; every other file is refused by name."""

import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.sim import measurement


def put(entry, index, value):
    def change(arrays):
        arrays[entry] = arrays[entry].copy()
        arrays[entry][index] = value

    return change


def meta(**changes):
    return lambda arrays: arrays["meta"].update(changes)


def cast(entry, kind):
    return lambda arrays: arrays.update({entry: arrays[entry].astype(kind)})


def cut(entry):
    return lambda arrays: arrays.update({entry: arrays[entry][:-1]})


BAD = {
    "an entry is missing": (lambda a: a.pop("token_home"), "'token_home' is missing"),
    "another format": (meta(format="x"), "meta.format, version"),
    "a later version": (meta(version=3), "meta.format, version"),
    "no machine": (meta(machine=None), "meta.machine = None"),
    "a count as text": (meta(num_experts="8"), "meta.num_experts = '8'"),
    "no experts": (meta(num_experts=0), "meta.num_experts = 0"),
    "a boolean count": (meta(top_k=True), "meta.top_k = True"),
    "uneven nodes": (meta(num_nodes=3), "meta.num_nodes = 3"),
    "an unknown dispatch": (meta(dispatch="teleport"), "meta.dispatch = 'teleport'"),
    "another combine": (meta(combine="partial"), "meta.combine = 'partial'"),
    "another top_k": (meta(top_k=3), "expert_ids.shape"),
    "other devices": (meta(num_devices=2), "LMM.shape"),
    "more experts than slots": (meta(num_experts=9), "computed_LP slots = 8"),
    "wide logits": (cast("logits", np.float64), "logits = 'float64 of rank 3'"),
    "float counts": (cast("dispatch_LMM", np.float64), "dispatch_LMM = 'float64"),
    "signed ids": (cast("expert_ids", np.int32), "expert_ids = 'int32"),
    "a rank too few": (lambda a: a.update(logits=a["logits"][0]), "float32 of rank 2"),
    "fewer homes": (cut("token_home"), "token_home.shape"),
    "fewer layers": (cut("computed_LP"), "computed_LP.shape"),
    "fewer texts": (cut("text_ids"), "text_ids.shape"),
    "nothing to compare": (lambda a: a.update(logits=a["logits"][:, :0]), "logits.shape"),
    "an expert too many": (put("expert_ids", (4, 1, 0), 8), "expert_ids[4, 1, 0] = 8"),
    "no expert at all": (put("expert_ids", ..., 255), "no token has an expert"),
    "a device too many": (put("token_home", 59, 4), "token_home[59] = 4"),
    "a device below 0": (put("token_home", 0, -1), "token_home[0] = -1"),
    "a negative position": (put("token_position", 3, -1), "token_position[3] = -1"),
    "fewer positions": (cut("token_position"), "token_position.shape"),
    "a negative count": (put("combine_LMM", (2, 0, 1), -1), "combine_LMM[2, 0, 1] = -1"),
    "negative padding": (put("padding_LMM", (0, 0, 1), -2), "padding_LMM[0, 0, 1] = -2"),
    "a row to itself": (put("dispatch_LMM", (1, 2, 2), 1), "dispatch_LMM[1, 2, 2] = 1"),
    "not a number": (put("logits", (0, 0, 0), np.nan), "logits = nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_entry_is_refused(case, name):
    change, words = BAD[name]
    change(case.before)
    case.write()
    with pytest.raises(Refused) as refused:
        measurement.read(case.folder / "before.npz")
    assert words in str(refused.value)


def test_a_good_one_reads_back_every_entry(case):
    case.write()
    read = measurement.read(case.folder / "before.npz")
    assert read.meta.num_devices == 4
    np.testing.assert_array_equal(read.combine_LMM, case.before["combine_LMM"])
    np.testing.assert_array_equal(read.logits_BSV, case.before["logits"])
    assert not read.routed_TL[5, 1]
    assert read.routed_TL[9, 2]
    slots_LP = case.before["computed_LP"]
    np.testing.assert_array_equal(read.load_LM[:, 1], slots_LP[:, 2] + slots_LP[:, 3])


def whole_file(case) -> bytes:
    case.write()
    return (case.folder / "before.npz").read_bytes()


def pickled(case) -> bytes:
    path = case.folder / "pickled.npz"
    arrays = {**case.before, "meta": np.array([{"a": 1}], object)}
    np.savez(path, **arrays)
    return path.read_bytes()


def meta_in_bytes(case) -> bytes:
    path = case.folder / "bytes.npz"
    np.savez(path, **case.before | {"meta": np.array(json.dumps(case.before["meta"]).encode())})
    return path.read_bytes()


@pytest.mark.parametrize(
    "make",
    [
        lambda case: b"",
        lambda case: b"not an archive",
        lambda case: whole_file(case)[:-100],
        lambda case: whole_file(case)[:2000],
        pickled,
        meta_in_bytes,
    ],
    ids=["empty", "text", "end cut off", "truncated", "pickled", "meta not text"],
)
def test_another_kind_of_file_is_refused(case, make):
    path = case.folder / "bad.npz"
    path.write_bytes(make(case))
    with pytest.raises(Refused, match=r"bad\.npz"):
        measurement.read(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(Refused, match="does not exist"):
        measurement.read(tmp_path / "none.npz")


def test_an_idle_layer_is_balanced():
    ratio_LM = measurement.ratio_to_mean(np.array([[0, 0], [1, 3]]))
    np.testing.assert_array_equal(ratio_LM, [[1, 1], [0.5, 1.5]])
