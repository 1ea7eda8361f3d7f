"""The training loop, top to bottom.

Everything that determines how a run continues is a function of the step or part of the `TrainState`, hence in
the checkpoint: a run that was killed and started again ends with the same parameters, bit for bit. With
`run.memory="auto"` this takes as much free memory as before; with less, sums may be taken in another order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from adregnet_jax import provenance
from adregnet_jax.config import Config, ModelConfig
from adregnet_jax.data import pipeline
from adregnet_jax.data.fingerprint import data_fingerprint
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.splits import Splits, load_splits
from adregnet_jax.errors import UserError
from adregnet_jax.metrics import tre_mm
from adregnet_jax.nn.models import make_model
from adregnet_jax.nn.prediction import check_width
from adregnet_jax.ops.convolution import check_implementation
from adregnet_jax.ops.slabs import SPACE
from adregnet_jax.synthesis.batches import draw_batch
from adregnet_jax.training.checkpoint import (
    Checkpoints,
    check_architecture,
    completed_parameters,
    restore_parameters,
)
from adregnet_jax.training.lock import only_run
from adregnet_jax.training.memory import available_bytes, fitting_step, recorded_choices
from adregnet_jax.training.record import append_start, write_record, write_splits
from adregnet_jax.training.run_log import RunLog
from adregnet_jax.training.sharding import (
    draw_on_devices,
    make_mesh,
    place,
    replicated,
    rows_of_process,
    shares_volumes,
    to_host,
)
from adregnet_jax.training.state import TrainState, make_init
from adregnet_jax.training.step import (
    Metrics,
    learning_rate,
    make_optimiser,
    make_train_step,
    make_validation_step,
)
from adregnet_jax.weights.packed import PRETRAINED, is_packed, load_pretrained


def train(config: Config, workdir: Path) -> None:
    """Trains the network of `config.model` in `workdir`, resuming from its newest checkpoint if there is one.

    Raises:
        UserError: for settings, data, checkpoints or devices that can't be used, a metric that is not finite,
            a full disk, or another run in `workdir`.
        SystemExit: 128 + the signal's number, after SIGTERM or SIGINT; a checkpoint is saved first.
    """
    config.check()
    check_implementation(config.model.convolution)
    splits = load_splits(config.data)  # before the workdir is made: unusable data leave none behind
    first = splits.train[0] if splits.train else None
    with only_run(workdir):
        _train(config, workdir, splits, first)


def _train(config: Config, workdir: Path, splits: Splits, first: Pair | None) -> None:
    if config.run.memory == "auto":
        config = dataclasses.replace(config, model=recorded_choices(config.model, workdir))
    check_architecture(workdir, config.model)
    write_splits(workdir, config.data.kind, splits)
    prepare_workdir(config, workdir, first)
    batch_size = config.optimiser.batch_size
    make_batch = functools.partial(
        pipeline.collate,
        with_labels=config.loss.dice > 0,
        with_truth=config.loss.field > 0,
        with_contrast=config.data.kind == "synthetic",
    )
    mesh = make_mesh(
        config.run.devices,
        batch_size,
        space_devices=config.run.space_devices,
        accumulate=config.optimiser.accumulate,
    )
    rows = rows_of_process(mesh, batch_size)
    batches = pipeline.training_batches(
        splits.train, config.data, batch_size=batch_size, seed=config.seed, make_batch=make_batch, rows=rows
    )
    steps_per_epoch = config.optimiser.steps_per_epoch or math.ceil(len(splits.train) / batch_size)
    total_steps = config.optimiser.epochs * steps_per_epoch
    validate_every = config.run.validate_every_epochs * steps_per_epoch
    patience = math.inf
    if config.run.patience_epochs and splits.validation:
        patience = max(config.run.patience_epochs, config.run.validate_every_epochs) * steps_per_epoch

    model = make_model(config.model)
    multiple = model.multiple if shares_volumes(mesh) else 1
    put = functools.partial(place, mesh=mesh, multiple=multiple)
    optimiser = make_optimiser(config.optimiser, steps_per_epoch)
    rate_of = learning_rate(config.optimiser, steps_per_epoch)
    decay = config.optimiser.average_decay
    stride = config.run.steps_per_dispatch
    drawn: dict[str, Any] = {}
    if config.draws_on_device:
        check_width(splits.train[0].fixed.shape[0], mesh.shape[SPACE], multiple)
        draw = functools.partial(draw_batch, config=config.data, seed=config.seed)
        draw = functools.partial(draw_on_devices, draw, batch_size=batch_size, mesh=mesh)
        drawn = {"draw": draw, "steps": stride}
    make_step = functools.partial(
        make_train_step,
        optimiser=optimiser,
        loss_config=config.loss,
        mesh=mesh,
        seed=config.seed,
        accumulate=config.optimiser.accumulate,
        average_decay=decay,
        **drawn,
    )
    init = make_init(model, optimiser, splits.train[0].fixed.shape, mesh, averaged=decay > 0)
    key = jax.random.key(config.seed)

    with contextlib.ExitStack() as stack:
        say = functools.partial(print, file=sys.stderr)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, say)))
        state = checkpoints.restore(abstract_state(init, key, mesh))
        state = state or initial_state(init, key, mesh, config.init_from, say)
        start, best_metric, best_step = int(state.step), float(state.best_metric), int(state.best_step)
        check_start(start, stride)
        if append_start(workdir, start, data_fingerprint(config.data)):
            say("the data files have changed since the previous start: see starts.jsonl")
        log = stack.enter_context(
            contextlib.closing(RunLog(workdir, start, total_steps, active=not jax.process_index()))
        )
        log.say(opening_line(state, mesh, total_steps))
        if config.model.convolution == "onednn":
            log.say("convolves by oneDNN: every start compiles anew")
        signals = stack.enter_context(remembered_signals())
        prefetched: Iterator[pipeline.Batch] = (
            itertools.repeat({})
            if config.draws_on_device
            else pipeline.iterate_from(batches, start, workers=config.data.workers)
        )
        unread: list[tuple[int, Metrics]] = []  # last steps and metrics that are still on the device

        for step in range(start + stride, total_steps + 1, stride):
            if step - stride - best_step >= patience:
                break
            with log.waiting():
                made = next(prefetched)
            local, stop_now = agreed(made, stop=bool(signals))
            batch = put(local, rows, batch_size) if local else {}
            if step == start + stride:
                chosen, train_step = planned_step(config, make_step, state, batch, mesh, log.say)
                if chosen != config.model:
                    config = dataclasses.replace(config, model=chosen)
                    prepare_workdir(config, workdir, first)
                validation_step = make_validation_step(make_model(chosen), config.loss, mesh)
                log.restart_clock(start)
            state, metrics = train_step(state, batch)
            unread.append((step, metrics))
            if len(unread) > 1:
                jax.block_until_ready(unread[-2])  # keeps one step running and one queued

            validate_now = step % validate_every == 0 or step == total_steps
            save_now = validate_now or step % config.run.checkpoint_every_steps == 0 or stop_now
            previous_is_logged = (step - stride) % config.run.log_every_steps == 0
            if not (save_now or previous_is_logged):
                continue

            # Except before a save, the newest metrics stay on the device, where their step still runs.
            ready, unread = (unread, []) if save_now else (unread[:-1], unread[-1:])
            records = fetch(ready)
            rate, waiting = log.steps_per_second(step if save_now else step - stride), log.waiting_share()
            metric = None
            if validate_now and splits.validation:
                validation = validate(
                    validation_step, state.network, splits.validation, step, put=put, make_batch=make_batch
                )
                records[step] |= validation
                name = decisive(validation)
                metric = validation[name]
                if metric < best_metric:
                    best_metric, best_step = metric, step
                    best = jax.device_put((np.float32(metric), np.int32(step)), replicated(mesh))
                    state = state.replace(best_metric=best[0], best_step=best[1])
                epoch, best_epoch = step // steps_per_epoch, best_step // steps_per_epoch
                log.say(f"epoch {epoch}: {name} {metric:.4f}, best {best_metric:.4f} in epoch {best_epoch}")
            for logged, record in records.items():
                if logged % config.run.log_every_steps == 0 or (logged == step and validate_now):
                    learning = {
                        "learning_rate": float(rate_of(logged - 1)),
                        "steps_per_second": rate,
                        "waiting_share": waiting,
                    }
                    log.write(logged, record | learning)
            if save_now:
                checkpoints.save(step, state, metric=metric)
            log.restart_clock(step if save_now else step - stride)
            if stop_now:
                number = signals[0] if signals else signal.SIGTERM  # received by another process
                log.say(f"stopped by {signal.Signals(number).name} at step {step}; the same command resumes")
                raise SystemExit(128 + number)
        log.say(closing_line(state, steps_per_epoch))


def prepare_workdir(config: Config, workdir: Path, first: Pair | None = None) -> None:
    """Makes the workdir, refuses one with a run of a different model, and writes `config.json`.

    The record has the spacing and the axes of the `first` training pair, to which the scans of later
    registrations are adapted.
    """
    record = {
        "config": dataclasses.asdict(config),
        "spacing_mm": None if first is None else first.spacing_mm.tolist(),
        "axes": None if first is None else "".join(nib.orientations.aff2axcodes(first.affine)),
        "versions": provenance.versions(),
    }
    check_architecture(workdir, config.model)
    write_record(workdir / "config.json", record)


def planned_step(
    config: Config,
    make_step: Callable[..., Any],
    state: TrainState,
    batch: Mapping[str, jax.Array],
    mesh: Mesh,
    say: Callable[[str], None],
) -> tuple[ModelConfig, Callable[..., tuple[TrainState, Metrics]]]:
    """The model, made to fit into memory if `run.memory` asks for it, and its compiled training step."""

    def compile_step(model: ModelConfig) -> jax.stages.Compiled:
        began = time.monotonic()
        program = make_step(make_model(model)).lower(state, batch).compile()
        say(f"compiled the training step in {time.monotonic() - began:.1f} s")
        return program

    available = None if config.run.memory == "off" else available_bytes(mesh.local_devices)
    if available is not None and jax.process_count() > 1:  # all must choose the same
        mebibytes = np.array(available // 2**20, np.int32)  # the number of bytes would overflow
        available = 2**20 * int(multihost_utils.process_allgather(mebibytes).min())
    choose = config.run.memory == "auto"
    model, program = fitting_step(config.model, compile_step, available, choose=choose, say=say)
    planned = jax.tree.map(jnp.shape, batch)
    for_other_shapes = make_step(make_model(model))  # another number of landmarks needs another program

    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        return (program if jax.tree.map(jnp.shape, batch) == planned else for_other_shapes)(state, batch)

    return model, step


def abstract_state(init: Callable[[jax.Array], TrainState], key: jax.Array, mesh: Mesh) -> TrainState:
    """Shapes, types and placement of the state, without computing it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), jax.eval_shape(init, key)
    )


