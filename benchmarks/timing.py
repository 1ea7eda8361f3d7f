"""What the benchmarks share: routes timed in turn, results checked against each other, one table.

Each script prints a table and, with `--json FILE`, writes {"benchmark", "command", "machine", "rows"}, where
the rows are those of the table.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

CALLS_A_TURN = 3

Route = Callable[[], object]
Row = dict[str, object]


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each route (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    return parser


def jax_routes(function, arguments, cotangent, constants=()) -> tuple[Route, Route]:
    """`function(*constants, *arguments)` jitted: alone, and with its gradients in the arguments."""

    @jax.jit
    def forward(constants, arguments):
        return function(*constants, *arguments)

    @jax.jit
    def with_gradients(constants, arguments, cotangent):
        result, pull_back = jax.vjp(functools.partial(function, *constants), *arguments)
        return result, *pull_back(cotangent)

    constants, arguments, cotangent = jax.device_put((constants, arguments, cotangent))
    return lambda: forward(constants, arguments), lambda: with_gradients(constants, arguments, cotangent)


def torch_on_cpu():
    """PyTorch with as many threads as cores, or None, and a line that says so."""
    if jax.default_backend() != "cpu":
        print(f"PyTorch is timed on CPU only, and JAX runs on {jax.default_backend()}: left out.\n")
        return None
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: left out (.venv/bin/pip install torch).\n")
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def check_equal(expected: object, *others: object, tolerance: float = 1e-3) -> None:
    """Refuses to compare routes whose results differ by more than `tolerance` of the largest value."""
    expected_arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(expected)]
    for other in others:
        for wanted, leaf in zip(expected_arrays, jax.tree.leaves(other), strict=True):
            atol = tolerance * np.abs(wanted).max()
            np.testing.assert_allclose(np.asarray(leaf), wanted, rtol=0, atol=atol)


def time_in_turn(routes: Mapping[str, Route], rounds: int) -> dict[str, list[float]]:
    """Seconds of `CALLS_A_TURN * rounds` calls of each route.

    The routes take turns, so that whatever else the machine does falls on all of them, and each round starts
    with another one. The first call of a turn is not counted: it finds the caches full of another route's
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
            for _ in range(CALLS_A_TURN):
                start = time.perf_counter()
                jax.block_until_ready(routes[name]())
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(case: Row, routes: Mapping[str, tuple[Route, Route]], rounds: int) -> list[Row]:
    """Rows of the forward pass and of it with gradients, by route.

    "times ours" is how many times as long as the first route this one takes, by medians.
    """
    rows = []
    for n, name in enumerate(("forward", "forward + gradients")):
        seconds = time_in_turn({route: passes[n] for route, passes in routes.items()}, rounds)
        ours = statistics.median(next(iter(seconds.values())))
        for route, values in seconds.items():
            ratio = round(statistics.median(values) / ours, 2)
            rows.append(case | {"pass": name, "route": route} | spread(values, "ms") | {"times ours": ratio})
    return rows


def spread(seconds: Sequence[float], unit: str) -> Row:
    scale = {"s": 1, "ms": 1e3}[unit]
    values = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return {f"{name} {unit}": round(scale * value, 3) for name, value in values.items()}


def report(rows: Sequence[Row], json_path: Path | None) -> None:
    """Prints the rows as a Markdown table with the machine below it, and writes them to `json_path`."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    print("\n".join(lines))
    about = machine()
    print("\n" + ", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    if json_path:
        script = Path(sys.argv[0])
        command = " ".join(["python", f"benchmarks/{script.name}", *sys.argv[1:]])
        record = {"benchmark": script.stem, "command": command, "machine": about, "rows": list(rows)}
        json_path.write_text(json.dumps(record, indent=2) + "\n")


def machine() -> Row:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    torch = sys.modules.get("torch")
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch and str(torch.__version__),
    }
