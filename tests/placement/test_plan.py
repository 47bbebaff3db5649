"""Placements and plan files: properties, round trips, every bad file answered with `Refused`."""

import contextlib
import json

import numpy as np
import pytest

from moe_jax.errors import Refused
from moe_jax.placement import plan as plan_lib
from moe_jax.placement.plan import Placement, Plan

GOOD = {
    "format": "moe_jax.placement",
    "version": 1,
    "num_experts": 4,
    "num_devices": 2,
    "physical_to_logical_map": [[0, 1, 2, 3], [3, 1, 0, 2], [0, 2, 1, 3]],
}


def write(path, **changes) -> None:
    """A plan file with its right digest where the map is possible; None leaves a field out."""
    fields = {**GOOD, **changes}
    if "digest" not in fields:
        try:
            slots = np.array(fields["physical_to_logical_map"])
            digest = Placement(slots, fields["num_experts"], fields["num_devices"]).digest
        except (Refused, ValueError, TypeError):
            digest = "0"
        fields["digest"] = digest
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def test_properties_with_replicas():
    placement = Placement(np.array([[0, 1, 2, 0], [2, 1, 1, 0]]), 3, 2)
    np.testing.assert_array_equal(placement.num_replicas_LE, [[2, 1, 1], [1, 2, 1]])
    np.testing.assert_array_equal(
        placement.logical_to_physical_LER,
        [[[0, 3], [1, -1], [2, -1]], [[3, -1], [1, 2], [0, -1]]],
    )
    assert placement.logical_to_physical_LER.dtype == np.int32
    assert placement.slots_per_device == 2
    with pytest.raises(Refused, match="without replicas"):
        _ = placement.device_LE


def test_device_form_and_back():
    rng = np.random.default_rng(0)
    for _ in range(100):
        devices = int(rng.choice([1, 2, 4]))
        device_LE = rng.permuted(np.tile(np.arange(8) % devices, (3, 1)), axis=1)
        placement = Placement.from_device_LE(device_LE, devices)
        np.testing.assert_array_equal(placement.device_LE, device_LE)
        slots = placement.logical_to_physical_LER[:, :, 0]
        experts = np.take_along_axis(placement.physical_to_logical_LP, slots, axis=1)
        np.testing.assert_array_equal(experts, np.tile(np.arange(8), (3, 1)))


def test_contiguous():
    placement = Placement.contiguous(2, 6, 3)
    np.testing.assert_array_equal(placement.device_LE, [[0, 0, 1, 1, 2, 2]] * 2)


def test_digest_is_pinned():
    """Checkpoints hold it: it must never change for the same map."""
    assert Placement.contiguous(2, 4, 2).digest == (
        "c4316178094e7a873a69c152b36c46bb49d385f3b155beba59cd018029e93e42"
    )


def test_equality_and_hash():
    a, b = Placement.contiguous(2, 4, 2), Placement.contiguous(2, 4, 2)
    assert a == b
    assert len({a, b, Placement.contiguous(2, 4, 4)}) == 2


def test_round_trip(tmp_path):
    placement = Placement(np.array(GOOD["physical_to_logical_map"]), 4, 2)
    plan = Plan(placement, (2, 4, 9), {"name": "x"}, {"seconds": 0.5})
    plan.write(tmp_path / "deep" / "p.json")
    assert Plan.read(tmp_path / "deep" / "p.json") == plan
    fields = json.loads((tmp_path / "deep" / "p.json").read_text())
    assert fields["physical_to_logical_map"] == GOOD["physical_to_logical_map"]
    assert fields["digest"] == placement.digest


def rows(*changed) -> list[list[int]]:
    table = [list(row) for row in GOOD["physical_to_logical_map"]]
    for layer, slot, value in changed:
        table[layer][slot] = value
    return table


