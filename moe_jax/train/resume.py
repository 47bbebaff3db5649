"""A run's beginning, fresh or from its newest good checkpoint, and the checkpoints that it writes.

A checkpoint goes on on any mesh: arrays are read into the shards that this run wants, experts are
moved where its plan wants them, and data is counted in batches of all processes together.

A step 0 that says so (`ONLY`) holds parameters alone: what a run begins with that were made by
another command (../upcycle). All else is then fresh. It is never removed: nothing else knows what
the run began with. One that does not say so and lacks an array is refused like any other.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import checkpoint, data, metrics, permute
from moe_jax import config as config_lib
from moe_jax import mesh as mesh_lib
from moe_jax.checkpoint import integrity, preservation, saver
from moe_jax.checkpoint.contents import ONLY
from moe_jax.config import Config
from moe_jax.errors import Refused
from moe_jax.model import parameter
from moe_jax.model.dispatch.table import Table
from moe_jax.placement import copies
from moe_jax.placement import plan as plan_lib
from moe_jax.train import step as step_lib

MODEL = "model"  # of `Contents.extra[ONLY]`
TEXT = "text_digest"  # in `Contents.extra`: of the corpus that `data_state` is a position in


@dataclasses.dataclass
class Run:
    """A run between two steps."""

    state: step_lib.TrainState
    batches: grain.DatasetIterator
    step: int
    text: str  # digest of what `batches` are made of


def start_or_resume(
    config: Config,
    mesh: Mesh,
    workdir: pathlib.Path,
    corpus: data.Corpus,
    plan: plan_lib.Plan,
    *,
    before: int | None = None,
    ahead: integrity.Digests | None = None,
) -> tuple[Run, plan_lib.Plan]:
    """The run, its experts where the returned plan says; every process calls this.

    Args:
      config: of the run.
      mesh: to train on.
      workdir: with checkpoints or without.
      corpus: text.
      plan: that of the config. Where the config names none, or wants new ones made on the way,
        experts stay in the order that the checkpoint has them in, if this mesh allows it.
      before: only look at checkpoints of earlier steps, and move nothing; None = the newest.
      ahead: digests of a step that have begun already.
    """
    batches = data.batches(corpus, config.data)
    devices = plan.placement.num_devices
    if before is None and jax.process_index() == 0:
        checkpoint.clean(workdir / "checkpoints")
    found = checkpoint.restore_newest(
        workdir / "checkpoints",
        lambda folder, contents: _read(config, mesh, folder, contents, devices, batches),
        metrics.fail,
        verify=config.train.checkpoints_verified,
        move_bad=before is None,
        before=before,
        ahead=ahead,
    )
    if found is None:
        state = step_lib.initial_state(config, mesh)
        logical = plan_lib.Placement.contiguous(
            plan.placement.num_layers, plan.placement.num_experts, devices
        )
        if plan.digest != logical.digest:
            state = permute.apply(state, logical, plan.placement)
        return Run(state, batches, 0, corpus.digest), plan
    contents = found.contents
    metrics.say(_told(found, config.train.checkpoints_verified))
    if not config.placement or config.replan.every:
        named, plan = plan, _in_order(contents.plan, plan, config.mesh.node)
        if config.placement and named.digest != plan.digest:
            metrics.say(
                "experts stay where the step has them: a run that makes plans (replan.every) only "
                f"begins under {config.placement}; moe_jax.placement apply puts steps under it"
            )
    state = _placed(config, mesh, found.value, contents.plan.placement, plan.placement)
    if ONLY in contents.extra:
        fresh = data.batches(corpus, config.data)  # a step that was damaged may have moved others
        return Run(state, fresh, 0, corpus.digest), plan
    _tell_config(config, contents)
    if contents.extra.get(TEXT, corpus.digest) != corpus.digest:
        metrics.fail(
            f"step {contents.step}: trained on another text than there is now (files of data.path "
            "were added, changed or removed, or it is another Python's standard library): the run "
            "goes on at its place in the new text, and its curve is not that of one run"
        )
    return Run(state, batches, contents.step, corpus.digest), plan


def check_text(corpus: data.Corpus) -> None:
    """Refuses processes that have read different texts; every process calls this.

    Raises:
      Refused: in all of them, with the first that differs from process 0.
    """
    other = mesh_lib.first_other(bytes.fromhex(corpus.digest))
    if other is not None:
        raise Refused(
            "data.path",
            corpus.name,
            f"holds another text for process {other} than for process 0",
            "give every host the same files (and the same Python, where data.path is empty)",
        )


def _tell_config(config: Config, contents: checkpoint.Contents) -> None:
    """Says that a step is of another config, where config.json is gone or is not the step's.

    A digest does not say in what they differ, and whoever copies steps may want another one.
    """
    said = contents.extra.get("config_digest")
    if said is None or said == config_lib.digest(config):
        return
    metrics.fail(
        f"step {contents.step}: of a run with another config (there is no config.json of it to "
        "say where they differ): the run goes on with this one"
    )


def _go_to(
    batches: grain.DatasetIterator,
    config: Config,
    folder: pathlib.Path,
    contents: checkpoint.Contents,
) -> None:
    """Puts `batches` where the step was. Raises `Damaged` if that is no position of it."""
    try:
        position = contents.extra["data_state"]
        if not _alike(position, batches.get_state()):
            raise ValueError(f"{position!r}")
        # Of a run with another config, windows a batch may have been others.
        same = contents.extra.get("config_digest") == config_lib.digest(config)
        if same and position != {"next_index": contents.step * config.data.global_batch}:
            raise ValueError(f"{position!r} after step {contents.step}")
        batches.set_state(position)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        rule = f"holds no position in this data ({error!r})"
        raise integrity.damaged(folder / "meta.json", rule) from None


def _alike(state: Any, fresh: Any) -> bool:
    """The same fields, of the same types: Grain takes any number, and fails in a thread later."""
    if not isinstance(fresh, dict):
        return type(state) is type(fresh)
    named = isinstance(state, dict) and state.keys() == fresh.keys()
    return named and all(_alike(state[name], value) for name, value in fresh.items())


def put_table(mesh: Mesh, plan: plan_lib.Plan) -> Table:
    """The plan as the model takes it, on every device."""
    table = permute.table(plan.placement)
    return jax.tree.map(lambda array: mesh_lib.put_replicated(mesh, array), table)


def _in_order(stored: plan_lib.Plan, contiguous: plan_lib.Plan, nodes: int) -> plan_lib.Plan:
    """The stored order of experts on these devices; `contiguous` where they do not take it."""
    devices = contiguous.placement.num_devices
    if stored.placement.num_devices == devices:
        share_LNP = stored.placement.share_LNP
    else:
        share_LNP = None  # of copies, between devices that are no more
    slots_LP = stored.placement.physical_to_logical_LP
    try:
        placement = plan_lib.Placement(slots_LP, stored.placement.num_experts, devices, share_LNP)
        copies.check_nodes(placement, nodes)
    except Refused:
        return contiguous
    if placement == stored.placement:
        return dataclasses.replace(stored, layer_ids=contiguous.layer_ids)
    return plan_lib.Plan(placement, contiguous.layer_ids)


def _read(
    config: Config,
    mesh: Mesh,
    folder: pathlib.Path,
    contents: checkpoint.Contents,
    devices: int,
    batches: grain.DatasetIterator,
) -> step_lib.TrainState:
    """The state as it is stored; whole on each device where it cannot be split over `devices`.

    `batches` are put where the step was.
    """
    stored = contents.plan.placement
    there = step_lib.abstract_state(config, mesh, stored.num_slots)
    if stored.num_slots % devices:
        there = _unsplit(there, mesh)  # until they have been moved
    wanted = checkpoint.flatten(there)
    if ONLY in contents.extra:
        _check_only(folder, contents)
        wanted = {name: leaf for name, leaf in wanted.items() if name.startswith("model.")}
    arrays = checkpoint.restore(folder, contents, wanted, stored)
    if ONLY not in contents.extra:
        _go_to(batches, config, folder, contents)
        return checkpoint.unflatten(there, arrays)
    named = {name.removeprefix("model."): array for name, array in arrays.items()}
    model = checkpoint.unflatten(there.model, named)
    return step_lib.around(config, jax.tree.map(lambda leaf: leaf.sharding, there), model)


def _check_only(folder: pathlib.Path, contents: checkpoint.Contents) -> None:
    """Refuses a step that says that it holds parameters alone, and is not such a one."""
    others = [name for name in contents.arrays if not name.startswith("model.")]
    if contents.extra[ONLY] != MODEL or contents.step or others:
        rule = f"says that it holds only {contents.extra[ONLY]!r}, which is for a step 0 without "
        raise integrity.damaged(folder / "meta.json", f"{rule}other arrays than parameters")


def _told(found: checkpoint.Restored, verified: bool) -> str:
    how = f"step {found.contents.step}: read in {found.read_seconds:.2f} s"
    if not verified:
        return f"{how}; its digests were not compared (train.checkpoints_verified = False)"
    return f"{how}, verified meanwhile and for {found.waited_seconds:.2f} s more"


def _placed(
    config: Config,
    mesh: Mesh,
    state: step_lib.TrainState,
    stored: plan_lib.Placement,
    wanted: plan_lib.Placement,
) -> step_lib.TrainState:
    """The state with its experts where they are wanted."""
    if stored == wanted:
        return state
    metrics.say(
        f"experts: stored as plan {stored.digest[:12]} for {stored.num_devices} devices, "
        f"training under {wanted.digest[:12]} for {wanted.num_devices}"
    )
    if not np.array_equal(stored.physical_to_logical_LP, wanted.physical_to_logical_LP):
        state = permute.apply(state, stored, wanted)
    if stored.num_slots % wanted.num_devices == 0:
        return state
    here = step_lib.abstract_state(config, mesh, wanted.num_slots)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, here)
    return jax.jit(lambda state: state, out_shardings=shardings)(state)


def _unsplit(abstract: step_lib.TrainState, mesh: Mesh) -> step_lib.TrainState:
    """The same with whole experts arrays on every device of the expert axes."""
    axes = jax.tree.leaves(parameter.logical_axes(abstract))
    leaves, structure = jax.tree.flatten(abstract)
    placed = [
        jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=mesh_lib.sharding(mesh, *(n if n != "expert" else None for n in names)),
        )
        for leaf, names in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def saved_arrays(
    run: Run, plan: plan_lib.Plan, config: Config, held_out_loss: float | None = None
) -> tuple[dict[str, Any], checkpoint.Contents]:
    """What a checkpoint of `run` holds: the state, the plan, the data position."""
    arrays = checkpoint.flatten(run.state)
    axes = checkpoint.flatten(parameter.logical_axes(run.state))
    extra = {
        "data_state": run.batches.get_state(),
        "config_digest": config_lib.digest(config),
        TEXT: run.text,
    }
    if held_out_loss is not None:
        extra[preservation.LOSS] = held_out_loss
    infos = checkpoint.describe(arrays, axes)
    return arrays, checkpoint.Contents(run.step, infos, plan, extra)


class Checkpoints:
    """The steps that a run writes. A `with` ends when nothing is being written any more.

    Attributes:
      failed: the step that is being written could not be; the next call will say so.
      plan: where the experts are.
    """

    def __init__(self, config: Config, workdir: pathlib.Path, run: Run, plan: plan_lib.Plan):
        train = config.train
        kept = preservation.Kept(
            train.checkpoints_kept, train.checkpoints_kept_every, train.checkpoints_kept_best
        )
        self._config, self.plan = config, plan
        self._saver = saver.Saver(workdir / "checkpoints", kept.prune)
        self._saver.check()
        self._saved = run.step  # after step 0 there is nothing that could be lost

    @property
    def failed(self) -> bool:
        return self._saver.failed

    def save(self, run: Run, held_out_loss: Any) -> None:
        """Begins to write the step at hand; says what could not be written."""
        self.wait()
        self._forgiven(lambda: self._start(run, held_out_loss))

    def wait(self) -> None:
        """Returns when nothing is being written; says what could not be."""
        self._forgiven(self._saver.wait)

    def save_last(self, run: Run, held_out_loss: Any) -> None:
        """Writes the step at hand, unless it is there. Raises `Refused` if it cannot be."""
        self.wait()
        if self._saved != run.step:
            self._start(run, held_out_loss)
            self._saver.wait()

    def _start(self, run: Run, held_out_loss: Any) -> None:
        start = time.perf_counter()
        loss = None if held_out_loss is None else float(held_out_loss)
        arrays, contents = saved_arrays(run, self.plan, self._config, loss)
        checkpoint.start_save(self._saver, arrays, contents)
        self._saved = run.step
        seconds = time.perf_counter() - start
        metrics.say(f"step {run.step}: being saved; training stood still for {seconds:.2f} s")

    def _forgiven(self, call: Callable[[], None]) -> None:
        """Lets the run go on without the step that `call` could not write, if it was told to."""
        try:
            call()
        except Refused as error:
            self._saved = -1
            if self._config.train.failed_save == "stop":
                raise
            metrics.fail(f"{error} Training goes on until the next save.")

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._saver.__exit__(kind, error, traceback)
