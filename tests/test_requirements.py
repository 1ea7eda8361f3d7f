"""The lock file holds what the requirement lists ask for, every file with its checksum."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def lines(name):
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]


def locked():
    """Versions by name; a package may have one for each of several platforms."""
    found = {}
    for line in lines("requirements.lock"):
        if not line.startswith(" "):
            requirement = Requirement(line.rstrip("\\ "))
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-itk.txt"])
def test_the_lock_satisfies_the_list(name):
    versions = locked()
    for requirement in map(Requirement, lines(name)):
        for version in versions[canonicalize_name(requirement.name)]:
            assert version in requirement.specifier, requirement


def test_every_locked_package_has_checksums():
    text = "\n".join(lines("requirements.lock")).replace("\\\n", "")
    packages = text.splitlines()
    assert len(packages) >= len(locked())
    for package in packages:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", package), package
