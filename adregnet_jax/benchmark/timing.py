"""Times several routes in turn and reports a table; shared by all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from adregnet_jax.atomic import write_file

CALLS_A_TURN = 3

Route = Callable[[], object]
Row = dict[str, object]


def time_in_turn(routes: Mapping[str, Route], rounds: int) -> dict[str, list[float]]:
    """Seconds of `CALLS_A_TURN * rounds` calls of each route.

    The routes take turns, so that other load on the machine affects all of them, and each round starts with
    another one. The first call of a turn is not counted: it finds the caches full of another route's
    data, and perhaps that route's threads still waiting for work.
    """
    names = list(routes)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for route in routes.values():
        jax.block_until_ready(route())  # compiles
    for n in range(rounds):
        first = n % len(names)
        for name in names[first:] + names[:first]:
            jax.block_until_ready(routes[name]())
            seconds[name] += [seconds_of(routes[name]) for _ in range(CALLS_A_TURN)]
    return seconds


def seconds_of(route: Route) -> float:
    """Seconds of one call, until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(route())
    return time.perf_counter() - start


def spread(seconds: Sequence[float], unit: str) -> Row:
    scale = {"s": 1, "ms": 1e3}[unit]
    values = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {f"{name} {unit}": round(scale * value, 3) for name, value in values.items()}


def report(rows: Sequence[Row], json_path: Path | None, about: Mapping[str, object] | None = None) -> None:
    """Prints the rows as a Markdown table, the machine below it, and writes both to `json_path`.

    The file holds {"benchmark", "command", "machine", "rows"}. `about` adds measured facts to the description
    of the machine. None is an empty cell.
    """
    cells = [
        list(rows[0]),
        *(["" if value is None else str(value) for value in row.values()] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print("\n".join(lines))
    found = machine() | dict(about or {})
    print("\n" + ", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    if json_path:
        name, command = command_line()
        record = {"benchmark": name, "command": command, "machine": found, "rows": list(rows)}
        write_file(json_path, json.dumps(record, indent=2) + "\n")


def command_line() -> tuple[str, str]:
    """The running benchmark, a script in `benchmarks/` or a module, and the command that started it."""
    if spec := getattr(sys.modules["__main__"], "__spec__", None):
        module = spec.name.removesuffix(".__main__")  # of a package
        name, program = module.rpartition(".")[2], ["-m", module]
    else:
        script = Path(sys.argv[0])
        name, program = script.stem, [f"benchmarks/{script.name}"]
    return name, shlex.join(["python", *program, *sys.argv[1:]])


def machine() -> Row:
    cpuinfo = Path("/proc/cpuinfo")
    model = (
        re.search(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.is_file() else None
    )
    torch = sys.modules.get("torch")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch and str(torch.__version__),
    }
