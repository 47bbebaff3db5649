"""Experts that have to stay on a device: `--pin LAYER:EXPERT:DEVICE`, or a file of such lines.

LAYER is the model's own number, as in traces and plans; `*` is every layer. A plan that breaks a
pin is never offered, so searches that know nothing of pins may go on as they are.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from moe_jax.errors import Refused

RULE = "LAYER:EXPERT:DEVICE as 3:17:0, `*` as LAYER being every layer, or a file of such lines"
LONGEST = 2**24  # bytes of a file


@dataclasses.dataclass(frozen=True, eq=False)
class Pins:
    """Who has to be where.

    Attributes:
      held_LEM: this expert has to be on this device. Without replicas one device at most.
    """

    held_LEM: Bool[np.ndarray, "L E M"]

    @property
    def device_LE(self) -> np.ndarray:
        """int64 [L, E]: the device an expert is pinned to, the first of several; -1 where free."""
        return np.where(self.held_LEM.any(axis=2), self.held_LEM.argmax(axis=2), -1)

    def kept(self, layer: int, device_E: np.ndarray) -> bool:
        """Labels of a layer without replicas keep its pins."""
        pin_E = self.device_LE[layer]
        return bool(((pin_E < 0) | (pin_E == device_E)).all())

    def broken(self, held_LEM: Bool[np.ndarray, "L E M"]) -> int:
        """Pins that a plan does not keep; `held_LEM` says which device holds which expert."""
        return int((self.held_LEM & ~held_LEM).sum())

    def check(self, slots_per_device: int, replicas: bool, layer_ids: Sequence[int]) -> None:
        """Refuses pins that no plan with that many slots on every device can keep."""
        if not replicas:
            many_LE = self.held_LEM.sum(axis=2) > 1
            for layer, expert in np.argwhere(many_LE)[:1]:
                raise Refused(
                    "pin",
                    f"layer {layer_ids[layer]}, expert {expert}",
                    "an expert without replicas lives on one device",
                    "Pin it once, or give it room for copies with --slots",
                )
        free_L = slots_per_device * self.held_LEM.shape[2] - self.held_LEM.sum(axis=(1, 2))
        loose_L = (~self.held_LEM.any(axis=2)).sum(axis=1)
        for layer in np.flatnonzero(loose_L > free_L)[:1]:
            raise Refused(
                "pin",
                f"layer {layer_ids[layer]}",
                f"{loose_L[layer]} experts that are not pinned have {max(free_L[layer], 0)} slots",
                "Pin fewer copies",
            )
        full_LM = self.held_LEM.sum(axis=1) > slots_per_device
        for layer, device in np.argwhere(full_LM)[:1]:
            raise Refused(
                "pin",
                f"layer {layer_ids[layer]}, device {device}",
                f"a device has {slots_per_device} slots, {self.held_LEM[layer, :, device].sum()} "
                "experts are pinned to it",
                "Pin fewer experts there",
            )


def parse(
    words: Sequence[str], experts: int, devices: int, layer_ids: Sequence[int], field: str = "pin"
) -> Pins:
    """From what was typed: triples, and paths of files that hold one triple per line.

    Args:
      words: as typed.
      experts, devices: how many there are.
      layer_ids: the model's numbers of the layers.
      field: the option's name, for errors.
    """
    held_LEM = np.zeros((len(layer_ids), experts, devices), bool)
    row_of = {layer: row for row, layer in enumerate(layer_ids)}
    for where, word in _triples(words, field):
        layer, expert, device = _numbers(where, word)
        for name, value, limit in (("expert", expert, experts), ("device", device, devices)):
            if not 0 <= value < limit:
                raise Refused(where, word, f"{name}s go from 0 to {limit - 1}", "Correct it")
        if layer is not None and layer not in row_of:
            rule = f"experts are in the layers {layer_ids[0]} to {layer_ids[-1]}"
            raise Refused(where, word, rule, "Use the model's own layer numbers")
        held_LEM[slice(None) if layer is None else row_of[layer], expert, device] = True
    return Pins(held_LEM)


def listed(
    field: str, words: str, experts: int, devices: int, layer_ids: Sequence[int]
) -> Pins | None:
    """As `parse`, from one string with commas between; None if there is nothing in it."""
    typed = [word.strip() for word in words.split(",") if word.strip()]
    return parse(typed, experts, devices, layer_ids, field) if typed else None


def _triples(words: Sequence[str], field: str):
    """(where it stands, triple)."""
    for word in words:
        if word.count(":") == 2 and not pathlib.Path(word).is_file():
            yield field, word
            continue
        for number, line in enumerate(_lines(word, field), start=1):
            if triple := line.split("#")[0].strip():
                yield f"{field} {word} line {number}", triple


def _lines(path: str, field: str) -> list[str]:
    file = pathlib.Path(path)
    if not file.is_file():
        raise Refused(field, path, f"neither a triple nor a file: {RULE}", "Correct it")
    if file.stat().st_size > LONGEST:
        raise Refused(field, path, f"a file of at most {LONGEST} bytes", "Use `*` for all layers")
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise Refused(field, path, f"not a text file ({error})", RULE) from error


def _numbers(where: str, word: str) -> tuple[int | None, int, int]:
    parts = [part.strip() for part in word.split(":")]
    numbers = [part for part in parts if part.isascii() and part.isdigit() and len(part) < 10]
    if len(parts) != 3 or len(numbers) + (parts[0] == "*") != 3:
        raise Refused(where, word, RULE, "Correct it")
    layer = None if parts[0] == "*" else int(parts[0])
    return layer, int(parts[1]), int(parts[2])
