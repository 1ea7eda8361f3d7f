"""Checkpoints: which are kept, that saves are not disturbed, and messages about unusable ones."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import threading
import warnings
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.training.checkpoint import (
    Checkpoints,
    _system_reason,
    check_architecture,
    restore_parameters,
)
from adregnet_jax.training.loop import initial_state
from adregnet_jax.training.sharding import make_mesh
from adregnet_jax.training.state import TrainState


def make_state(step: int, size: int = 8, *, averaged: bool = False) -> TrainState:
    return TrainState(
        step=jnp.int32(step),
        params={"block": {"kernel": jnp.full(size, step, jnp.float32)}},
        opt_state=({"mu": jnp.full(size, -step, jnp.float32)},),
        best_metric=jnp.float32(0.5),
        best_step=jnp.int32(1),
        average={"block": {"kernel": jnp.full(size, step / 2, jnp.float32)}} if averaged else None,
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved_steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_the_two_newest_and_the_best_are_kept_even_after_a_restart(tmp_path):
    metrics = {1: 5.0, 2: None, 3: 2.0, 4: None, 5: 3.0, 6: None}
    for some in ((1, 2, 3), (4, 5, 6)):
        checkpoints = Checkpoints(tmp_path)
        for step in some:
            checkpoints.save(step, make_state(step), metric=metrics[step])
        checkpoints.close()
    assert saved_steps(tmp_path) == [3, 5, 6]

    expected = make_state(6)
    restored = Checkpoints(tmp_path).restore(abstract(expected))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    steps: dict[Literal["best", "newest"], int] = {"best": 3, "newest": 6}
    for which, step in steps.items():
        params, _ = restore_parameters(tmp_path, expected.params, which=which)
        jax.tree.map(np.testing.assert_array_equal, params, make_state(step).params)


DAMAGES = {
    "a file cut short": lambda files: os.truncate(max(files, key=lambda file: file.stat().st_size), 10),
    "all files empty": lambda files: [file.write_bytes(b"") for file in files],
    "files gone": lambda files: [file.unlink() for file in files],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_taken(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path)
    for step in (4, 6, 8):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    damage([path for path in (tmp_path / "checkpoints" / "8").rglob("*") if path.is_file()])
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, said.append)
    restored = checkpoints.restore(abstract(make_state(6)))
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(6))
    assert len(said) == 1 and said[0].startswith("the checkpoint of step 8 can't be read and was moved")
    checkpoints.save(7, make_state(7))
    checkpoints.close()
    assert saved_steps(tmp_path) == [6, 7] and (tmp_path / "unreadable" / "8").is_dir()


def test_damaged_metrics_are_put_aside_as_well(tmp_path):
    """They are read when the folder is opened."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), metric=float(step))
    checkpoints.close()
    metrics = tmp_path / "checkpoints" / "1" / "metrics" / "metrics"
    os.truncate(metrics, metrics.stat().st_size // 2)
    with pytest.raises(UserError, match=r"a checkpoint in .* can't be read .*: restore a copy, or resume"):
        restore_parameters(tmp_path, make_state(1).params)
    said: list[str] = []
    restored = Checkpoints(tmp_path, said.append).restore(abstract(make_state(3)))
    assert int(restored.step) == 3
    assert len(said) == 1 and "step 1 can't be read and was moved" in said[0]
    assert saved_steps(tmp_path) == [2, 3] and (tmp_path / "unreadable" / "1").is_dir()


def test_training_does_not_start_over_if_no_checkpoint_can_be_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(8, make_state(8))
    checkpoints.close()
    DAMAGES["all files empty"]([path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()])
    with pytest.raises(UserError, match=r"checkpoint of step 8 in .* can't be read"):
        restore_parameters(tmp_path, make_state(8).params)
    for _ in range(2):  # nor at the second try
        with pytest.raises(UserError, match=r"step 8 in .* can't be read .* and there is no other"):
            Checkpoints(tmp_path).restore(abstract(make_state(8)))


def test_with_an_average_it_is_the_network_and_both_are_restored(tmp_path):
    expected = make_state(3, averaged=True)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, expected)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(abstract(expected))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    params, _ = restore_parameters(tmp_path, expected.params)
    jax.tree.map(np.testing.assert_array_equal, params, expected.average)
    with pytest.raises(UserError, match="a moving average of the parameters"):
        Checkpoints(tmp_path).restore(abstract(make_state(3)))


def test_a_run_without_an_average_does_not_continue_with_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3))
    checkpoints.close()
    with pytest.raises(UserError, match="no moving average of the parameters"):
        Checkpoints(tmp_path).restore(abstract(make_state(3, averaged=True)))


def test_a_save_is_not_disturbed_by_steps_that_reuse_its_memory(tmp_path):
    step_on = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = make_state(7, size=1_000_000)
    saved = abstract(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state)
    for _ in range(20):
        state = step_on(state)
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(saved)
    assert set(np.unique(restored.params["block"]["kernel"])) == {7.0}


def test_new_workdir_has_nothing_to_restore(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(abstract(make_state(0))) is None
    with pytest.raises(UserError, match="no complete checkpoint"):
        restore_parameters(tmp_path, make_state(0).params)
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        restore_parameters(tmp_path / "elsewhere", make_state(0).params)


def test_parameters_of_another_architecture_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1))
    checkpoints.close()
    with pytest.raises(UserError, match=r"block/kernel is \(8,\) there and \(9,\) in this config"):
        Checkpoints(tmp_path).restore(abstract(make_state(1, size=9)))
    with pytest.raises(UserError, match=r"parameter head is absent there and \(2,\)"):
        restore_parameters(tmp_path, {"head": jnp.zeros(2), **make_state(1).params})


