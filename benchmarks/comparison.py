"""Code shared by the scripts: options, routes through JAX, and comparisons of results and times.

Each script prints a table and, with `--json FILE`, writes {"benchmark", "command", "machine", "rows"}, where
the rows are those of the table (`adregnet_jax.benchmark.timing`).
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from adregnet_jax.benchmark.timing import Route, Row, report, seconds_of, spread, time_in_turn

__all__ = [
    "argument_parser",
    "check_equal",
    "compare",
    "jax_routes",
    "report",
    "seconds_of",
    "spread",
    "time_in_turn",
    "torch_on_cpu",
]


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each route (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    return parser


def jax_routes(function, arguments, cotangent, constants=()) -> tuple[Route, Route]:
    """`function(*constants, *arguments)` jitted: alone, and with the gradients of its arguments."""

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
    """PyTorch with as many threads as cores, or None and a line that explains why."""
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


def compare(
    case: Row,
    routes: Mapping[str, tuple[Route, ...]],
    rounds: int,
    passes: Sequence[str] = ("forward", "forward + gradients"),
) -> list[Row]:
    """Rows for each pass and route; a route has one function per pass.

    "times ours" is the median time of a route divided by that of the first route.
    """
    rows = []
    for n, name in enumerate(passes):
        seconds = time_in_turn({route: functions[n] for route, functions in routes.items()}, rounds)
        ours = statistics.median(next(iter(seconds.values())))
        for route, values in seconds.items():
            ratio = round(statistics.median(values) / ours, 2)
            rows.append(case | {"pass": name, "route": route} | spread(values, "ms") | {"times ours": ratio})
    return rows
