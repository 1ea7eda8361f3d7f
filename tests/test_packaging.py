"""What setuptools puts into the wheel: every module, the weights, the marker of typed packages."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_of_modules_is_a_package():
    found = set(find_packages(ROOT, **SETUPTOOLS["packages"]["find"]))
    folders = {module.parent.relative_to(ROOT) for module in (ROOT / "adregnet_jax").rglob("*.py")}
    assert found == {".".join(folder.parts) for folder in folders}


def test_every_other_file_is_package_data():
    package = ROOT / "adregnet_jax"
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    others = [str(file) for file in files if file.suffix not in (".py", ".pyc")]
    assert others
    for file in others:
        assert any(fnmatch(file, pattern) for pattern in SETUPTOOLS["package-data"]["adregnet_jax"]), file
