"""The version of the package, and the origin of a result: command, code, versions, devices."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "nibabel")


def origin() -> dict[str, Any]:
    """Date, command, commit, versions and devices of this process, as a record for JSON."""
    import jax  # late: reading such a record doesn't need it

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "devices": [f"{device.platform} {device.device_kind}" for device in jax.devices()],
        "host": platform.node(),
        "processes": jax.process_count(),
    }


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of the packages that affect the numbers."""
    return {
        "adregnet_jax": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def commit() -> str | None:
    """The commit of this package's working tree, followed by "+" if files were changed; None outside git."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent.resolve():
            return None  # installed inside another project
        return git("rev-parse", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
