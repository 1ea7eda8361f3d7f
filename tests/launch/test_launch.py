"""The command line: overrides by type, mistakes as one line, and the compilation cache."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from adregnet_jax.config import Config
from adregnet_jax.errors import UserError
from adregnet_jax.launch import main as launch_main
from adregnet_jax.launch import process
from adregnet_jax.launch.config_file import override
from adregnet_jax.launch.main import main

ROOT = Path(__file__).parents[2]


def test_overrides_take_the_type_of_their_field():
    config = override(
        Config(),
        [
            "--config.optimiser.learning_rate=3e-4",
            "--config.model.channels=(4, 8)",
            "--config.data.exchange=true",
            "--config.data.flip_axes=(0,)",
            "--config.data.dirlab.root=/scans",
            "--config.seed=5",
        ],
    )
    assert config.optimiser.learning_rate == 3e-4
    assert config.model.channels == (4, 8)
    assert config.data.exchange is True
    assert config.data.flip_axes == (0,)
    assert (config.data.dirlab.root, config.seed) == ("/scans", 5)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.optimizer.epochs=3", "no field optimizer; did you mean optimiser?"),
        ("--config.model.chanels=(4,)", "no field chanels; did you mean channels?"),
        ("--config.optimiser=3", "is a group: set one of learning_rate"),
        ("--config.seed.x=3", "no field x"),
        ("--config.optimiser.epochs=many", "many"),
        ("--config.model.channels=wide", "--config.model.channels must be tuple[int, ...], not ('wide',)"),
        ("--config.data.phantom.shape=(8, 8)", "must be tuple[int, int, int], not (8, 8)"),
        ("--config.model.remat=perhaps", "perhaps"),
        ("--wokdir=x", "--wokdir is not an option"),
        ("stray", "'stray' is not understood"),
    ],
)
def test_mistakes_on_the_command_line(argument, expected):
    with pytest.raises(UserError) as error:
        override(Config(), [argument])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_user_error_is_one_line_and_status_2(tmp_path, capsys):
    def run(config, workdir):
        raise UserError("expected this, got that: do so")

    path = tmp_path / "config.py"
    path.write_text("from adregnet_jax.config import Config as get_config\n")
    assert main(run, None, ["--config", str(path), "--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: expected this, got that: do so\n"
    assert main(run, None, ["--config", str(path)]) == 2
    assert "--workdir is missing" in capsys.readouterr().err


@pytest.fixture
def command(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from adregnet_jax.config import Config as get_config\n")
    return ["--config", str(path), "--workdir", str(tmp_path)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], None),
        (["--distributed"], {}),
        (
            ["--coordinator", "node1:1234", "--processes", "2", "--process", "1"],
            {"coordinator_address": "node1:1234", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_processes_of_the_command_line(command, options, expected):
    assert launch_main.parse(None, [*command, *options], several_processes=True)[2] == expected


def test_deterministic_reaches_xla(command, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    launch_main.parse(None, command)
    assert "deterministic" not in os.environ["XLA_FLAGS"]
    launch_main.parse(None, [*command, "--deterministic"])
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/nowhere --xla_gpu_deterministic_ops=true"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--processes", "2"], "go together"),
        (
            ["--distributed", "--coordinator", "a:1", "--processes", "2", "--process", "0"],
            "without --distrib",
        ),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "expected HOST:PORT and two numbers"),
        (
            ["--coordinator", "a:1", "--processes", "two", "--process", "0"],
            "expected HOST:PORT and two numbers",
        ),
        (
            ["--coordinator", "a:1", "--processes", "2", "--process", "2"],
            "of 2 processes, it is one from 0 to 1",
        ),
    ],
)
def test_wrong_process_options(command, options, expected):
    with pytest.raises(UserError, match=expected) as error:
        launch_main.parse(None, [*command, *options], several_processes=True)
    assert "\n" not in str(error.value)


def test_processes_without_anything_that_starts_them(monkeypatch):
    """Hides the cluster that the tests may run in."""
    monkeypatch.setattr("jax.distributed.initialize", fail_to_join)
    with pytest.raises(
        UserError, match=r"can't join \(no coordinator\): start by srun or mpirun, or give --coord"
    ):
        process.join_processes()
    with pytest.raises(UserError, match="check --coordinator"):
        process.join_processes(coordinator_address="nowhere:1", num_processes=2, process_id=1)


def fail_to_join(**options):
    raise ValueError("no coordinator")


def test_the_supported_versions_of_jax_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (requirement,) = (Requirement(line) for line in lines if line.startswith("jax>"))
    lowest, below = process.SUPPORTED_JAX
    assert requirement.specifier == SpecifierSet(f">={lowest},<{below}")


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.9.9", False), ("0.10", True), ("0.10.2.dev3", True), ("0.12.99", True), ("0.13.0", False)],
)
def test_the_version_of_jax_is_checked(monkeypatch, version, supported):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    if supported:
        process.check_jax_version()
        return
    with pytest.raises(UserError, match=rf"JAX is {version}; expected 0\.10 or newer.*pip install 'jax>=0"):
        process.check_jax_version()


def test_programs_refuse_a_jax_that_is_not_installed(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    path = tmp_path / "config.py"
    path.write_text("from adregnet_jax.config import Config as get_config\n")
    run = create_autospec(lambda config, workdir: None)
    assert main(run, "", [f"--config={path}", f"--workdir={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("error: JAX isn't installed: pip install")
    run.assert_not_called()


@pytest.mark.parametrize("name", ["adregnet_jax/__init__.py", "train.py", "eval.py"])
def test_an_old_interpreter_gets_as_far_as_its_refusal(name):
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("statement", ["import adregnet_jax.cli.app", "import train", "import eval"])
def test_an_old_interpreter_is_refused(statement):
    program = f"import sys; sys.version_info = (3, 10, 13); {statement}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 2
    expected = "needs Python 3.11 or newer, and this is Python 3.10.13: run it with a newer one"
    assert done.stderr == f"error: adregnet_jax {expected}\n"
