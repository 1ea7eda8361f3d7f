"""Checkpoints of a run: two newest and the best, written in the background, complete or not there.

`workdir/checkpoints/<step>` holds two parts, `params` and `progress` (the rest of the `TrainState`), so that
evaluation reads the network's parameters alone. With a moving average, `params` is the average.
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
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from adregnet_jax.config import ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.nn.models import model_from_record
from adregnet_jax.training.state import TrainState
from adregnet_jax.weights.trained_network import TrainedNetwork, TrainingDomain

NEWEST_KEPT = 2  # the second one is for the case that the newest is damaged
METRIC = "validation"  # the name of the validation metric in a checkpoint
SAME_NETWORK = ("remat", "attention_block", "convolution")  # settings that change memory and time alone
PARAMETER_SHAPE = (32, 32, 32)  # parameters are of no scan's shape: any does to learn theirs


class Checkpoints:
    """The checkpoints of one workdir, for the run that writes them.

    Args:
        workdir: of the run.
        say: is told of what was damaged and how it goes on.
    """

    def __init__(self, workdir: Path, say: Callable[[str], None] = print):
        self._workdir = workdir
        self._say = say
        self._saves_anew = False  # the last save was a second try
        self._last_save: ocp.AsyncResponse[bool] | None = None
        try:
            self._checkpointer = self._open()
        except Exception as error:  # whatever Orbax makes of metrics that are damaged
            damaged = [] if jax.process_count() > 1 else _unreadable(workdir)
            if not damaged:
                raise UserError(f"the checkpoints in {workdir} can't be read ({_told(error)})") from error
            _move_aside(workdir, damaged)
            for step in damaged:
                say(f"the checkpoint of step {step} can't be read and was put aside ({_told(error)})")
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

        Newer ones, which can't be, are put aside in the folder `unreadable` of the workdir. That is done
        once an older one was read: what is no damage, as too little memory, moves nothing.

        Raises:
            UserError: none can be read, or they are of another run; of a run of several processes, which
                would have to agree, also where an older one could be read.
        """
        failed: dict[int, str] = {}  # why, by step, newest first
        for checkpoint in sorted(self._checkpointer.checkpoints, key=lambda found: -found.step):
            try:
                state = self._restore(checkpoint, abstract_state)
            except UserError:
                raise
            except Exception as error:  # whatever Orbax and its libraries make of damaged files
                failed[checkpoint.step] = _told(error)
                if jax.process_count() > 1:
                    break
                continue
            if failed:
                self._put_aside(failed)
                for step, reason in failed.items():
                    self._say(f"the checkpoint of step {step} can't be read and was put aside ({reason})")
            return state
        if failed:
            step, reason = next(iter(failed.items()))
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} can't be read ({reason}), nor is there"
                " another one to go on from: try again in one process, bring back a copy, or take another"
                " --workdir"
            )
        return None

    def _put_aside(self, steps: Iterable[int], *, tidy: bool = True) -> None:
        """Else the newest of them would count as such, and a good one would be deleted in its place."""
        with contextlib.suppress(Exception):  # a failed save, which has been told
            self._checkpointer.close()
        _move_aside(self._workdir, steps)
        self._checkpointer = self._open(tidy=tidy)

    def _restore(self, checkpoint, abstract_state: TrainState) -> TrainState:
        network = _load(self._checkpointer, checkpoint, abstract_state.network, self._workdir)
        self._check_average(checkpoint, abstract_state)
        abstract_progress = {"progress": _without_network(abstract_state)}
        progress = self._checkpointer.load_checkpointables(checkpoint, abstract_progress)["progress"]
        if abstract_state.average is None:
            return progress.replace(params=network)
        return progress.replace(average=network)

    def _check_average(self, checkpoint, abstract_state: TrainState) -> None:
        stored = self._checkpointer.checkpointables_metadata(checkpoint).metadata["progress"]
        theirs, ours = stored["params"] is not None, abstract_state.average is not None
        if theirs != ours:
            have = ["no moving average", "a moving average"]
            raise UserError(
                f"{self._workdir} holds a run with {have[theirs]} of the parameters, and"
                f" optimiser.average_decay now asks for {have[ours]}: give another --workdir, or set it back"
            )

    def save(self, step: int, state: TrainState, *, metric: float | None = None) -> None:
        """Starts to write the state of `step`; `metric` is its validation metric, if it was validated.

        Where that can't be done, or the write before it failed in the background, and it is not for want of
        room, files were changed or deleted under the run: this state is saved anew, once.

        Raises:
            UserError: there is no room, or the second try fails as well.
        """
        try:
            self._save(step, state, metric)
        except Exception as error:  # whatever Orbax makes of files that are gone or damaged
            if self._saves_anew or _wants_room(error) or jax.process_count() > 1:
                raise self._refusal(error) from error
            self._say(
                f"a checkpoint could not be written ({_told(error)}); that of step {step} is written anew"
            )
            try:
                self._put_aside(_unreadable(self._workdir), tidy=False)  # a write may still be going on
                self._save(step, state, metric)
            except Exception as again:
                raise self._refusal(again) from again
            self._saves_anew = True
        else:
            self._saves_anew = False

    def _save(self, step: int, state: TrainState, metric: float | None) -> None:
        self._finish_last_save()
        self._last_save = self._checkpointer.save_checkpointables_async(
            step,
            {"params": state.network, "progress": _without_network(state)},
            force=True,
            metrics=None if metric is None else {METRIC: float(metric)},
        )

    def _finish_last_save(self) -> None:
        """Waits for it. A response that nobody asks keeps its thread, an event loop and three open files."""
        response, self._last_save = self._last_save, None
        if response is not None:
            response.result()

    def close(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            UserError: it could not be written.
        """
        try:
            try:
                self._finish_last_save()
            finally:
                self._checkpointer.close()
        except Exception as error:  # as in `save`
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> UserError:
        reason = _system_reason(error) or _told(error)
        mend = "make room" if _wants_room(error) else "see that nothing changes its files"
        return UserError(
            f"can't save a checkpoint in {self._workdir}: {reason}; complete ones are kept:"
            f" {mend} and run the same command again"
        )


def restore_parameters(workdir: Path, abstract_params=None, which: str = "best") -> tuple[Any, int]:
    """The parameters of a trained run, and the step they are from.

    Args:
        workdir: of the run.
        abstract_params: their tree of arrays or of `jax.ShapeDtypeStruct`, as `jax.eval_shape` gives it; with
            a sharding, they are placed by it, else on one device. None: whatever tree is stored.
        which: `best` on the validation split (the newest, if none was validated), or `newest`.

    Raises:
        UserError: if there is no checkpoint, or it is of another architecture.
    """
    if not _folder(workdir).is_dir():
        raise UserError(
            f"{workdir} holds no checkpoint: train first, or give the workdir of a run that was trained"
        )
    try:
        opened = ocp.training.Checkpointer(_folder(workdir))
    except Exception as error:  # as in `Checkpoints`
        raise UserError(
            f"a checkpoint in {workdir} can't be read ({_told(error)}): bring back a copy, or train again,"
            " which puts it aside"
        ) from error
    with opened as checkpointer:
        if checkpointer.latest is None:
            raise UserError(f"{workdir} holds no complete checkpoint yet: train on, then try again")
        validated = [found for found in checkpointer.checkpoints if found.metrics]
        chosen = checkpointer.latest
        if which == "best" and validated:
            chosen = min(validated, key=lambda found: found.metrics[METRIC])
        try:
            return _load(checkpointer, chosen, abstract_params, workdir), chosen.step
        except UserError:
            raise
        except Exception as error:  # whatever Orbax and its libraries make of damaged files
            raise UserError(
                f"the checkpoint of step {chosen.step} in {workdir} can't be read ({_told(error)}): bring"
                " back a copy; training again goes on from an older one, if there is one"
            ) from error


def restore_network(workdir: Path) -> TrainedNetwork:
    """The network of a trained run, as its config.json tells, and its best parameters.

    Raises:
        UserError: there is no such run, no checkpoint, or it is of another architecture than config.json.
    """
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        model = model_from_record(record["config"]["model"])
        scans = _trained_scans(record)
        volume = jax.ShapeDtypeStruct((1, *PARAMETER_SHAPE, 1), jnp.float32)
        abstract = jax.eval_shape(model.init, jax.random.key(0), volume, volume)["params"]
    except OSError:
        raise UserError(f"{workdir} holds no config.json: give the workdir of a run of train.py") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} tells of no model that this version knows ({reason}): give the workdir of another run"
        ) from None
    return TrainedNetwork(model, restore_parameters(workdir, abstract)[0], scans, str(workdir))


def _trained_scans(record: Mapping[str, Any]) -> TrainingDomain:
    """The grid of the training pairs, as far as config.json tells; older versions told less."""
    data = record["config"].get("data", {})
    if data.get("kind") == "synthetic":  # whose millimetres are of nothing
        voxels = math.prod(data["synthetic"]["shape"])
        twice = (voxels, 8 * voxels)  # the second time at half the spacing
        return TrainingDomain(axes=record.get("axes", "RAS"), voxels=twice, same_contrast=True)
    spacing_mm = record.get("spacing_mm")
    return TrainingDomain(record.get("axes"), None if spacing_mm is None else tuple(map(float, spacing_mm)))


def check_architecture(workdir: Path, model: ModelConfig) -> None:
    """Refuses a workdir whose run has another model, naming the first setting that differs."""
    record = workdir / "config.json"
    if not (record.is_file() and _folder(workdir).is_dir() and any(_folder(workdir).iterdir())):
        return
    # A setting that came after that run has its default there.
    try:
        theirs = dataclasses.asdict(ModelConfig()) | json.loads(record.read_text())["config"]["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{record}: not the record of a run ({type(error).__name__}): bring back a copy, or give another"
            " --workdir"
        ) from None
    ours = json.loads(json.dumps(dataclasses.asdict(model)))  # tuples become lists, as in the file
    for name, value in ours.items():
        if name in SAME_NETWORK:
            continue
        if theirs.get(name) != value:
            raise UserError(
                f"{workdir} holds a run with model.{name}={theirs.get(name)}, this config has {value}:"
                " give another --workdir, or set it back"
            )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _without_network(state: TrainState) -> TrainState:
    return state.replace(params=None) if state.average is None else state.replace(average=None)


def _folder(workdir: Path) -> Path:
    return workdir.absolute() / "checkpoints"


def _unreadable(workdir: Path) -> list[int]:
    """The steps whose metadata or metrics can't be read: these keep others from being listed and saved."""
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


def _load(checkpointer, checkpoint, abstract_params, workdir: Path):
    """The parameters of `checkpoint`, after a look at their names and shapes."""
    stored = checkpointer.checkpointables_metadata(checkpoint).metadata["params"]
    if stored is None:
        raise ValueError("its metadata can't be read")
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or one_device)

    if abstract_params is None:
        abstract = jax.tree.map(lambda x: placed(x, None), stored)
    else:
        check_parameters(stored, abstract_params, f"the checkpoint in {workdir}")
        abstract = jax.tree.map(lambda x: placed(x, getattr(x, "sharding", None)), abstract_params)
    return checkpointer.load_checkpointables(checkpoint, {"params": abstract})["params"]


