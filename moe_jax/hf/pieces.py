"""Pieces of a parameter from their files into place, a few megabytes at a time.

What is at hand beside the parameters is a block of a tensor for each thread: it is read from the
file, decoded or widened, looked through for NaN, and transposed into its place before the next one
comes. Nothing is mapped for long, so the peak of resident memory is that of the parameters.

Transposing is what costs: NumPy's copy of a transposed matrix misses the cache once a number. JAX
takes an array of any strides to the processor's own "device" in tiles, several times as fast.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moe_jax.hf import safetensors

BLOCK = 2**20  # bytes that are read at once (float32 that are decoded), or a row if it is larger
SMALL = 2**12  # numbers: fewer are transposed by NumPy
THREADS = 4  # at most: the disk and the memory are busy then

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One layer's, one expert's array, still in its files.

    Attributes:
      file: where it is.
      tensor: the name to blame for a bad value.
      parts: views of the mapped tensors: one of numbers, or what a code is made of.
      code: None, or the module that decodes the parts (mxfp4.py, fp8.py).
      sizes: of each letter of the stored array, in its order.
      order: of the stored axes in the parameter.
    """

    file: safetensors.File
    tensor: str
    parts: Sequence[np.ndarray]
    code: Any
    sizes: Sequence[int]
    order: Sequence[int]

    def copies(self, out: np.ndarray, inner: tuple[slice, ...]) -> Iterator[Callable[[], None]]:
        """What is to be done to fill an array, in parts that may run at once.

        Args:
          out: to fill, axes as in the parameter.
          inner: the slice of the parameter that `out` is.
        """
        back = np.argsort(self.order)
        target, wanted = out.transpose(back), tuple(inner[axis] for axis in back)
        if self.code is None:
            stored = self.parts[0].reshape(self.sizes)[wanted]
            for rows in blocks(len(stored), stored.strides[0]):
                yield functools.partial(self._plain, stored[rows], target[rows])
            return
        count = len(self.parts[0])
        of_rows = merged(target, count) if target.size == math.prod(self.sizes) else None
        if of_rows is None:  # a device's part that is not all of each row
            yield lambda: self._copy(self._values(target.dtype)[wanted], target)
            return
        multiple = self.code.ROWS
        for rows in blocks(count, 4 * target.size // count, multiple):
            scales = slice(rows.start // multiple, -(-rows.stop // multiple))
            yield functools.partial(self._decode, of_rows, rows, scales)

    def _plain(self, stored: np.ndarray, target: np.ndarray) -> None:
        self._copy(fetch(self.file, stored), target)

    def _values(self, dtype: np.dtype) -> np.ndarray:
        """All that is in codes, at once."""
        parts = [fetch(self.file, part) for part in self.parts]
        return self.code.decode(*parts, dtype).reshape(self.sizes)

    def _decode(self, of_rows: np.ndarray, rows: slice, scales: slice) -> None:
        codes, scale = self.parts
        parts = fetch(self.file, codes[rows]), fetch(self.file, scale[scales])
        values = self.code.decode(*parts, of_rows.dtype)
        self._copy(values.reshape(of_rows[rows].shape), of_rows[rows])

    def _copy(self, values: np.ndarray, target: np.ndarray) -> None:
        if target.itemsize < values.itemsize:  # what becomes infinite then is refused as well
            with np.errstate(over="ignore"):
                values = values.astype(target.dtype)
        if not finite(values):
            rule = "holds NaN or infinity, which no trained weight is"
            safetensors.refuse(self.file.path, self.tensor, "NaN or inf", rule, "download it again")
        put(values, target)


def run(copies: Iterator[Callable[[], None]]) -> None:
    """All of them, by a few threads; raises what the first one in their order raised."""
    threads = min(THREADS, os.cpu_count() or 1)
    with futures.ThreadPoolExecutor(threads) as pool:
        try:
            for done in [pool.submit(copy) for copy in copies]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def fetch(file: safetensors.File, mapped: np.ndarray) -> np.ndarray:
    """A view of a mapped file as an array in memory with the same strides, read at once.

    Raises `Refused` where the file has become shorter.
    """
    if not mapped.size:
        return mapped
    reach = sum((n - 1) * step for n, step in zip(mapped.shape, mapped.strides, strict=True))
    start = mapped.ctypes.data - file.bytes_.ctypes.data
    room = np.empty(reach + mapped.itemsize, np.uint8)
    left = room.data
    with file.path.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left:
            if not (got := opened.readinto(left)):
                rule = "has become shorter since its header was read"
                safetensors.refuse(file.path, "", start, rule, "let no other program write to it")
            left = left[got:]
    return np.ndarray(mapped.shape, mapped.dtype, room.data, 0, mapped.strides)


def put(values: np.ndarray, target: np.ndarray) -> None:
    """`target[...] = values`, of any strides; what is transposed goes through XLA's host memory."""
    if values.dtype == target.dtype == _BFLOAT16:  # faster as the bits they are
        values, target = values.view(np.uint16), target.view(np.uint16)
    order = np.argsort([-step for step in target.strides], kind="stable").tolist()
    long = [axis for axis in order if values.shape[axis] > 1]
    host = _host() if values.size >= SMALL and long[-1] != max(long) else None
    if host is None:
        target[...] = values
    else:
        turned = jax.device_put(values.transpose(order), host)
        target.transpose(order)[...] = np.asarray(turned)


@functools.cache
def _host() -> jax.Device | None:
    """The processor as a device of JAX; None where this process has it not among its platforms."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def merged(array: np.ndarray, rows: int) -> np.ndarray | None:
    """The same memory with so many rows, leading axes taken together; None if it cannot be."""
    shape, front = list(array.shape), 1
    while front < rows and shape:
        front *= shape.pop(0)
    if front != rows:
        return None
    view = array.reshape(rows, *shape)
    return view if np.shares_memory(view, array) else None


def blocks(count: int, bytes_of_row: int, multiple: int = 1) -> Iterator[slice]:
    """Rows of each block: so many as are in `BLOCK` bytes, or `multiple`."""
    step = max(BLOCK // max(bytes_of_row, 1) // multiple, 1) * multiple
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if values.dtype == _BFLOAT16:  # by its bits, which NumPy does not know
        exponent = np.uint16(0x7F80)
        return not ((values.view(np.uint16) & exponent) == exponent).any()
    return bool(np.isfinite(values).all())