BAD_FILES = {
    "format": ({"format": "other"}, "format"),
    "no format": ({"format": None}, "format"),
    "version 2": ({"version": 2}, "version"),
    "version as text": ({"version": "1"}, "version"),
    "version true": ({"version": True}, "version"),
    "wrong digest": ({"digest": "ab"}, "digest"),
    "no digest": ({"digest": None}, "digest"),
    "no devices": ({"num_devices": None}, "num_devices"),
    "no devices at all": ({"num_devices": 0}, "num_devices"),
    "devices true": ({"num_devices": True}, "num_devices"),
    "devices do not divide": ({"num_devices": 3}, "Use 2 or 4"),
    "expert too large": ({"physical_to_logical_map": rows((2, 3, 4))}, r"map\[2\]\[3\] = 4"),
    "expert negative": ({"physical_to_logical_map": rows((1, 0, -1))}, r"map\[1\]\[0\] = -1"),
    "expert as text": ({"physical_to_logical_map": rows((1, 2, "0"))}, r"map\[1\]\[2\]"),
    "expert true": ({"physical_to_logical_map": rows((0, 1, True))}, r"map\[0\]\[1\]"),
    "expert fraction": ({"physical_to_logical_map": rows((0, 1, 1.0))}, r"map\[0\]\[1\]"),
    "expert huge": ({"physical_to_logical_map": rows((0, 1, 10**30))}, r"map\[0\]\[1\]"),
    "expert missing": ({"physical_to_logical_map": rows((1, 2, 3))}, r"map\[1\].*expert 0"),
    "twice on a device": (
        {"physical_to_logical_map": [[0, 1, 2, 2]], "num_experts": 3},
        r"map\[0\]\[3\] = 2",
    ),
    "ragged": ({"physical_to_logical_map": [[0, 1, 2, 3], [0, 1, 2]]}, r"map\[1\]"),
    "no layers": ({"physical_to_logical_map": []}, "map"),
    "empty layers": ({"physical_to_logical_map": [[], []]}, "map"),
    "map is a number": ({"physical_to_logical_map": 3}, "map"),
    "map of numbers": ({"physical_to_logical_map": [0, 1]}, "map"),
    "no map": ({"physical_to_logical_map": None}, "map"),
    "more experts than slots": ({"num_experts": 2**31 - 1}, "needs a slot"),
    "experts negative": ({"num_experts": -4}, "num_experts"),
    "layer ids too few": ({"layer_ids": [0]}, "layer_ids"),
    "layer ids twice": ({"layer_ids": [0, 1, 1]}, "layer_ids"),
    "layer ids text": ({"layer_ids": "012"}, "layer_ids"),
    "topology a list": ({"topology": []}, "topology"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused(name, tmp_path):
    changes, message = BAD_FILES[name]
    write(tmp_path / "p.json", **changes)
    with pytest.raises(Refused, match=message):
        Plan.read(tmp_path / "p.json")


def test_the_good_file_is_read(tmp_path):
    write(tmp_path / "p.json")
    assert Plan.read(tmp_path / "p.json").placement.num_layers == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": NaN}', "[" * 100_000, "\x00", '{"format": 1}']
)
def test_not_a_plan_is_refused(text, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(Refused):
        Plan.read(tmp_path / "p.json")


def test_a_plan_of_another_program_is_told_from_an_old_one(tmp_path):
    """`convert` reads it; solving again would be no help."""
    (tmp_path / "p.json").write_text('{"physical_to_logical_map": [[0, 1]]}')
    with pytest.raises(Refused, match=r"format = None: .*moe_jax\.placement convert IN plan\.json"):
        Plan.read(tmp_path / "p.json")


def test_binary_and_missing_files_are_refused(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xff\xfe\x80")
    for path in (tmp_path / "p.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(Refused, match="plan"):
            Plan.read(path)


def test_mutated_files_are_refused_or_valid(tmp_path):
    write(tmp_path / "whole.json")
    whole = (tmp_path / "whole.json").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        mutated = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 4)):
            mutated[at] = rng.integers(256)
        (tmp_path / "p.json").write_bytes(bytes(mutated))
        with contextlib.suppress(Refused):
            assert Plan.read(tmp_path / "p.json").placement.num_layers == 3


@pytest.mark.parametrize(
    ("field", "sizes"),
    [
        ("layers", {"num_layers": 3, "num_experts": 4, "num_devices": 2}),
        ("num_experts", {"num_layers": 2, "num_experts": 8, "num_devices": 2}),
        ("num_devices", {"num_layers": 2, "num_experts": 4, "num_devices": 4}),
    ],
)
def test_plan_of_another_model_is_refused(field, sizes):
    plan = Plan(Placement.contiguous(2, 4, 2))
    plan_lib.check_fits(plan, num_layers=2, num_experts=4, num_devices=2)
    with pytest.raises(Refused, match=f"plan {field}"):
        plan_lib.check_fits(plan, **sizes)


@pytest.mark.parametrize("said", [(), (3, 5)])
def test_a_plan_of_a_model_has_its_numbers_of_layers(said):
    """0..L-1 is what a plan says of layers that nobody numbered."""
    plan = Plan(Placement.contiguous(2, 4, 2), said)
    assert plan_lib.of_model(plan, (3, 5)) == Plan(plan.placement, (3, 5))
    assert plan_lib.of_model(Plan(Placement.contiguous(1, 1, 1)), ()).layer_ids == (0,)


@pytest.mark.parametrize(("said", "shown"), [((4, 5), "4-5"), ((1, 0), "1,0"), ((5, 3), "5,3")])
@pytest.mark.parametrize("here", [(0, 1), (3, 5)])
def test_a_plan_of_other_layers_is_refused(said, shown, here):
    with pytest.raises(Refused, match=rf"layer_ids = '{shown}': .*layers are {here[0]}[-,]"):
        plan_lib.of_model(Plan(Placement.contiguous(2, 4, 2), said), here)


def test_uneven_devices_are_refused():
    with pytest.raises(Refused, match="same number of experts"):
        Placement.from_device_LE(np.array([[0, 0, 0, 1]]), 2)
