"""A lock that admits one run at a time to a workdir."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax

from adregnet_jax.atomic import write_errors_as_user_errors
from adregnet_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where runs are not locked
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def only_run(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir` during the block.

    The kernel locks the file `lock` and releases it when the process ends, however it ends. If a run has
    several processes, the first one holds the lock.

    Raises:
        UserError: another run holds the lock, or the folder can't be written.
    """
    if jax.process_index() or fcntl is None:
        yield
        return
    with write_errors_as_user_errors(f"--workdir {workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(
                f"another run trains in {workdir} (process {holder}): wait until it ends, or use another"
                " --workdir"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