def initial_state(
    init: Callable[[jax.Array], TrainState],
    key: jax.Array,
    mesh: Mesh,
    init_from: str,
    say: Callable[[str], None],
) -> TrainState:
    """The state at step 0, with random parameters or those that `init_from` names.

    These are the best ones of a run, packed ones from a folder, or the bundled ones ("pretrained"). Modules
    missing among them start from random parameters, which `say` reports.
    """
    state = init(key)
    if init_from:
        if init_from == PRETRAINED or is_packed(Path(init_from)):
            stored = load_pretrained(None if init_from == PRETRAINED else init_from).params
        else:
            stored, _ = restore_parameters(Path(init_from))
        params, missing = completed_parameters(stored, state.params, f"--config.init_from={init_from}")
        if missing:
            modules = sorted({name.split("/")[0] for name in missing})
            say(f"{init_from} has no {', '.join(modules)}: random parameters are used there")
        params = jax.device_put(params, replicated(mesh))
        state = state.replace(params=params)
        if state.average is not None:
            state = state.replace(average=jax.tree.map(jnp.copy, params))
    return state


def agreed(batch: pipeline.Batch, *, stop: bool) -> tuple[pipeline.Batch, bool]:
    """Makes the processes of a run agree on the shape of a batch and on the step at which they stop.

    Args:
        batch: the rows of this process; empty where the program draws its own.
        stop: whether this process was asked to stop.

    Returns:
        The batch, padded to the largest number of landmarks in any process, and whether any is to stop.

    Raises:
        UserError: on all processes, if the shapes of their volumes differ.
    """
    if jax.process_count() == 1:
        return batch, stop
    shape = batch["fixed"].shape[1:4] if batch else (0, 0, 0)
    room = batch["landmark_valid"].shape[1] if batch else 0
    of_all = multihost_utils.process_allgather(np.array([*shape, room, stop], np.int32))
    if (of_all[:, :3] != of_all[0, :3]).any():
        raise UserError(
            f"expected the pairs of a batch to have one shape, the processes have {of_all[:, :3].tolist()}:"
            " resample the scans to one grid, or train with optimiser.batch_size=1 in one process"
        )
    missing = int(of_all[:, 3].max()) - room
    padded = {
        name: np.pad(array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)))
        for name, array in batch.items()
        if "landmark" in name
    }
    return batch | padded, bool(of_all[:, 4].any())


