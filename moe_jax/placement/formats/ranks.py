"""Dumps of SGLang's recorder, one of each rank, put together.

Axes: T tokens, L layers of the model, K experts per token, P slots.

Nothing in a dump says what its rank is for, so what they hold has to:

- Tensor-parallel ranks record the same tokens and experts: one of them stays. Experts, not slots:
  under a plan with copies each rank chooses its own.
- Stages of a pipeline record the same tokens in layers of their own, which are put together. Every
  stage numbers its ranks from 0, and the n-th rank of each saw the same tokens.
- Other ranks (data-parallel) have requests of their own. Where their tokens meet before the experts
  (attention data-parallel, no all-to-all), a rank routes the rows of all of them and keeps the
  first, as many as it has tokens: rows of the first rank beside tokens of its own. This is refused
  where enough rows show it (`ENOUGH`).
- With an all-to-all, ranks that share their attention split its tokens: each has the same tokens
  and the experts of a part of them. This is refused, too.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from moe_jax.errors import Refused
from moe_jax.placement.formats.hints import Hints, shown_layers

ENOUGH = 16  # rows unlike each other that two ranks do not have in common by chance


class Pass(NamedTuple):
    """One forward pass of one rank.

    Attributes:
      ids_LTK: experts; -1 where there is none.
      lens: lengths of its sequences.
      tokens_T: identities of all its tokens, or None.
      number: the pass's, the same in all ranks, or None.
      later: how many of its sequences go on from an earlier pass.
    """

    ids_LTK: np.ndarray
    lens: list[int]
    tokens_T: np.ndarray | None
    number: int | None
    later: int


@dataclasses.dataclass(frozen=True, eq=False)
class Dump:
    """What one rank recorded; slots are taken back to experts."""

    name: str
    rank: int
    passes: list[Pass]
    slots_LP: np.ndarray | None

    @functools.cached_property
    def layers(self) -> frozenset[int]:
        """Those in which a token chose an expert."""
        used = [np.flatnonzero((one.ids_LTK >= 0).any(axis=(1, 2))) for one in self.passes]
        return frozenset(np.concatenate(used).tolist() if used else ())

    @property
    def digest(self) -> bytes:
        """Of what was chosen for which tokens: ranks that repeat each other have the same."""
        digest = hashlib.sha256()
        for one in self.passes:
            digest.update(f"{one.ids_LTK.shape} ".encode() + one.ids_LTK.tobytes())
            digest.update(b"" if one.tokens_T is None else one.tokens_T.tobytes())
        return digest.digest()


def joined(dumps: list[Dump], hints: Hints) -> list[Dump]:
    """The dumps, those of a pipeline's stages as one; all of the same layers.

    Raises:
      Refused: dumps of other layers that are no stages, or ranks that split their tokens.
    """
    groups: dict[Hashable, list[Dump]] = {}
    for dump in dumps:
        groups.setdefault(_seen(dump), []).append(dump)
    whole: list[Dump] = []
    for group in groups.values():
        same = _joined(group, hints)
        if len(same) > 1:
            _check_whole(same)
        whole += same
    every = frozenset[int]().union(*(one.layers for one in whole))
    for one in whole:
        if one.layers != every:
            missing = shown_layers(tuple(sorted(every - one.layers)))
            raise Refused(
                one.name,
                f"layers {shown_layers(tuple(sorted(one.layers)))}",
                f"layers {missing} of other dumps are missing; stages of a pipeline have no layer "
                "in common, and the same forward passes with the same input_ids",
                "Give the dumps of all ranks of one recording, or those of one stage",
            )
    return whole


def in_order(dumps: list[Dump]) -> list[Pass]:
    """Passes in order of time, ranks in turn; rank after rank where one has no number."""
    passes = [(one, dump.rank) for dump in dumps for one in dump.passes]
    if all(one.number is not None for one, _ in passes):
        passes.sort(key=lambda each: (each[0].number, each[1]))
    return [one for one, _ in passes]


def check_own_rows(dumps: list[Dump]) -> None:
    """Are rows those of the tokens beside them?

    Raises:
      Refused: ranks that agree in what they chose and not in their tokens.
    """
    for at, one in enumerate(dumps):
        for first in dumps[:at]:
            if _rows_of(one, first):
                raise Refused(
                    one.name,
                    f"rows of {first.name}",
                    "the same experts for other input_ids: with data-parallel attention and no "
                    "all-to-all every rank records the first rank's tokens",
                    "Give rank 0's dump alone, or record with --moe-a2a-backend=deepep and as many "
                    "data-parallel ranks as tensor-parallel ones, or without the former",
                )


def _rows_of(one: Dump, first: Dump) -> bool:
    """Do all passes agree as far as both go, over tokens enough that differ?"""
    passes = {other.number: other for other in first.passes}
    rows: set[bytes] = set()
    for mine in one.passes:
        other = passes.get(mine.number)
        if mine.number is None or other is None:
            continue
        if mine.tokens_T is None or other.tokens_T is None:
            continue
        tokens = min(len(mine.tokens_T), len(other.tokens_T))
        if not np.array_equal(mine.ids_LTK[:, :tokens], other.ids_LTK[:, :tokens]):
            return False
        if len(rows) < ENOUGH:
            differ_T = mine.tokens_T[:tokens] != other.tokens_T[:tokens]
            rows |= {mine.ids_LTK[:, at].tobytes() for at in np.flatnonzero(differ_T)}
    return len(rows) >= ENOUGH


def _seen(dump: Dump) -> Hashable:
    """What two stages of a pipeline have in common: passes and their tokens, where it says them."""
    seen: list[Hashable] = []
    for one in dump.passes:
        if one.number is None or one.tokens_T is None:
            return dump.name
        seen.append((one.number, *one.lens, one.tokens_T.tobytes()))
    return tuple(seen)


def _check_whole(dumps: list[Dump]) -> None:
    """Refuses ranks of the same tokens that each have the experts of a part of them."""
    for dump in dumps:
        if any((one.ids_LTK < 0).all(axis=(0, 2)).any() for one in dump.passes):
            raise Refused(
                dump.name,
                "tokens without any expert",
                "another rank has the same input_ids and other experts: with an all-to-all, ranks "
                "that share their attention split its tokens and record their part, from row 0 on",
                "Record with as many data-parallel ranks (--attn-dp-size, in older versions "
                "--dp-size and --enable-dp-attention) as tensor-parallel ones, or without "
                "--moe-a2a-backend",
            )


def _joined(dumps: list[Dump], hints: Hints) -> list[Dump]:
    """Dumps of the same tokens, stages as one where no layer is in two of them."""
    stages: dict[frozenset[int], list[Dump]] = {}
    for dump in sorted(dumps, key=lambda dump: dump.rank):
        stages.setdefault(dump.layers, []).append(dump)
    disjoint = sum(map(len, stages)) == len(frozenset[int]().union(*stages))
    even = len({len(ranks) for ranks in stages.values()}) == 1
    if len(stages) == 1 or not disjoint or not even:
        return dumps
    hints.note(f"layers of {len(stages)} pipeline stages are put together")
    return [_stacked(parts) for parts in zip(*stages.values(), strict=True)]


def _stacked(stages: tuple[Dump, ...]) -> Dump:
    """One dump of dumps that have no layer in common."""
    passes = [
        same[0]._replace(ids_LTK=np.maximum.reduce([one.ids_LTK for one in same]))
        for same in zip(*(stage.passes for stage in stages), strict=True)
    ]
    return dataclasses.replace(stages[0], passes=passes)
