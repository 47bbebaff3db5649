"""A PNG of one colour whose opacity is the value: fits light and dark pages, needs no library.

Format: PNG (ISO/IEC 15948), 8 bits per pixel with a palette of one colour and 256 opacities.
"""

import base64
import struct
import zlib

import numpy as np
from jaxtyping import Float

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def opacity_png(strength_RC: Float[np.ndarray, "R C"], colour: tuple[int, int, int]) -> bytes:
    """The file.

    Args:
      strength_RC: from 0 (nothing to see) to 1 (the colour itself).
      colour: red, green, blue.
    """
    rows, columns = strength_RC.shape
    level_RC = np.rint(np.clip(strength_RC, 0, 1) * 255).astype(np.uint8)
    lines = np.zeros((rows, columns + 1), np.uint8)  # every line begins with its filter: none
    lines[:, 1:] = level_RC
    return b"".join(
        [
            SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(colour) * 256),
            _chunk(b"tRNS", bytes(range(256))),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def data_url(png: bytes) -> str:
    """The file inside a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
