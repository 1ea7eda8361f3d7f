"""A run of several processes has the same losses as one process, which can resume it after a kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adregnet_jax.errors import UserError
from adregnet_jax.training import loop
from tests.xla_flags import QUICK_TO_COMPILE

ROOT = Path(__file__).parents[2]
TINY = """
from adregnet_jax.config import *

def get_config():
    phantom = PhantomConfig(
        shape=(16, 16, 16), spacing_mm=(20.0, 20.0, 20.0), landmarks=8,
        train_cases=6, validation_cases=1, test_cases=1,
    )
    return Config(
        data=DataConfig(phantom=phantom, flip_axes=(0,), exchange=True, intensity_jitter=0.05),
        model=ModelConfig(  # the parts without which it compiles in seconds
            channels=(4,), cross_attention=False, regional_attention=False, multi_resolution=False,
            dropout=0.2,
        ),
        loss=LossConfig(ncc_window=0, jacobian=0),
        optimiser=OptimiserConfig(epochs=4, learning_rate=1e-3, batch_size=2),
        run=RunConfig(checkpoint_every_steps=2, log_every_steps=1),
    )
"""
STEPS = 12


def command(config: Path, workdir: Path, *options: str) -> subprocess.Popen:
    # Each process has one CPU device.
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "train.py", "--config", str(config), "--workdir", str(workdir), *options]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")


def losses(workdir: Path) -> dict[int, dict[str, float]]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    times = ("steps_per_second", "waiting_share")
    return {
        record["step"]: {name: value for name, value in record.items() if name not in times}
        for record in records
    }


def test_two_processes_equal_one_and_one_can_resume(tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(TINY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workdir = tmp_path / "two"
    two = [
        command(config, workdir, "--coordinator", address, "--processes", "2", "--process", str(n))
        for n in range(2)
    ]
    alone = command(config, tmp_path / "one")
    while all(process.poll() is None for process in two) and len(losses(workdir)) < 7:
        time.sleep(0.01)
    for process in two:
        process.send_signal(signal.SIGKILL)
    output = "".join(process.communicate()[1] for process in two)
    assert [process.returncode for process in two] == 2 * [-signal.SIGKILL], output
    assert output.count("starts: 12 steps") == 1 and "2 cpu devices" in output  # only one of them prints
    by_two = losses(workdir)
    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())

    goes_on = command(config, workdir)
    output = goes_on.communicate()[1]
    assert goes_on.returncode == 0, output
    assert f"resumes at step {newest}" in output
    output = alone.communicate()[1]
    assert alone.returncode == 0, output
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS and losses(workdir).keys() == expected.keys()
    # Means over pairs are summed in another order; the differences grow from step to step.
    for found in (by_two, losses(workdir)):
        for step, record in found.items():
            assert record == pytest.approx(expected[step], rel=1e-4), step


def test_processes_agree_on_landmarks_and_on_stopping(monkeypatch):
    volume, points = np.zeros((1, 4, 5, 6, 1)), np.ones((1, 100, 3))
    batch = {"fixed": volume, "fixed_landmarks": points, "landmark_valid": np.ones((1, 100))}
    monkeypatch.setattr("jax.process_count", lambda: 2)
    other = np.array([4, 5, 6, 300, 1])
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.process_allgather", lambda mine: np.stack([mine, other])
    )
    padded, stop = loop.agreed(batch, stop=False)
    assert stop
    assert padded["fixed_landmarks"].shape == (1, 300, 3)
    np.testing.assert_array_equal(padded["landmark_valid"].sum(), 100)
    other[:] = [4, 5, 7, 100, 0]
    with pytest.raises(UserError, match=r"one shape, the processes have \[\[4, 5, 6\], \[4, 5, 7\]\]"):
        loop.agreed(batch, stop=False)
