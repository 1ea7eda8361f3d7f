"""JAX's devices: trouble at their start, and lack of memory, as one line each."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from adregnet_jax.errors import UserError, one_line

if TYPE_CHECKING:
    import jax

GPU_ADVICE = "for an NVIDIA GPU, pip install 'adregnet-jax[cuda12]' or 'adregnet-jax[cuda13]'"
PLUGIN_ADVICE = "install the extra for the CUDA of your driver, cuda12 or cuda13 (nvidia-smi prints it)"
GIB = 2**30


def find_device(name: str | None = None) -> jax.Device:
    """The device of JAX with that name, "cpu", "gpu" or "cuda:1", or its default device.

    A plugin that does not start is one line on stderr, where JAX has its traceback.

    Raises:
      UserError: there is no such device, or none of the kind that JAX_PLATFORMS names.
    """
    import jax  # here, so that a misspelt option is reported without waiting for JAX

    with _plugin_errors() as failed:
        try:
            found = jax.devices()
        except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a backend
            reason = "; ".join(failed) or one_line(error) or "no plugin for it is installed"
            advice = PLUGIN_ADVICE if failed else GPU_ADVICE
            raise UserError(
                f"JAX_PLATFORMS is {jax.config.values['jax_platforms']}, and JAX has no such device"
                f" ({reason}): {advice}, or unset JAX_PLATFORMS"
            ) from None
    if name is None:
        if failed:
            print(
                f"warning: JAX can't use the GPU ({'; '.join(failed)}), and computes on the CPU:"
                f" {PLUGIN_ADVICE}",
                file=sys.stderr,
            )
        return found[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError):
        names = ", ".join(f"{one.platform}:{one.id}" for one in found)
        advice = ""
        if platform in ("gpu", "cuda") and all(one.platform == "cpu" for one in found):
            advice = f" ({'; '.join(failed)}): {PLUGIN_ADVICE}" if failed else f": {GPU_ADVICE}"
        raise UserError(f"--device {name}: there is no such device; JAX has {names}{advice}") from None


@contextlib.contextmanager
def _plugin_errors() -> Iterator[list[str]]:
    """Collects the reasons of plugins that don't start while JAX looks for devices, and keeps them silent."""
    found: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if not (record.exc_info and record.exc_info[1]):
            return True
        found.append(one_line(record.exc_info[1]))
        return False

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(keep)
    try:
        yield found
    finally:
        logger.removeFilter(keep)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether NumPy or XLA could not allocate memory."""
    # XLA has RESOURCE_EXHAUSTED on a GPU, and "INTERNAL: ... Out of memory allocating N bytes" on CPU.
    said = re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said is not None)


@contextlib.contextmanager
def memory_errors_as_user_errors(advice: str | Callable[[], str]) -> Iterator[None]:
    """Turns out-of-memory errors of NumPy and XLA into one line that ends with `advice`.

    A function is called for the advice once memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = advice if isinstance(advice, str) else advice()
        raise UserError(f"out of memory{_on_device()}: {said}") from None


def _on_device() -> str:
    """Name and memory of JAX's default device, unless it is a CPU."""
    jax = sys.modules.get("jax")
    device = jax.devices()[0] if jax else None
    if device is None or device.platform == "cpu":
        return ""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return f" on {device.device_kind}" + (f", of which JAX may use {limit / GIB:.1f} GiB" if limit else "")
