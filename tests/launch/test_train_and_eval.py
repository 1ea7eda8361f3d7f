"""`train.py` from the user's point of view: a killed run resumes, and each mistake gives one clear line."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tensorboardX.proto.event_pb2 import Event

from adregnet_jax.benchmark import measure as benchmark
from adregnet_jax.cli.description import describe
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import evaluate
from adregnet_jax.launch.config_file import load_config, override
from adregnet_jax.nn.adregnet import AdRegNet
from adregnet_jax.ops.cpu import onednn
from adregnet_jax.training import loop
from adregnet_jax.training.checkpoint import restore_parameters

ROOT = Path(__file__).parents[2]
TINY = """
from adregnet_jax.config import *

def get_config():
    phantom = PhantomConfig(
        shape=(16, 16, 16), spacing_mm=(20.0, 20.0, 20.0), landmarks=8,
        train_cases=4, validation_cases=1, test_cases=1,
    )
    return Config(
        data=DataConfig(phantom=phantom, flip_axes=(0,), exchange=True, intensity_jitter=0.05),
        model=ModelConfig(  # the parts without which it compiles in seconds
            channels=(4,), cross_attention=False, regional_attention=False, multi_resolution=False,
            dropout=0.2,  # a restart must not change which values are dropped
        ),
        loss=LossConfig(ncc_window=0, jacobian=0),
        optimiser=OptimiserConfig(epochs=5, learning_rate=1e-3, average_decay=0.9),
        run=RunConfig(checkpoint_every_steps=3, log_every_steps=2),
    )
"""
STEPS = 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def start(tiny):
    """Starts train.py on the tiny config; all runs share one compilation cache."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tiny.parent / "cache")}

    def start(workdir: Path, *overrides: str) -> subprocess.Popen:
        command = [sys.executable, "train.py", "--config", str(tiny), "--workdir", str(workdir), *overrides]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, encoding="utf-8")

    return start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = start(workdir)
    output = process.communicate()[1]
    assert process.returncode == 0, output
    assert output.count("compiled the training step in") == 1
    return workdir