def test_model_setting_that_differs_is_named(tmp_path):
    check_architecture(tmp_path, ModelConfig())  # nothing there yet
    record = {"config": {"model": dataclasses.asdict(ModelConfig(channels=(4, 8)))}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    check_architecture(tmp_path, ModelConfig(channels=(8, 8)))  # no checkpoint: the run may change
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    check_architecture(tmp_path, ModelConfig(channels=(4, 8)))
    with pytest.raises(UserError, match=r"model\.channels=\[4, 8\], this config has \[8, 8\]"):
        check_architecture(tmp_path, ModelConfig(channels=(8, 8)))
    with pytest.raises(UserError, match=r"model\.architecture=adregnet, this config has voxelmorph-1"):
        check_architecture(tmp_path, ModelConfig(architecture="voxelmorph-1", channels=(4, 8)))


def test_a_run_from_before_a_setting_has_its_default(tmp_path):
    settings = dataclasses.asdict(ModelConfig(channels=(4, 8)))
    del settings["architecture"], settings["convolution"]
    (tmp_path / "config.json").write_text(json.dumps({"config": {"model": settings}}))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    check_architecture(tmp_path, ModelConfig(channels=(4, 8)))
    with pytest.raises(UserError, match=r"model\.architecture=adregnet, this config has voxelmorph-1"):
        check_architecture(tmp_path, ModelConfig(architecture="voxelmorph-1", channels=(4, 8)))


def test_the_implementation_of_convolutions_may_change(tmp_path):
    settings = dataclasses.asdict(ModelConfig(convolution="onednn"))
    (tmp_path / "config.json").write_text(json.dumps({"config": {"model": settings}}))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    check_architecture(tmp_path, ModelConfig())


def test_disk_that_fills_while_saving(tmp_path):
    """A limit on file size simulates a full disk: the write fails in the background thread."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1))
    checkpoints.save(2, make_state(2))  # waits for the first
    noise = {"kernel": jax.random.normal(jax.random.key(0), (300_000,))}  # does not compress
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            warnings.catch_warnings(),
            pytest.raises(UserError, match=r"can't save .*File too large; .* are kept"),
        ):
            checkpoints.save(3, make_state(3).replace(params=noise))
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    params, _ = restore_parameters(tmp_path, make_state(2).params, which="newest")
    assert set(np.unique(params["block"]["kernel"])) == {2.0}


def test_saves_leave_no_event_loops(tmp_path):
    """Each has a thread and three open files."""

    def loops():
        return sum("_run_loop" in thread.name for thread in threading.enumerate())

    before = loops()
    checkpoints = Checkpoints(tmp_path)
    for step in range(1, 9):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    assert loops() <= before + 1  # of the last deletion, perhaps


def test_files_deleted_or_damaged_during_a_run_are_saved_again(tmp_path):
    for change in (delete_all, damage_all):
        workdir = tmp_path / change.__name__
        said: list[str] = []
        checkpoints = Checkpoints(workdir, said.append)
        checkpoints.save(1, make_state(1), metric=0.5)
        checkpoints.save(2, make_state(2))
        checkpoints._finish_last_save()
        change(workdir / "checkpoints")
        for step in (3, 4, 5):
            checkpoints.save(step, make_state(step))
        checkpoints.close()
        assert all("again" in line for line in said) and len(said) <= 1
        assert int(Checkpoints(workdir, said.append).restore(abstract(make_state(5))).step) == 5


def delete_all(folder):
    shutil.rmtree(folder, ignore_errors=True)  # what is being written meanwhile may stay


def damage_all(folder):
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a file that is still being written
                os.truncate(Path(path, name), Path(path, name).stat().st_size // 2)


def test_a_save_that_fails_twice_ends_the_run(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, lambda _: None)
    checkpoints.save(1, make_state(1))
    monkeypatch.setattr(checkpoints, "_save", broken)
    with pytest.raises(UserError, match=r"can't save .* ValueError: no such thing; complete ones are kept"):
        checkpoints.save(2, make_state(2))
    monkeypatch.undo()
    checkpoints.close()
    assert saved_steps(tmp_path) == [1]


def test_circular_causes_end():
    first, second = ValueError("one"), ValueError("other")
    first.__cause__, second.__cause__ = second, first
    assert _system_reason(first) is None
    second.__cause__ = OSError(28, "No space left on device")
    assert _system_reason(first) == "No space left on device"


def broken(*_):
    raise ValueError("no such thing")


def test_a_run_can_start_from_the_best_parameters_of_another(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3), metric=1.0)
    checkpoints.save(6, make_state(6), metric=2.0)
    checkpoints.close()
    mesh = make_mesh(1, 1)
    said: list[str] = []
    key = jax.random.key(0)
    state = initial_state(lambda key: make_state(0), key, mesh, str(tmp_path), said.append)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(0).replace(params=make_state(3).params))
    fresh = initial_state(lambda key: make_state(0), key, mesh, "", said.append)
    jax.tree.map(np.testing.assert_array_equal, fresh, make_state(0))
    assert not said
    wider = make_state(0, size=9)
    with pytest.raises(UserError, match=r"init_from=.* has a different architecture"):
        initial_state(lambda key: wider, key, mesh, str(tmp_path), said.append)
