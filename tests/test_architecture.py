"""Imports run downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adregnet_jax"
SETTINGS = {"config", "errors", "atomic", "provenance"}  # every part may import them
# What the modules of each part may import of the package, apart from their own part and SETTINGS.
BELOW: dict[str, set[str]] = {
    **{part: set() for part in SETTINGS | {"launch", "ops", "data"}},
    "losses": {"ops"},
    "metrics": {"ops", "losses"},
    "nn": {"ops"},
    "weights": {"nn"},
    "synthesis": {"ops", "data"},
    "report": {"ops", "losses", "metrics", "data"},
}
BELOW["registration"] = {"ops", "losses", "nn", "weights", "data", "report", "metrics", "launch"}
BELOW["training"] = BELOW["registration"] | {"registration", "synthesis"}
BELOW["evaluation"] = BELOW["training"] | {"training"}
BELOW["cli"] = BELOW["benchmark"] = BELOW["__init__"] = BELOW["evaluation"] | {"evaluation"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(file):
    """Full names of what a file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides what it depends on"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(file):
    relative = file.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file):
    own = part(file)
    allowed = BELOW[own] | SETTINGS | {own}
    used = {name.split(".")[1] for name in imported_modules(file) if name.startswith("adregnet_jax.")}
    assert used <= allowed


@pytest.mark.parametrize("own", ["config", "errors", "data"])
def test_settings_and_data_do_not_need_jax(own):
    files = [file for file in FILES if part(file) == own]
    assert files
    for file in files:
        used = {name.split(".")[0] for name in imported_modules(file)}
        assert not used & {"jax", "flax", "optax", "orbax"}, file


@pytest.mark.parametrize("name", ["train.py", "eval.py"])
def test_entry_points_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import adregnet_jax; [getattr(adregnet_jax, n) for n in adregnet_jax.__all__]",
            {"orbax", "grain", "matplotlib", "tensorboardX"},
        ),
        ("import adregnet_jax.config, adregnet_jax.data.datasets.dirlab", {"jax", "flax"}),
    ],
)
def test_what_an_import_leaves_out(statement, absent):
    program = f"import sys; {statement}; print(sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False, cwd=ROOT
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["adregnet_jax", "benchmarks", "tests", "tools"])
def test_the_output_of_programs_is_decoded_in_any_locale(folder):
    # `text=True` decodes by the locale, which a library can set to one that knows ASCII alone.
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "text":
                assert getattr(node.value, "value", None) is not True, file
