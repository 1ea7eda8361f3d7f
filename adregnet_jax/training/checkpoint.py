"""Checkpoints of a run: the two newest and the best, written in the background, complete or not at all.

`workdir/checkpoints/<step>` has two parts, `params` and `progress` (the rest of the `TrainState`), so that
evaluation can read the network's parameters alone. With a moving average, `params` is the average.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from adregnet_jax.config import ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.nn.models import model_from_record
from adregnet_jax.training.state import TrainState
from adregnet_jax.weights.trained_network import TrainedNetwork, TrainingDomain

NEWEST_KEPT = 2  # two, in case the newest is damaged
METRIC = "validation"  # the name of the validation metric in a checkpoint
SAME_NETWORK = ("remat", "attention_block", "convolution")  # settings that affect memory and time only
PARAMETER_SHAPE = (32, 32, 32)  # any: the shapes of parameters don't depend on that of the scan


class Checkpoints:
    """Saves and restores the checkpoints of a run.

    Args:
        workdir: folder of the run.
        say: called with a line about damage and its consequences.

    Raises:
        UserError: the checkpoints can't be read.
    """

    def __init__(self, workdir: Path, say: Callable[[str], None] = print) -> None:
        self._workdir = workdir
        self._say = say
        self._retried = False  # whether the last save took a second attempt
        self._last_save: ocp.AsyncResponse[bool] | None = None
        try:
            self._checkpointer = self._open()
        except Exception as error:  # Orbax raises exceptions of all kinds for damaged metrics
            damaged = [] if jax.process_count() > 1 else _unreadable(workdir)
            if not damaged:
                raise UserError(f"the checkpoints in {workdir} can't be read ({_brief(error)})") from error
            _move_aside(workdir, damaged)
            for step in damaged:
                say(f"the checkpoint of step {step} can't be read and was moved away ({_brief(error)})")
            self._checkpointer = self._open()

    def _open(self, *, tidy: bool = True) -> ocp.training.Checkpointer:
        policies = ocp.training.preservation_policies
        lowest = policies.BestN(
            get_metric_fn=lambda metrics: metrics[METRIC],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        return ocp.training.Checkpointer(
            _folder(self._workdir),
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(NEWEST_KEPT), lowest]),
            cleanup_tmp_directories=tidy,
        )

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """The newest state that can be read, or None in a new workdir.

        Newer checkpoints that can't be read are moved to the folder `unreadable` of the workdir, but only
        after
        an older one was read: other causes than damage, such as too little memory, move nothing.

        Raises:
            UserError: no checkpoint can be read, or they belong to a different run. A run of several
                processes doesn't fall back on an older checkpoint, on which its processes would have to
                agree.
        """
        failed: dict[int, str] = {}  # reason by step, newest first
        for checkpoint in sorted(self._checkpointer.checkpoints, key=lambda found: -found.step):
            try:
                state = self._restore(checkpoint, abstract_state)
            except UserError:
                raise
            except Exception as error:  # Orbax and its libraries raise all kinds for damaged files
                failed[checkpoint.step] = _brief(error)
                if jax.process_count() > 1:
                    break
                continue
            if failed:
                self._put_aside(failed)
                for step, reason in failed.items():
                    self._say(f"the checkpoint of step {step} can't be read and was moved away ({reason})")
            return state
        if failed:
            step, reason = next(iter(failed.items()))
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} can't be read ({reason}), and there is"
                " no other to resume from: try again in one process, restore a copy, or use another --workdir"
            )
        return None

    def _put_aside(self, steps: Iterable[int], *, tidy: bool = True) -> None:
        """Moves damaged checkpoints away, so that they aren't kept instead of good ones."""
        with contextlib.suppress(Exception):  # a failed save, which was reported
            self._checkpointer.close()
        _move_aside(self._workdir, steps)
        self._checkpointer = self._open(tidy=tidy)

    def _restore(self, checkpoint: Any, abstract_state: TrainState) -> TrainState:
        network = _load(self._checkpointer, checkpoint, abstract_state.network, self._workdir)
        self._check_average(checkpoint, abstract_state)
        abstract_progress = {"progress": _without_network(abstract_state)}
        progress = self._checkpointer.load_checkpointables(checkpoint, abstract_progress)["progress"]
        if abstract_state.average is None:
            return progress.replace(params=network)
        return progress.replace(average=network)

    def _check_average(self, checkpoint: Any, abstract_state: TrainState) -> None:
        stored = self._checkpointer.checkpointables_metadata(checkpoint).metadata["progress"]
        theirs, ours = stored["params"] is not None, abstract_state.average is not None
        if theirs != ours:
            have = ["no moving average", "a moving average"]
            raise UserError(
                f"{self._workdir} holds a run with {have[theirs]} of the parameters, but"
                f" optimiser.average_decay now asks for {have[ours]}: use another --workdir, or set it back"
            )

    def save(self, step: int, state: TrainState, *, metric: float | None = None) -> None:
        """Starts writing the state of `step`; `metric` is its validation metric, if it was validated.

        If this or the previous write fails while the disk has room, files were changed or deleted during the
        run: the state is then saved once more.

        Raises:
            UserError: the disk is full, or the second attempt fails as well.
        """
        try:
            self._save(step, state, metric)
        except Exception as error:  # Orbax raises all kinds for missing or damaged files
            if self._retried or _disk_is_full(error) or jax.process_count() > 1:
                raise self._refusal(error) from error
            self._say(
                f"a checkpoint could not be written ({_brief(error)}); writing that of step {step} again"
            )
            try:
                self._put_aside(_unreadable(self._workdir), tidy=False)  # a write may still be running
                self._save(step, state, metric)
            except Exception as again:
                raise self._refusal(again) from again
            self._retried = True
        else:
            self._retried = False

    def _save(self, step: int, state: TrainState, metric: float | None) -> None:
        self._finish_last_save()
        self._last_save = self._checkpointer.save_checkpointables_async(
            step,
            {"params": state.network, "progress": _without_network(state)},
            force=True,
            metrics=None if metric is None else {METRIC: float(metric)},
        )

    def _finish_last_save(self) -> None:
        """Waits for the last save, which releases its thread, event loop and three open files."""
        response, self._last_save = self._last_save, None
        if response is not None:
            response.result()

    def close(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        try:
            try:
                self._finish_last_save()
            finally:
                self._checkpointer.close()
        except Exception as error:  # as in `save`
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> UserError:
        reason = _system_reason(error) or _brief(error)
        advice = "make room" if _disk_is_full(error) else "make sure that nothing else changes its files"
        return UserError(
            f"can't save a checkpoint in {self._workdir}: {reason}; complete ones are kept:"
            f" {advice} and run the same command again"
        )


def restore_parameters(
    workdir: Path, abstract_params: Any = None, *, which: Literal["best", "newest"] = "best"
) -> tuple[Any, int]:
    """Reads the parameters of a trained run.

    Args:
        workdir: folder of the run.
        abstract_params: the expected tree, of arrays or of `jax.ShapeDtypeStruct` as `jax.eval_shape` returns
            it. Parameters are placed by its sharding, if it has one, else on one device. None: any tree.
        which: `best` on the validation split (the newest, if none was validated), or `newest`.

    Returns:
        The parameters, and the step of their checkpoint.

    Raises:
        UserError: there is no checkpoint that can be read, or it has a different architecture.
    """
    if not _folder(workdir).is_dir():
        raise UserError(f"{workdir} holds no checkpoint: train first, or use the workdir of a trained run")
    try:
        opened = ocp.training.Checkpointer(_folder(workdir))
    except Exception as error:  # as in `Checkpoints`
        raise UserError(
            f"a checkpoint in {workdir} can't be read ({_brief(error)}): restore a copy, or resume the"
            " training, which moves it away"
        ) from error
    with opened as checkpointer:
        if checkpointer.latest is None:
            raise UserError(
                f"{workdir} holds no complete checkpoint yet: continue the training, then try again"
            )
        validated = [found for found in checkpointer.checkpoints if found.metrics]
        chosen = checkpointer.latest
        if which == "best" and validated:
            chosen = min(validated, key=lambda found: found.metrics[METRIC])
        try:
            return _load(checkpointer, chosen, abstract_params, workdir), chosen.step
        except UserError:
            raise
        except Exception as error:  # Orbax and its libraries raise all kinds for damaged files
            raise UserError(
                f"the checkpoint of step {chosen.step} in {workdir} can't be read ({_brief(error)}):"
                " restore a copy; a resumed training falls back on an older one, if there is one"
            ) from error


def restore_network(workdir: Path) -> TrainedNetwork:
    """The network of a trained run, built from its config.json, with its best parameters.

    Raises:
        UserError: there is no such run or no checkpoint, or its architecture differs from config.json.
    """
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model = model_from_record(record["config"]["model"])
        scans = _trained_scans(record)
        volume = jax.ShapeDtypeStruct((1, *PARAMETER_SHAPE, 1), jnp.float32)
        abstract = jax.eval_shape(model.init, jax.random.key(0), volume, volume)["params"]
    except OSError:
        raise UserError(
            f"{workdir} holds no config.json: expected the workdir of a run of train.py"
        ) from None
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} describes no model that this version knows ({reason}): use the workdir of another run"
        ) from None
    return TrainedNetwork(model, restore_parameters(workdir, abstract)[0], scans, str(workdir))


