"""Every entry point refuses bad input: one clear line, the right status, no files left, little memory."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from adregnet_jax.cli.app import app
from adregnet_jax.errors import UserError
from tests.bad_inputs.case import Case
from tests.bad_inputs.cases import CASES

ROOT = Path(__file__).parents[2]
MEMORY = 2 * 2**30  # bytes of address space for commands that run in a separate process
# The stages that `adregnet register` and `batch` print, and lines that MetaIO writes on its own.
PROGRESS = re.compile(r" *\d+\.\d s  |MetaImage: M_ReadElementsData: data not read|   ideal = ")
PROGRAM = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
sys.argv = {argv!r}
{run}
"""


@pytest.fixture(autouse=True)
def no_settings_of_processes(monkeypatch):
    """The cache on disk and malloc's settings affect the whole process, which also runs other tests."""
    monkeypatch.setattr("adregnet_jax.launch.main.use_compilation_cache", lambda: None)
    monkeypatch.setattr("adregnet_jax.launch.main.keep_freed_memory", lambda: None)


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize(
    "entry_point",
    [
        *(f"adregnet {name}" for name in typer.main.get_group(app).commands),
        "train.py",
        "eval.py",
        "adregnet_jax.benchmark",
        "adregnet_jax.evaluation.ablation",
        "adregnet_jax.evaluation.collect",
    ],
)
def test_there_is_a_case_for_every_entry_point(entry_point):
    commands = [case.command for case in CASES if isinstance(case.command, str)]
    assert any(f"{command} ".startswith(f"{entry_point} ") for command in commands)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, tmp_path, monkeypatch, capfd):
    case.make(tmp_path)
    before = entries(tmp_path)
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    if callable(case.command):
        status, out, err = read(case.command, tmp_path)
    elif case.child:
        status, out, err = in_child(shlex.split(case.command))
    else:
        status = in_this_process(shlex.split(case.command), monkeypatch)
        out, err = capfd.readouterr()

    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    assert status == case.status, out + err
    if case.status == 0:
        assert not lines, err
        assert re.search(case.expected, out), out
    else:
        assert len(lines) == 1, err
        assert case.status == 1 or lines[0].startswith("error: "), err
        assert re.search(case.expected, lines[0]), err
    left = entries(tmp_path) - before
    assert {path for path in left if not path.startswith(tuple(f"{name}/" for name in case.leaves))} <= set(
        case.leaves
    )


def entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def read(command: Callable[[Path], object], folder: Path) -> tuple[int, str, str]:
    """The output of a reader, or its refusal as the line that entry points print."""
    try:
        return 0, str(command(folder)), ""
    except UserError as error:
        return 2, "", f"error: {error}"


def in_this_process(argv: list[str], monkeypatch) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", argv)
    try:
        run(argv[0])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run(program: str) -> None:
    if program == "adregnet":
        from adregnet_jax.cli.app import main

        main()
    elif program.endswith(".py"):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        module = importlib.import_module(program)
        if hasattr(module, "__path__"):  # a package: its __main__
            sys.modules.pop(f"{program}.__main__", None)  # other tests import it; runpy warns of that
            runpy.run_module(program, run_name="__main__")
        else:
            sys.exit(module.main())


def in_child(argv: list[str]) -> tuple[int, str, str]:
    """Status, output and errors of `adregnet` in a process that is limited to `MEMORY`."""
    assert argv[0] == "adregnet"
    program = PROGRAM.format(memory=MEMORY, argv=argv, run="from adregnet_jax.cli.app import main; main()")
    environment = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False, env=environment
    )
    return done.returncode, done.stdout, done.stderr