def check_parameters(stored: Any, params: Any, what: str) -> None:
    """Refuses parameters whose names or shapes are not those of `params`; `what` names them.

    Raises:
        UserError: with the first that differs.
    """
    theirs, ours = _shapes(stored), _shapes(params)
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{what} is of another architecture: parameter {name} is {theirs.get(name, 'absent')} there"
                f" and {ours.get(name, 'absent')} in this config: use the config of that run, or another"
            )


def completed_parameters(stored: Any, start: Any, what: str) -> tuple[Any, list[str]]:
    """The parameters `stored`, and those of `start` for the modules that these lack.

    Returns:
        The parameters, with the names and shapes of `start`, and the names that `stored` lacks.

    Raises:
        UserError: `stored`, which `what` names, has others, or of other shapes, or none that `start` has.
    """
    theirs, ours = (flatten_dict(dict(tree), sep="/") for tree in (stored, start))
    lacking = [name for name in ours if name not in theirs]
    whole = unflatten_dict(ours | theirs, sep="/")
    check_parameters(whole if len(lacking) < len(ours) else stored, start, what)
    return whole, lacking


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves
    }


def _wants_room(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return _system_reason(error) in [os.strerror(number) for number in full]


def _system_reason(error: BaseException | None) -> str | None:
    """What the operating system said, if that stopped a save; tensorstore puts the number in its text."""
    seen = set()
    while error is not None and id(error) not in seen:  # a chain of causes may come back to itself
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