def _trained_scans(record: Mapping[str, Any]) -> TrainingDomain:
    """The grid of the training pairs, as far as config.json records it: older versions recorded less."""
    data = record["config"].get("data", {})
    if data.get("kind") == "synthetic":  # whose millimetres have no physical meaning
        voxels = math.prod(data["synthetic"]["shape"])
        twice = (voxels, 8 * voxels)  # a second pass at half the spacing
        return TrainingDomain(axes=record.get("axes", "RAS"), voxels=twice, same_contrast=True)
    spacing_mm = record.get("spacing_mm")
    return TrainingDomain(record.get("axes"), None if spacing_mm is None else tuple(map(float, spacing_mm)))


def check_architecture(workdir: Path, model: ModelConfig) -> None:
    """Refuses a workdir whose run has a different model.

    Raises:
        UserError: the model differs (the message names the first setting), or config.json can't be read.
    """
    record = workdir / "config.json"
    if not (record.is_file() and _folder(workdir).is_dir() and any(_folder(workdir).iterdir())):
        return
    # Settings introduced after that run started had the effect of their defaults.
    try:
        theirs = dataclasses.asdict(ModelConfig()) | json.loads(record.read_text())["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{record}: not the record of a run ({type(error).__name__}): restore a copy, or use another"
            " --workdir"
        ) from None
    ours = json.loads(json.dumps(dataclasses.asdict(model)))  # tuples become lists, as in the file
    for name, value in ours.items():
        if name in SAME_NETWORK:
            continue
        if theirs.get(name) != value:
            raise UserError(
                f"{workdir} holds a run with model.{name}={theirs.get(name)}, this config has {value}:"
                " use another --workdir, or set it back"
            )


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _without_network(state: TrainState) -> TrainState:
    return state.replace(params=None) if state.average is None else state.replace(average=None)


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / "checkpoints"


