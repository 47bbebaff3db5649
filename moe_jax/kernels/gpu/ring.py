"""A ring of steps in shared memory: one warpgroup copies, the others multiply what has come.

Promise: steps are used in the order in which they are copied, each by every warpgroup that
computes; a step is overwritten when all have let go of it, and not before. The ring does not stand
still between tiles: while a tile is finished and written, the next one's steps come.

It is what `plgpu.emit_pipeline_warp_specialized` does for one tile. That fills its stages anew for
every tile, or asks for numbers of steps that are multiples of the stages, and reads all operands in
every step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from moe_jax.kernels.gpu.tiles import STAGES, WARPGROUPS

COPIER = WARPGROUPS  # the warpgroup that copies
_COPIER_REGISTERS = 40  # of a thread
_REGISTERS = 232  # of a thread that computes: what is left of 65,536 in a block, in steps of 8


class Ring(NamedTuple):
    """Attributes:
    slots: arrays [stages, ...] in shared memory, one for each operand of a step.
    come: barriers, one for each stage: its copies have come.
    free: all warpgroups have let go of it.
    """

    slots: Sequence[Any]
    come: Any
    free: Any


def scratch(shapes: Sequence[tuple[int, ...]], stages: int, dtype: DTypeLike) -> Ring:
    """What a ring takes on chip, for `pl.run_scoped`."""
    return Ring(
        [plgpu.SMEM((stages, *shape), dtype) for shape in shapes],
        plgpu.Barrier(num_arrivals=len(shapes), num_barriers=stages),
        plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    )


def run(copy: Callable[[], None], compute: Callable[[], None]) -> None:
    """Each warpgroup does its own, with as many registers as that takes."""

    def copier():
        plgpu.set_max_registers(_COPIER_REGISTERS, action="decrease")
        copy()

    def computer():
        plgpu.set_max_registers(_REGISTERS, action="increase")
        compute()

    lax.cond(lax.axis_index("wg") == COPIER, copier, computer)


def copy_steps(ring: Ring, done: Any, steps: Any, sources: Callable[[Any], Sequence[Any]]) -> Any:
    """The copying side of a tile's steps; returns how many steps the ring has had.

    Args:
      done: steps that the ring had before.
      sources: step -> what is copied into each of the slots; None: nothing, the slot is not used.
    """
    stages = ring.slots[0].shape[0]

    def one(step, _):
        stage = lax.rem(done + step, stages)

        pl.when(done + step >= stages)(lambda: plgpu.barrier_wait(ring.free.at[stage]))
        for slot, source in zip(ring.slots, sources(step), strict=True):
            if source is None:
                plgpu.barrier_arrive(ring.come.at[stage])
            else:
                plgpu.copy_gmem_to_smem(source, slot.at[stage], ring.come.at[stage])

    lax.fori_loop(0, steps, one, None)
    return done + steps


def use_steps(ring: Ring, done: Any, phases: Sequence[tuple[Any, Callable[..., None]]]) -> None:
    """The computing side of a tile's steps, phase after phase; products are finished at the end.

    With many stages a step's slots are let go when the products of the next one have been started
    and its own are finished, so that the tensor cores always have work; with few, as soon as they
    can be: copies are then what is waited for.

    Args:
      done: steps that the ring had before.
      phases: (steps, multiply); multiply(step of the phase, slots) starts products.
    """
    stages = ring.slots[0].shape[0]
    behind = 1 if stages >= STAGES else 0
    begin = done

    def let_go(step):
        pl.when(step >= begin)(lambda: plgpu.barrier_arrive(ring.free.at[lax.rem(step, stages)]))

    for steps, multiply in phases:

        def one(step, _, done=done, multiply=multiply):
            stage = lax.rem(done + step, stages)
            plgpu.barrier_wait(ring.come.at[stage])
            multiply(step, [slot.at[stage] for slot in ring.slots])
            plgpu.wgmma_wait(behind)
            let_go(done + step - behind)

        lax.fori_loop(0, steps, one, None)
        done += steps
    plgpu.wgmma_wait(0)
    if behind:
        let_go(done - 1)


def use_step(ring: Ring, done: Any, use: Callable[[list[Any]], Any]) -> Any:
    """What use(slots) returns of one step; they are let go then. `done`: steps before it."""
    stage = lax.rem(done, ring.slots[0].shape[0])
    plgpu.barrier_wait(ring.come.at[stage])
    found = use([slot.at[stage] for slot in ring.slots])
    plgpu.barrier_arrive(ring.free.at[stage])
    return found


def pass_steps(ring: Ring, done: Any, steps: Any) -> None:
    """Steps of which a warpgroup needs nothing."""

    def one(step, _):
        use_step(ring, step, lambda slots: None)

    lax.fori_loop(done, done + steps, one, None)
