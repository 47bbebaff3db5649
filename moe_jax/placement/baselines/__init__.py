"""What others do, one method a file. Here: those that everything else starts from."""

from moe_jax.placement.baselines.packing import lpt, zigzag
from moe_jax.placement.baselines.simple import contiguous, random, round_robin

__all__ = ["contiguous", "lpt", "random", "round_robin", "zigzag"]
