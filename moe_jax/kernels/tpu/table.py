"""Tiles (rows, sum, out, chunk) by chip, operation, dtype and widths; none is measured.

Only those whose compiled schedules beat the rule in tiles.py; what is not here is cut by the rule.
`python -m moe_jax.kernels.tpu.static --choose` writes this file; see ../README.md.
"""

TABLE: dict[tuple[str, str, str, int, int], tuple[int, int, int, int]] = {
    ("v5p", "dh_gate_up", "bfloat16", 128, 256): (512, 128, 256, 256),
    ("v5p", "down", "bfloat16", 768, 2048): (512, 768, 1024, 512),
    ("v5p", "down", "bfloat16", 1024, 2048): (512, 1024, 1024, 512),
    ("v5p", "dw", "bfloat16", 256, 128): (512, 256, 128, 256),
    ("v5p", "dw", "bfloat16", 2048, 768): (512, 1024, 768, 512),
    ("v5p", "dw", "bfloat16", 2048, 1024): (512, 1024, 1024, 512),
    ("v5p", "dw", "bfloat16", 4096, 14336): (512, 1024, 1024, 512),
    ("v5p", "dw", "bfloat16", 14336, 4096): (512, 1024, 1024, 512),
    ("v5p", "dw2", "bfloat16", 2048, 768): (512, 1024, 768, 512),
    ("v5p", "dw2", "bfloat16", 2048, 1024): (512, 1024, 1024, 512),
    ("v5p", "dw2", "bfloat16", 4096, 14336): (512, 1024, 1024, 512),
    ("v5p", "dw2", "bfloat16", 7168, 2048): (512, 1024, 1024, 512),
    ("v5p", "dx", "bfloat16", 768, 2048): (512, 768, 1024, 512),
    ("v5p", "gate_up", "bfloat16", 128, 256): (1024, 128, 256, 256),
    ("v5p", "y", "bfloat16", 128, 256): (512, 128, 256, 256),
    ("v6e", "dw2", "bfloat16", 7168, 2048): (512, 1024, 2048, 256),
    ("v6e", "gate_up", "bfloat16", 2048, 1024): (1024, 2048, 1024, 256),
}