def _unreadable(workdir: Path) -> list[int]:
    """Steps whose metadata or metrics can't be read: Orbax then neither lists nor saves any checkpoint."""
    steps = []
    for path in _folder(workdir).glob("[0-9]*"):
        if not path.name.isdigit():
            continue
        try:
            for name in ("_CHECKPOINT_METADATA", "metrics/metrics"):
                if (path / name).exists():
                    json.loads((path / name).read_bytes())
        except (OSError, ValueError):
            steps.append(int(path.name))
    return steps


def _move_aside(workdir: Path, steps: Iterable[int]) -> None:
    aside = workdir / "unreadable"
    aside.mkdir(parents=True, exist_ok=True)
    for step in steps:
        shutil.rmtree(aside / str(step), ignore_errors=True)
        (_folder(workdir) / str(step)).rename(aside / str(step))


def _load(
    checkpointer: ocp.training.Checkpointer, checkpoint: Any, abstract_params: Any, workdir: Path
) -> Any:
    """The parameters of `checkpoint`, after checking their names and shapes."""
    stored = checkpointer.checkpointables_metadata(checkpoint).metadata["params"]
    if stored is None:
        raise ValueError("its metadata can't be read")
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or one_device)

    if abstract_params is None:
        abstract = jax.tree.map(lambda x: placed(x, None), stored)
    else:
        check_parameters(stored, abstract_params, f"the checkpoint in {workdir}")
        abstract = jax.tree.map(lambda x: placed(x, getattr(x, "sharding", None)), abstract_params)
    return checkpointer.load_checkpointables(checkpoint, {"params": abstract})["params"]


def check_parameters(stored: Any, params: Any, what: str) -> None:
    """Refuses parameters whose names or shapes differ from those of `params`.

    Raises:
        UserError: the message calls the parameters `what` and names the first that differs.
    """
    theirs, ours = _shapes(stored), _shapes(params)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{what} has a different architecture: parameter {name} is {theirs.get(name, 'absent')} there"
                f" and {ours.get(name, 'absent')} in this config: use the config of that run, or another run"
            )


def completed_parameters(stored: Any, start: Any, what: str) -> tuple[Any, list[str]]:
    """Completes the parameters `stored` with those of `start` that they lack.

    Returns:
        The parameters, with the names and shapes of `start`, and the names missing in `stored`.

    Raises:
        UserError: `stored`, which the message calls `what`, has further parameters or other shapes, or
            shares no parameters with `start`.
    """
    theirs, ours = (flatten_dict(dict(tree), sep="/") for tree in (stored, start))
    missing = [name for name in ours if name not in theirs]
    whole = unflatten_dict(ours | theirs, sep="/")
    check_parameters(whole if len(missing) < len(ours) else stored, start, what)
    return whole, missing


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves
    }


def _disk_is_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return _system_reason(error) in [os.strerror(number) for number in full]


def _system_reason(error: BaseException | None) -> str | None:
    """The operating system's reason for a failed save, if any; tensorstore gives its number as text."""
    seen = set()
    while error is not None and id(error) not in seen:  # causes may form a circle
        seen.add(id(error))
        if isinstance(error, OSError):
            return error.strerror or str(error)
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return os.strerror(int(code[1]))
        if "RESOURCE_EXHAUSTED" in str(error):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None