def fetch(metrics: Sequence[tuple[int, Metrics]]) -> dict[int, dict[str, float]]:
    """Copies the metrics of some steps from the device.

    Args:
        metrics: the last step of each call of the program, and the metrics of its steps.

    Returns:
        The metrics of each step, as floats.

    Raises:
        UserError: a metric is not finite.
    """
    records = {}
    for last, values in jax.device_get(metrics):
        of_steps = {f"train/{name}": np.atleast_1d(value).tolist() for name, value in values.items()}
        for n, of_step in enumerate(zip(*of_steps.values(), strict=True)):
            step = last - len(of_steps["train/loss"]) + 1 + n
            records[step] = dict(zip(of_steps, of_step, strict=True))
            check_finite(records[step], step)
    return records


def check_start(start: int, steps: int) -> None:
    """Refuses to resume after `start` steps in programs of `steps` steps that would miss the intervals."""
    if start % steps:
        raise UserError(
            f"run.steps_per_dispatch is {steps}, and the run resumes at step {start}: expected a number that"
            f" divides it, for instance {math.gcd(start, steps)}"
        )


def check_finite(record: dict[str, float], step: int) -> None:
    """Raises UserError for the first metric that is not finite."""
    for name, value in record.items():
        if not math.isfinite(value):
            raise UserError(
                f"{name} is {value} at step {step}, so training stops; the last checkpoint is older:"
                " try a lower optimiser.learning_rate or optimiser.gradient_clip"
            )


