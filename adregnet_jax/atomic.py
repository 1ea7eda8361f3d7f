"""Names for what is not finished yet, beside what it will be; and what a kill left of them, taken away."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
from pathlib import Path

REPLACED = ".replaced"


def unfinished(path: Path) -> Path:
    """A hidden name of this process beside `path`. It ends like it: libraries tell formats by the suffix."""
    return path.with_name(f".{_host()}.{os.getpid()}.{path.name}")


def tidy(path: Path) -> None:
    """Takes away what processes that were killed while they wrote `path` left beside it.

    What they were about to replace goes back to its name, if nothing has it. Processes of other hosts, which
    nobody here can ask for, and ones that still run keep what is theirs.
    """
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f".{glob.escape(_host())}.*.{glob.escape(path.name)}*"):
            found = re.fullmatch(r"\.(\d+)\.(.*)", left.name.removeprefix(f".{_host()}"), re.DOTALL)
            if not found or found[2].removesuffix(REPLACED) != path.name or _runs(int(found[1])):
                continue
            if found[2].endswith(REPLACED) and found[2] != path.name and not path.exists():
                left.rename(path)
            elif left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's, or there is no such number
        return True
    return True
