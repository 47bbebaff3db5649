"""Weights as GGUF writes them: numbers, or blocks of 32 codes with a scale, and their values.

A block of Q4_0, Q5_0 and Q8_0 means scale x code; of Q4_1 and Q5_1 scale x code + least. Codes of
4 bits are two in a byte, the first 16 in its low halves; fifth bits are 32 in a word of their own.

Axes: N blocks, C the 32 values of one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Kind:
    """Attributes:
    name: as the format calls it.
    values: of one block; a row is whole blocks.
    size: bytes of one block.
    decode: bytes of whole blocks -> float32 values.
    """

    name: str
    values: int
    size: int
    decode: Callable[[np.ndarray], np.ndarray]


def _numbers(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    return lambda data: np.ascontiguousarray(data).view(dtype).astype(np.float32)


def _scales(block_NX: np.ndarray, at: int) -> np.ndarray:
    """float32 [N, 1] of the 16-bit numbers at a byte of each block."""
    return np.ascontiguousarray(block_NX[:, at : at + 2]).view("<f2").astype(np.float32)


def _q8_0(data: np.ndarray) -> np.ndarray:
    block_NX = data.reshape(-1, 34)
    code_NC = block_NX[:, 2:].view(np.int8).astype(np.float32)
    return (_scales(block_NX, 0) * code_NC).reshape(-1)


def _halves(data: np.ndarray, size: int, *, fifth: bool, least: bool) -> np.ndarray:
    block_NX = data.reshape(-1, size)
    at = 4 if least else 2
    low_NX = block_NX[:, -16:]
    code_NC = np.concatenate([low_NX & 15, low_NX >> 4], axis=1)
    if fifth:
        bit_NC = np.unpackbits(block_NX[:, at : at + 4], axis=1, bitorder="little")
        code_NC = code_NC | bit_NC << 4
    value_NC = code_NC.astype(np.float32)
    if not least:
        value_NC -= 16 if fifth else 8
    value_NC *= _scales(block_NX, 0)
    if least:
        value_NC += _scales(block_NX, 2)
    return value_NC.reshape(-1)


def _of_halves(name: str, size: int, *, fifth: bool, least: bool) -> Kind:
    return Kind(name, BLOCK, size, lambda data: _halves(data, size, fifth=fifth, least=least))


# by the number that stands in the file
KINDS = {
    0: Kind("F32", 1, 4, _numbers("<f4")),
    1: Kind("F16", 1, 2, _numbers("<f2")),
    30: Kind("BF16", 1, 2, _numbers(ml_dtypes.bfloat16)),
    2: _of_halves("Q4_0", 18, fifth=False, least=False),
    3: _of_halves("Q4_1", 20, fifth=False, least=True),
    6: _of_halves("Q5_0", 22, fifth=True, least=False),
    7: _of_halves("Q5_1", 24, fifth=True, least=True),
    8: Kind("Q8_0", BLOCK, 34, _q8_0),
}
