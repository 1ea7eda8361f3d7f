"""How a command runs: on which device, told of as it goes on, interrupted at any moment without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from adregnet_jax.errors import UserError

if TYPE_CHECKING:
    from adregnet_jax.weights.trained_network import TrainedNetwork

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


def load_network(weights: Path | None, device: Any) -> TrainedNetwork:
    """A trained network with its parameters on a device of JAX.

    Args:
      weights: the workdir of a training run, whose best parameters are taken, or a folder of packed weights;
        None: the shipped ones.
      device: of JAX.

    Raises:
      UserError: no such run, no checkpoint, damaged weights, or parameters of another architecture than their
        config describes.
    """
    import jax

    from adregnet_jax.weights.packed import is_packed, load_pretrained

    if weights is None or is_packed(weights):
        network = load_pretrained(weights)
    else:
        from adregnet_jax.training.checkpoint import restore_network

        network = restore_network(weights)
    return dataclasses.replace(network, params=jax.device_put(network.params, device))


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
