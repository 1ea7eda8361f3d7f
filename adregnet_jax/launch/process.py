"""Settings of a process that have to precede JAX: its version, caches, cores, memory, other processes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

from adregnet_jax.errors import UserError, one_line

SUPPORTED_JAX = ("0.10", "0.13")  # from the first, below the second, as in requirements.txt
LARGE_BLOCK = 2**25  # bytes, the largest threshold that glibc's malloc takes


def check_jax_version() -> None:
    """Refuses a version of JAX outside of the supported range, before anything of it is used.

    Raises:
      UserError: with the version that was found, and the command that installs another.
    """
    lowest, below = SUPPORTED_JAX
    command = f"pip install 'jax>={lowest},<{below}'"
    try:
        found = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"JAX isn't installed: {command}") from None
    if not _release(lowest) <= _release(found) < _release(below):
        raise UserError(f"JAX is {found}; expected {lowest} or newer, and older than {below}: {command}")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 11, 2) of 0.11.2.dev3."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start does not compile again.

    The folder is JAX_COMPILATION_CACHE_DIR, or else adregnet_jax/ in the user's cache folder.
    """
    import jax  # here, so that a misspelt field is reported without waiting for JAX

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "adregnet_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def cache_every_program() -> None:
    """Keeps programs on disk that are compiled quickly, too; after `use_compilation_cache`."""
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def make_deterministic() -> None:
    """Makes XLA leave out kernels of GPUs whose sums come in no fixed order; before JAX is loaded.

    On CPU there are none: the same program gives the same bits.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()


def use_every_core(parts: int) -> None:
    """On CPU, one device a core up to the parts of a batch: a pair on each core beats one pair on all."""
    import jax

    devices = min(parts, os.cpu_count() or 1)
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def join_processes(**options: Any) -> None:
    """Makes this process one of a run of several, before JAX looks for devices.

    Args:
        options: of `jax.distributed.initialize`; none under SLURM or Open MPI, which provide them.

    Raises:
        UserError: the others can't be found.
    """
    import jax

    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        advice = "check --coordinator, and that all processes were started"
        if not options:
            advice = "start by srun or mpirun, or give --coordinator, --processes and --process"
        raise UserError(f"the processes can't join ({one_line(error)}): {advice}") from error


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks: handing them back costs a quarter of a training step.

    XLA on CPU allocates the temporaries of a step anew each time, and each page of them faults. Only the main
    arena can hold blocks of this size, and a thread that has got another one keeps it: call this before JAX
    starts its threads.
    """
    _set_malloc(mmap_max=0, trim_threshold=2**31 - 1, arena_max=1)


def hand_back_freed_memory() -> None:
    """Hands back what `keep_freed_memory` kept, and from now on large blocks as they are freed.

    Kept blocks fragment the memory where programs with arrays of different sizes follow each other.
    """
    _set_malloc(mmap_max=65536, mmap_threshold=LARGE_BLOCK, trim_threshold=LARGE_BLOCK)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set_malloc(**values: int) -> None:
    """Sets parameters of glibc's malloc; nothing happens with another C library."""
    parameters = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4, "arena_max": -8}  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for name, value in values.items():
            libc.mallopt(parameters[name], value)
