"""Running a command: device and network, progress, interruption."""

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

if TYPE_CHECKING:
    from adregnet_jax.weights.trained_network import TrainedNetwork

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

T = TypeVar("T")


@contextlib.contextmanager
def termination_as_exit() -> Iterator[None]:
    """Turns SIGTERM into `SystemExit`, as Ctrl-C raises `KeyboardInterrupt`, so that the block cleans up."""

    def stop(_number: int, _frame: object) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():  # only the main one receives signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def interruptible(work: Callable[[], T], device: Any = None) -> T:
    """Runs `work()` in its own thread, and returns its result or raises its exception.

    XLA computes for minutes without handling signals. The calling thread handles them and abandons the other.

    Args:
      work: takes no arguments.
      device: the JAX device to compute on; None for its default.
    """
    future: Future[T] = Future()

    def run() -> None:
        import jax

        try:
            with jax.default_device(device):
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


def start_jax(device: str | None) -> Any:
    """Prepares JAX and returns its device of that name ("cpu", "gpu", "cuda:1"), or its default device.

    Raises:
      UserError: there is no such device, or the version of JAX isn't supported.
    """
    from adregnet_jax.launch.devices import find_device
    from adregnet_jax.launch.process import check_jax_version, keep_freed_memory, use_compilation_cache

    check_jax_version()
    keep_freed_memory()
    use_compilation_cache()
    return find_device(device)


def load_network(weights: Path | None, device: Any) -> TrainedNetwork:
    """A trained network with its parameters on a device of JAX.

    Args:
      weights: the workdir of a training run, whose best parameters are taken, or a folder of packed weights;
        None for the bundled weights.
      device: a JAX device.

    Raises:
      UserError: there is no such run or no checkpoint, the weights are damaged, or the architecture of the
        parameters differs from their config.
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
def show_stages(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that announces each of `total` stages on stderr, with a bar on a terminal.

    When a stage ends, the line of the next one says how long it took.
    """
    from rich.console import Console

    console = Console(file=sys.stderr)
    began = time.monotonic()
    running: list[tuple[str, float]] = []  # the stage that began last, and when

    def took() -> str:
        if not running:
            return ""
        stage, since = running.pop()
        return f"{stage} took {time.monotonic() - since:.1f} s"

    if not console.is_terminal:

        def show(stage: str) -> None:
            ended = f" ({last})" if (last := took()) else ""
            print(f"{time.monotonic() - began:6.1f} s  {stage}{ended}", file=sys.stderr, flush=True)
            running.append((stage, time.monotonic()))

        yield show
        show("done")
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    name = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), name)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=-1)  # the first stage ends when the second begins

        def advance(stage: str) -> None:
            if ended := took():
                progress.print(ended, markup=False, highlight=False)
            running.append((stage, time.monotonic()))
            progress.update(task, description=stage, advance=1)

        yield advance
        if ended := took():
            progress.print(ended, markup=False, highlight=False)
