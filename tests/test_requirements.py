"""The lock files satisfy requirements.txt and the extras, and have a checksum for every file."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("requirements-3.11.lock", "requirements-3.13.lock")  # the oldest Python and the newest


def lock_lines(lock):
    text = (ROOT / lock).read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked(lock):
    """Versions by name; a package may have one for each of several platforms."""
    found: dict[str, list[str]] = {}
    for line in lock_lines(lock):
        if not line.startswith(" "):
            requirement = Requirement(line.rstrip("\\ "))
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def required():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [*filter(None, lines), *extras["dev"], *extras["itk"]]


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("requirement", required())
def test_the_lock_satisfies_the_requirement(requirement, lock):
    requirement = Requirement(requirement)
    for version in locked(lock)[canonicalize_name(requirement.name)]:
        assert version in requirement.specifier


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_checksums(lock):
    text = "\n".join(lock_lines(lock)).replace("\\\n", "")
    packages = text.splitlines()
    assert len(packages) >= len(locked(lock))
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package
