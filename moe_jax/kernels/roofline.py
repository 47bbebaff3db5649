"""The least time a grouped operation can take: by its FLOPs or by its bytes, whichever is longer.

    seconds = max(flops / peak, bytes / bandwidth)        Williams et al., CACM 52 (2009)

With n used rows, D, F, a groups that have rows, and s bytes for a value:

| operation, pass | FLOPs | bytes: every array once |
|---|---|---|
| matmul forward | 2 n D F | s (n D + a D F + n F) |
| matmul dx | 2 n D F | s (n D + a D F + n F) |
| matmul dw | 2 n D F | s (n D + a D F + n F) |
| matmul dx+dw | 4 n D F | s (n D + a D F + n F) read, s (n D + a D F) written |
| ffn forward | 6 n D F | s (2 n D + 3 a D F) |
| ffn forward+backward | 18 n D F | s (2 n D + 3 a D F) + s (3 n D + 6 a D F) |

A fused FFN could keep h on chip, so its N x F arrays do not count. dw of empty groups, which is
zeros, does not count either.
"""

from typing import NamedTuple

from moe_jax.kernels.tpu.chips import CHIPS


class Peak(NamedTuple):
    """Attributes:
    flops: of bfloat16 a second, without sparsity.
    bandwidth: bytes a second of the device's memory.
    """

    flops: float
    bandwidth: float


# As their makers publish them; a CPU's depend on too much.
PEAKS = {kind: Peak(chip.flops, chip.bandwidth) for chip in CHIPS.values() for kind in chip.kind}
PEAKS |= {
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3350e9),
    "NVIDIA H200": Peak(989e12, 4800e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9),
}


def least(
    op: str, direction: str, rows: int, d_model: int, d_ff: int, groups: int, itemsize: int
) -> tuple[float, float]:
    """(FLOPs, bytes) of a row of the table above; `groups` are those that have rows."""
    x, y, w = rows * d_model, rows * d_ff, groups * d_model * d_ff
    products, values = {
        ("matmul", "forward"): (1, x + w + y),
        ("matmul", "dx"): (1, x + w + y),
        ("matmul", "dw"): (1, x + w + y),
        ("matmul", "dx+dw"): (2, 2 * x + 2 * w + y),
        ("ffn", "forward"): (3, 2 * x + 3 * w),
        ("ffn", "forward+backward"): (9, 5 * x + 9 * w),
    }[op, direction]
    return 2.0 * products * rows * d_model * d_ff, float(itemsize * values)


def seconds(peak: Peak, flops: float, num_bytes: float) -> float:
    return max(flops / peak.flops, num_bytes / peak.bandwidth)
