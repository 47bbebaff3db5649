"""Files of `torch.save`, built byte by byte: what the tests feed to the reader of `.pt` files."""

import io
import struct
import zipfile

import numpy as np

STORAGES = {"i8": "LongStorage", "i4": "IntStorage", "f4": "FloatStorage", "u1": "ByteStorage"}


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def number(n: int) -> bytes:
    if -(2**31) <= n < 2**31:
        return b"J" + struct.pack("<i", n)
    size = n.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + n.to_bytes(size, "little", signed=True)


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def list_of(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def dict_of(**parts: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + part for key, part in parts.items()) + b"u"


def storage(kind: str, key: str, length: int, where: str = "cuda:0") -> bytes:
    parts = (text("storage"), name("torch", kind), text(key), text(where), number(length))
    return tuple_of(*parts) + b"Q"


def tensor(kind: str, key: str, length: int, shape, strides, offset: int = 0) -> bytes:
    parts = (
        storage(kind, key, length),
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, strides)),
        b"\x89" + name("collections", "OrderedDict") + b")R",
    )
    return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(*parts) + b"R"


def whole(array: np.ndarray, key: str) -> bytes:
    """The pickled form of a contiguous array whose bytes are the member data/`key`."""
    strides = [step // array.itemsize for step in array.strides]
    kind = STORAGES[array.dtype.str[1:]]
    return tensor(kind, key, array.size, array.shape, strides)


def archive(pickled: bytes, *storages: np.ndarray | bytes, packed: bool = False, **extra) -> bytes:
    """The zip file: a pickle and the members data/0, data/1, ..."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr("dump/data.pkl", b"\x80\x02" + pickled + b".")
        file.writestr("dump/byteorder", extra.get("byteorder", b"little"))
        for at, data in enumerate(storages):
            file.writestr(f"dump/data/{at}", data if isinstance(data, bytes) else data.tobytes())
    return buffer.getvalue()