def validate(
    validation_step: Callable[..., tuple[jax.Array, jax.Array]],
    params: Any,
    pairs: Sequence[Pair],
    step: int,
    *,
    put: Callable[..., dict[str, jax.Array]],
    make_batch: Callable[[Sequence[Pair]], pipeline.Batch] = pipeline.collate,
) -> dict[str, float]:
    """Mean loss over the validation pairs, and mean TRE over those with landmarks."""
    loss, tre = [], []
    for pair in pairs:
        batch = put(make_batch([pair]), [0], 1)
        pair_loss, displacement = validation_step(params, batch)
        loss.append(float(pair_loss))
        fixed, moving = pair.fixed_landmarks, pair.moving_landmarks
        if fixed is not None and moving is not None and len(fixed):
            tre.append(float(np.mean(tre_mm(to_host(displacement)[0], fixed, moving, pair.spacing_mm))))
    # In float32, like the best metric in the checkpoint, so that a resumed run compares the same numbers.
    means = {"validation/loss": loss} | ({"validation/tre_mm": tre} if tre else {})
    record = {name: float(np.float32(np.mean(values))) for name, values in means.items()}
    check_finite(record, step)
    return record


def decisive(validation: dict[str, float]) -> str:
    """Name of the validation metric whose lowest value marks the best checkpoint."""
    return "validation/tre_mm" if "validation/tre_mm" in validation else "validation/loss"


@contextlib.contextmanager
def remembered_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGTERM and SIGINT for the loop to check; a second one acts at once."""
    received: list[int] = []

    def remember(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def opening_line(state: TrainState, mesh: Mesh, total_steps: int) -> str:
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    begin = f"resumes at step {int(state.step)}" if int(state.step) else "starts"
    devices = f"{mesh.size} {mesh.devices.flat[0].platform} device" + ("s" if mesh.size > 1 else "")
    if shares_volumes(mesh):
        devices += f", {mesh.shape['space']} per volume"
    return f"training {begin}: {total_steps} steps, {parameters:,} parameters, {devices}"


def closing_line(state: TrainState, steps_per_epoch: int) -> str:
    best = f"; best {float(state.best_metric):.4f} of epoch {int(state.best_step) // steps_per_epoch}"
    return f"training is complete at step {int(state.step)}" + (best if int(state.best_step) else "")
