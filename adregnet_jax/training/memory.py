"""Checks before the first training step whether it fits into memory, and finds settings that make it fit.

XLA plans all memory of a compiled program, so the memory of a step is known once it is compiled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from adregnet_jax.config import ModelConfig
from adregnet_jax.errors import UserError

GIB = 2**30
# Changes that make a step smaller, cheapest first. They don't affect the parameters of the network.
SMALLER: tuple[dict[str, Any], ...] = (
    {"remat": True},
    {"remat": True, "attention_block": 128},
    {"remat": True, "attention_block": 128, "dtype": "bfloat16"},
)


def needed_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Memory per device that a compiled program needs in addition to its arguments; None if unknown."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    results = found.output_size_in_bytes - found.alias_size_in_bytes  # some overwrite arguments
    return found.temp_size_in_bytes + results


def available_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Free memory of the fullest device; None if unknown. CPU devices share the memory of the machine."""
    if devices[0].platform == "cpu":
        free = _available_on_host(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))
        return None if free is None else free // len(devices)
    found = [device.memory_stats() or {} for device in devices]
    of_each = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in found if "bytes_limit" in stats]
    return min(of_each, default=None)


def fitting_step(
    model: ModelConfig,
    compile_step: Callable[[ModelConfig], jax.stages.Compiled],
    available: int | None,
    *,
    choose: bool,
    say: Callable[[str], None],
) -> tuple[ModelConfig, jax.stages.Compiled]:
    """Compiles a training step that fits into memory.

    Args:
      model: the model of the config.
      compile_step: compiles the training step of a model for the batches of the run.
      available: free bytes; None if unknown, in which case `model` is accepted.
      choose: whether settings may be changed (`run.memory=auto`).
      say: prints a line about the memory.

    Returns:
      `model`, or with `choose` the first smaller variant that fits; and its compiled step.

    Raises:
      UserError: the step doesn't fit; the message names settings that would make it fit, if there are any.
    """
    compiled = compile_step(model)
    needed = needed_bytes(compiled)
    if available is None or needed is None or needed <= available:
        if needed is not None:
            free = "" if available is None else f", {_gib(available)} are free"
            say(f"a training step takes {_gib(needed)}{free}")
        return model, compiled
    tried = [f"{_gib(needed)} as configured"]
    for changes in SMALLER:
        if all(getattr(model, name) == value for name, value in changes.items()):
            continue
        smaller = dataclasses.replace(model, **changes)
        compiled = compile_step(smaller)
        needed = needed_bytes(compiled)
        settings = " ".join(f"model.{name}={value}" for name, value in changes.items())
        tried.append(f"{_gib(needed or 0)} with {settings}")
        if needed is not None and needed <= available:
            if choose:
                say(f"a training step takes {'; '.join(tried)}, {_gib(available)} are free: using that")
                return smaller, compiled
            raise UserError(
                f"a training step takes {tried[0]}, {_gib(available)} are free: it would take {tried[-1]};"
                " set these, or run.memory=auto"
            )
    raise UserError(
        f"a training step takes {'; '.join(tried)}, and {_gib(available)} are free: use smaller volumes,"
        " a smaller optimiser.batch_size, more optimiser.accumulate, or devices that share a volume"
        " (run.space_devices)"
    )


def recorded_choices(model: ModelConfig, workdir: Path) -> ModelConfig:
    """The model with the memory settings that the run in `workdir` was started with, if there is one."""
    try:
        theirs = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]["model"]
        return dataclasses.replace(model, **{name: theirs[name] for name in SMALLER[-1]})
    except (OSError, ValueError, KeyError, TypeError):
        return model


def _available_on_host(meminfo: Path, cgroup: Path) -> int | None:
    """The memory that the kernel reports as available, or what remains in the container if that is less."""
    found = []
    try:
        lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, ValueError, KeyError):  # not Linux
        pass
    try:
        limit = int((cgroup / "memory.max").read_text())  # "max" where there is none
        found.append(limit - int((cgroup / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def _gib(number: int) -> str:
    return f"{number / GIB:.1f} GiB"
