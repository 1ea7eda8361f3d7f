"""How a command runs: on which device, told of as it goes on, interrupted at any moment without a trace."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from adregnet_jax.atomic import REPLACED, tidy, unfinished
from adregnet_jax.errors import UserError

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

T = TypeVar("T")


@contextlib.contextmanager
def termination_as_exit() -> Iterator[None]:
    """SIGTERM ends the block by `SystemExit`, as Ctrl-C by `KeyboardInterrupt`: what is open is closed."""

    def stop(_number, _frame):
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def interruptible(work: Callable[[], T], device: Any = None) -> T:
    """What `work()` returns or raises; it runs in a thread of its own.

    XLA computes for minutes without listening to signals. This thread does, and leaves the other one behind.

    Args:
      work: takes nothing.
      device: where JAX computes; None for its default.
    """
    future: Future[T] = Future()

    def run():
        import jax

        try:
            with jax.default_device(device):
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def start_jax(device: str | None) -> Any:
    """The JAX device of that name ("cpu", "gpu", "cuda:1"), or the default one, made ready.

    Raises:
      UserError: there is no such device.
    """
    from adregnet_jax.launch.process import keep_freed_memory, use_compilation_cache

    keep_freed_memory()
    import jax

    use_compilation_cache()
    if device is None:
        return jax.devices()[0]
    platform, _, index = device.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        there = ", ".join(f"{found.platform}:{found.id}" for found in jax.devices())
        raise UserError(f"--device {device}: there is no such device; JAX has {there}") from None


@contextlib.contextmanager
def memory_errors_as_user_errors(advice: str) -> Iterator[None]:
    """Turns running out of memory, of NumPy or of XLA, into one line that ends with `advice`."""
    try:
        yield
    except MemoryError:
        raise UserError(f"out of memory: {advice}") from None
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"out of memory: {advice}") from None


@contextlib.contextmanager
def new_folder(path: Path, *, own: Collection[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block is done; nothing is left if it fails.

    Args:
      path: the final name.
      own: names of files that may be replaced: a folder with others in it is refused even then.
      overwrite: replace a folder that isn't empty.

    Raises:
      UserError: the folder isn't empty and is not to be overwritten, or it can't be written.
    """
    try:
        path = path.resolve()  # what a link leads to is replaced, not the link
        tidy(path)
        _check_folder(path, own, overwrite)
    except (OSError, RuntimeError) as error:  # a name that is too long; links that lead in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--output {path}: can't be used ({reason}): choose another name") from None
    temporary = unfinished(path)
    replaced = temporary.with_name(temporary.name + REPLACED)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except OSError as error:
        elsewhere = error.filename and not str(error.filename).startswith(str(temporary))
        raise UserError(
            f"{error.filename if elsewhere else path}: can't be read or written "
            f"({error.strerror or error}): check the name, the folder and the disk"
        ) from None
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _check_folder(path: Path, own: Collection[str], overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"--output {path} is a file; expected a folder, or a name that isn't there yet")
    if path.is_mount():
        raise UserError(f"--output {path} is a mount point, which can't be replaced: take a folder inside")
    others = sorted({entry.name for entry in path.iterdir()} - set(own))
    if others and overwrite:
        raise UserError(
            f"--output {path} holds {others[0]}, which isn't ours to overwrite: choose another folder"
        )
    if not overwrite and any(path.iterdir()):
        raise UserError(f"--output {path} exists and is not empty: choose another folder, or add --overwrite")


@contextlib.contextmanager
def told_stages(total: int) -> Iterator[Callable[[str], None]]:
    """A function to be called with the name of each of `total` stages, told on stderr: a progress bar."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    began = time.monotonic()
    if not console.is_terminal:

        def tell(stage: str) -> None:
            print(f"{time.monotonic() - began:6.1f} s  {stage}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    told = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), told)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)  # the first stage ends when the second begins
        yield lambda stage: progress.update(task, description=stage, advance=1)