def logged(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def age_record(workdir: Path) -> None:
    """Rewrites the record as versions wrote it that had `run.onednn` and no `model.convolution`."""
    record = json.loads((workdir / "config.json").read_text())
    del record["config"]["model"]["convolution"]
    record["config"]["run"]["onednn"] = False
    (workdir / "config.json").write_text(json.dumps(record))


def wait_until_logged(workdir: Path, step: int, process: subprocess.Popen) -> None:
    while process.poll() is None and not any(record["step"] >= step for record in logged(workdir)):
        time.sleep(0.002)


def parameters(tiny: Path, workdir: Path):
    volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
    model = AdRegNet(load_config(tiny).model)
    abstract = jax.eval_shape(model.init, jax.random.key(0), volume, volume)["params"]
    return restore_parameters(workdir, abstract, which="newest")[0]


def without_times(records: list[dict]) -> list[dict]:
    times = ("steps_per_second", "waiting_share")
    return [{name: value for name, value in record.items() if name not in times} for record in records]


def refuse_a_second_run(start, workdir: Path, first: subprocess.Popen) -> None:
    """Starts another run in the workdir of one that trains, which then continues."""
    first.send_signal(signal.SIGSTOP)  # it holds the lock, however long the second takes to start
    second = start(workdir)
    output = second.communicate()[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    refusal = f"error: another run trains in {workdir} (process {first.pid} on"
    assert output.strip().splitlines()[-1].startswith(refusal)


def test_killed_and_started_again_ends_with_the_same_parameters(tiny, start, uninterrupted, tmp_path):
    """Neither a kill nor a second run, which is refused, changes the result; a killed run holds no lock."""
    workdir = tmp_path / "killed"
    moments = random.Random(0)
    for step in (2, 8):  # before and after the first checkpoint
        process = start(workdir)
        if step == 8:
            wait_until_logged(workdir, 4, process)
            refuse_a_second_run(start, workdir, process)
        wait_until_logged(workdir, step, process)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        age_record(workdir)
    process = start(workdir)
    wait_until_logged(workdir, 14, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM" in output

    process = start(workdir)
    output = process.communicate()[1]
    assert process.returncode == 0, output
    assert "resumes at step" in output
    jax.tree.map(np.testing.assert_array_equal, parameters(tiny, workdir), parameters(tiny, uninterrupted))
    assert without_times(logged(workdir)) == without_times(logged(uninterrupted))


def test_run_by_onednn_stopped_goes_on_as_if_it_had_not(tiny, start, with_onednn, tmp_path):
    by_onednn = ("--config.model.convolution=onednn", "--config.optimiser.epochs=2")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(whole, *by_onednn)
    output = process.communicate()[1]
    assert process.returncode == 0, output
    assert "convolves by oneDNN" in output
    process = start(stopped, *by_onednn)
    wait_until_logged(stopped, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    process = start(stopped, *by_onednn)
    output = process.communicate()[1]
    assert process.returncode == 0, output
    jax.tree.map(np.testing.assert_array_equal, parameters(tiny, stopped), parameters(tiny, whole))


def test_evaluation_and_benchmark_refuse_a_convolution_that_can_not_be_used(tiny, uninterrupted, monkeypatch):
    monkeypatch.setattr(onednn, "what_is_wrong", lambda: "no oneDNN here")
    config = override(load_config(tiny), ["--config.model.convolution=onednn"])
    with pytest.raises(UserError, match=r"no oneDNN here: set model\.convolution=auto"):
        evaluate.evaluate(config, uninterrupted)
    with pytest.raises(UserError, match=r"no oneDNN here: set model\.convolution=auto"):
        benchmark.measure(
            config, (16, 16, 16), rounds=0, forward_only=True, total_only=True, memory_only=True
        )


def test_run_leaves_its_record(uninterrupted):
    records = logged(uninterrupted)
    assert [record["step"] for record in records] == list(range(2, STEPS + 1, 2))
    assert {"train/loss", "train/gradient_norm", "learning_rate", "steps_per_second"} <= set(records[0])
    validated = [record["step"] for record in records if "validation/tre_mm" in record]
    assert validated == list(range(4, STEPS + 1, 4))
    best = min(records, key=lambda record: record.get("validation/tre_mm", np.inf))["step"]
    kept = {int(path.name) for path in (uninterrupted / "checkpoints").iterdir()}
    assert kept == {best, 18, STEPS}  # 18 is the one before the last
    written = json.loads((uninterrupted / "config.json").read_text())
    assert written["config"]["model"]["channels"] == [4]
    assert {"adregnet_jax", "jax"} <= set(written["versions"])
    starts = [json.loads(line) for line in (uninterrupted / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0]
    assert "train.py --config" in starts[0]["command"] and starts[0]["devices"][0].startswith("cpu")
    assert json.loads((uninterrupted / "splits.json").read_text())["test"]["subjects"] == ["phantom_2000000"]


def test_tensorboard_has_what_metrics_jsonl_has(uninterrupted):
    """The file is records of a length, its checksum, an event, and the event's checksum."""
    (path,) = (uninterrupted / "tensorboard").iterdir()
    content, found = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
        content = content[16 + length :]
    expected = {
        (record["step"], name): value
        for record in logged(uninterrupted)
        for name, value in record.items()
        if name != "step"
    }
    assert found == pytest.approx(expected)


def test_info_describes_a_run(uninterrupted, tmp_path):
    told = describe(uninterrupted)
    assert (told["kind"], told["data"], told["channels"], told["checkpoints"][-1]) == (
        "run",
        "phantom",
        [4],
        STEPS,
    )
    assert (told["train_pairs"], told["validation_pairs"], told["test_pairs"]) == (4, 1, 1)
    assert "at step 0, commit" in told["start_1"] and "train.py" in told["start_1"]
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"not a workdir of train\.py that can be read"):
        describe(tmp_path)


def test_finished_run_stays_finished(tiny, uninterrupted, capsys):
    before = parameters(tiny, uninterrupted)
    loop.train(load_config(tiny), uninterrupted)
    assert f"complete at step {STEPS}" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, parameters(tiny, uninterrupted), before)


def test_workdirs_that_can_not_be_used(tiny, uninterrupted, tmp_path):
    other = override(load_config(tiny), ["--config.model.channels=(4, 4)"])
    with pytest.raises(UserError, match=r"model\.channels=\[4\], this config has \[4, 4\]"):
        loop.train(other, uninterrupted)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--workdir .*/file/run: can't be written \(Not a directory"):
        loop.train(load_config(tiny), tmp_path / "file" / "run")


@pytest.fixture
def scripted(monkeypatch):
    """The loop around a network of one layer, with the loss of each step and a validation given."""

    def script(losses, validation: float):
        def train_step(state, batch):
            return state.replace(step=state.step + 1), {"loss": jnp.float32(losses[int(state.step)])}

        monkeypatch.setattr(loop, "make_model", lambda config: Network())
        monkeypatch.setattr(loop, "planned_step", lambda config, *_: (config.model, train_step))
        monkeypatch.setattr(loop, "validate", lambda *_, **__: {"validation/loss": validation})

    return script


class Network(nn.Module):
    @nn.compact
    def __call__(self, fixed, moving):
        return nn.Dense(3)(jnp.concatenate([fixed, moving], axis=-1))


def test_metric_that_is_not_finite_is_named_with_its_step(tiny, tmp_path, scripted):
    scripted(losses=[0.5, 0.4, np.nan, 0.3], validation=1.0)
    for every, kept in (("1", ["1", "2"]), ("10", [])):
        config = override(load_config(tiny), [f"--config.run.checkpoint_every_steps={every}"])
        with pytest.raises(UserError, match=r"^train/loss is nan at step 3, so training stops"):
            loop.train(config, tmp_path / every)
        assert sorted(path.name for path in (tmp_path / every / "checkpoints").iterdir()) == kept


def test_training_stops_when_validation_no_longer_improves(tiny, tmp_path, scripted):
    """The first epoch of four steps is the best one; two more are the patience."""
    scripted(losses=np.ones(STEPS), validation=1.0)
    config = override(load_config(tiny), ["--config.run.patience_epochs=2"])
    for _ in range(2):  # a finished run stays finished
        loop.train(config, tmp_path)
        assert logged(tmp_path)[-1]["step"] == 12


def test_setting_of_zero_that_must_be_positive(tiny, tmp_path):
    with pytest.raises(UserError, match=r"run\.log_every_steps is 0: expected 1 or more"):
        loop.train(override(load_config(tiny), ["--config.run.log_every_steps=0"]), tmp_path)


@pytest.mark.usefixtures("unchecked_types")  # the check words an unknown field in its own way
def test_load_config_errors_are_one_line_and_name_what_was_meant(tmp_path):
    start = "from adregnet_jax.config import *\n"
    files = {
        "import nonsense_module\n": "ModuleNotFoundError",
        "def get_config(:\n": "SyntaxError",
        "x = 1\n": "no function get_config",
        "def get_config(): return 3\n": "must return a Config, not a int",
        start
        + "def get_config(): return Config(model=ModelConfig(chanels=(4,)))\n": "did you mean channels?",
        start
        + "def get_config():\n c = Config()\n c.optimiser.epoch = 3\n return c\n": "did you mean epochs?",
        start + "def get_config(): return Config(seed='a')\n": "config.seed must be int, not 'a'",
        start + "def get_config(): return Config(modell=1)\n": "did you mean model?",
    }
    for text, expected in files.items():
        path = tmp_path / "config.py"
        path.write_text(text)
        with pytest.raises(UserError) as error:
            load_config(path)
        assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "missing.py")
