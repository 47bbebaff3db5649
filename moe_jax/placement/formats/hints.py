"""What the user says where a format does not: devices, experts, layer numbers.

A hint never overrides a file: where both speak, they agree or the file is refused. Everything that
is inferred leaves a note, so that the user reads what was assumed.
"""

import dataclasses
import re

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats import raw
from moe_jax.routing import checks

MAX_LAYERS = 1 << 16


@dataclasses.dataclass
class Hints:
    """Options of a conversion, and the notes that it leaves.

    Attributes:
      devices: expert-parallel devices of a plan.
      num_experts: logical experts of a layer.
      layer_ids: the model's numbers of the layers: names the rows of a format that does not number
        them (which stand in rising order), selects among the rows of one that does.
      pipeline_stages: of a Megatron-LM trace whose stages number their layers from 0.
      layer_base: the number that a Megatron-LM trace gives the model's first layer.
      notes: what was inferred or left out, one sentence each.
    """

    devices: int | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    pipeline_stages: int | None = None
    layer_base: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def devices_of(self, said: int | None, format_name: str) -> int:
        """The number of devices: the file's, else the option's."""
        devices = agree("devices", self.devices, said)
        if devices is None:
            raise Refused(
                "devices",
                None,
                f"{format_name} files do not say how many there are",
                "Add --devices=8 (the expert-parallel size that the plan was made for)",
            )
        return raw.whole_number(devices, "devices", 1)

    def experts_of(self, ids: np.ndarray, said: int | None = None) -> int:
        """The number of experts of a trace: the file's, the option's, or the largest id + 1."""
        experts = agree("num_experts", self.num_experts, said)
        if experts is None:
            experts = int(ids.max()) + 1
            self.note(
                f"num_experts {experts} is the largest id + 1: give --num-experts if there are more"
            )
        experts = raw.whole_number(experts, "num_experts", 1)
        bad = (ids >= experts) | (ids < -1)
        if bad.any():
            index = np.unravel_index(int(bad.argmax()), ids.shape)
            raise Refused(
                "expert id" + "".join(f"[{int(i)}]" for i in index),
                int(ids[index]),
                f"ids go from 0 to {experts - 1}",
                "Correct the file or --num-experts",
            )
        return experts

    def experts_in_map(self, slots_LP: np.ndarray) -> int:
        """The number of experts of a map, in which every expert has a slot."""
        experts = int(slots_LP.max()) + 1
        return raw.whole_number(agree("num_experts", self.num_experts, experts), "num_experts", 1)

    def name_layers(self, count: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """As `select_layers`, for the rows of a format that does not number its layers.

        They are the model's in rising order, whatever order the option has; without it 0, 1, 2, ...
        """
        if self.layer_ids is None:
            self.note(f"layers are numbered 0 to {count - 1}: the file has no layer numbers")
        numbers = checks.valid_layer_ids(self.layer_ids, count)
        return self.select_layers(tuple(sorted(numbers)))

    def select_layers(self, numbers: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
        """Which rows of a format that numbers its layers are kept, and their numbers."""
        if self.layer_ids is None:
            return np.arange(len(numbers)), numbers
        row_of = {number: row for row, number in enumerate(numbers)}
        checks.valid_layer_ids(self.layer_ids, len(self.layer_ids))
        for number in self.layer_ids:
            if number not in row_of:
                raise Refused(
                    "layer_ids",
                    number,
                    f"the file has layers {shown_layers(numbers)}",
                    "Choose among these",
                )
        return np.array([row_of[number] for number in self.layer_ids]), self.layer_ids


def parse_layer_ids(text: str) -> tuple[int, ...]:
    """`3-60,62` -> (3, 4, ..., 60, 62)."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part, re.ASCII)
        if not match:
            raise Refused("layer_ids", text, "numbers and ranges such as 3-60,62", "Correct it")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or len(numbers) + last - first >= MAX_LAYERS:
            raise Refused("layer_ids", part, f"rising, at most {MAX_LAYERS} layers", "Correct it")
        numbers.extend(range(first, last + 1))
    return checks.valid_layer_ids(tuple(numbers), len(numbers))


def shown_layers(numbers: tuple[int, ...]) -> str:
    """`3-60` for consecutive numbers, else all of them, shortened."""
    if len(numbers) > 1 and numbers == tuple(range(numbers[0], numbers[0] + len(numbers))):
        return f"{numbers[0]}-{numbers[-1]}"
    text = ",".join(str(number) for number in numbers)
    return text if len(text) <= 60 else text[:60] + "..."


def agree(field: str, option: int | None, said: int | None) -> int | None:
    """What the file says, else the option; refused where they differ."""
    if option is not None and said is not None and option != said:
        fix = f"Leave {field} out, or give a file that says {option}"
        raise Refused(field, option, f"the file says {said}", fix)
    return said if option is None else option
