"""Measures how many synthetic pairs a second NumPy and JAX make.

    python benchmarks/synthesis.py [--shape 64 64 64] [--pairs 16] [--rounds 5] [--picture FILE] [--json FILE]

Prints a row for NumPy on one core (`adregnet_jax.data.datasets.synthetic`) and for JAX on one and two cores
(`adregnet_jax.synthesise` on the CPU, one pair after another by `lax.map`; with two cores, each makes half of
the pairs), each in a fresh process bound to its cores. A round makes the same pairs again.
--picture draws pairs of both next to each other. Linux only.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import comparison
import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from adregnet_jax import SyntheticConfig, synthesise
from adregnet_jax.data.datasets.synthetic import draw_pairs, synthetic_pair
from adregnet_jax.data.pair import Pair

ROUTES = {"NumPy, one core": 1, "JAX, one core": 1, "JAX, two cores": 2}
DRAWN = 6  # pairs of each


def jax_pairs(config, devices=1):
    """A jitted function from keys [n] to n pairs."""
    draw = functools.partial(synthesise, config=config)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    along = PartitionSpec("data")
    return jax.jit(
        jax.shard_map(
            lambda keys: jax.lax.map(draw, keys), mesh=mesh, in_specs=along, out_specs=along, check_vma=False
        )
    )


def measure(route, config, count, rounds):
    """Seconds of compilation (None for NumPy), then of `count` pairs in each round, in this process."""
    numpy = route.startswith("NumPy")
    cores = ROUTES[route]
    jax.config.update("jax_num_cpu_devices", cores)
    if numpy:
        make = functools.partial(numpy_pairs, config, count)
    else:
        make = functools.partial(jax_pairs(config, cores), jax.random.split(jax.random.key(0), count))
    first, *seconds = (comparison.seconds_of(make) for _ in range(1 + rounds))
    return [None if numpy else first - statistics.median(seconds), *seconds]


def numpy_pairs(config, count):
    return [synthetic_pair(config, case) for case in range(count)]


def in_fresh_process(route):
    """What `measure` returns in a process that may use as many cores as the route."""
    command = [sys.executable, *sys.argv, "--this-process", route]
    cores = sorted(os.sched_getaffinity(0))[: ROUTES[route]]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    return json.loads(done.stdout)


def draw(config, path):
    pairs = numpy_pairs(config, DRAWN)
    made = jax.device_get(jax_pairs(config)(jax.random.split(jax.random.key(0), DRAWN)))
    spacing_mm = np.array(config.spacing_mm)
    for n in range(DRAWN):
        arrays = {name: array[n] for name, array in made._asdict().items()}
        pairs.append(Pair(name=f"JAX {n}", spacing_mm=spacing_mm, **arrays))
    draw_pairs(pairs, path)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(64, 64, 64), metavar=("X", "Y", "Z"))
    parser.add_argument(
        "--pairs", type=int, default=16, metavar="N", help="even number of pairs in a round (default 16)"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help=f"PNG of {DRAWN} pairs of each")
    parser.add_argument("--this-process", choices=ROUTES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = SyntheticConfig(shape=tuple(options.shape))
    if options.this_process:
        print(json.dumps(measure(options.this_process, config, options.pairs, options.rounds)))
        return
    rows = []
    for route in (name for name, cores in ROUTES.items() if cores <= len(os.sched_getaffinity(0))):
        compilation, *seconds = in_fresh_process(route)
        rows.append(
            {
                "route": route,
                "shape": " x ".join(map(str, options.shape)),
                "pairs a second": round(options.pairs / statistics.median(seconds), 1),
                "ms a pair, median": round(1e3 * statistics.median(seconds) / options.pairs, 1),
                "min ms": round(1e3 * min(seconds) / options.pairs, 1),
                "max ms": round(1e3 * max(seconds) / options.pairs, 1),
                "compilation s": compilation and round(compilation, 1),
            }
        )
    comparison.report(rows, options.json)
    if options.picture:
        draw(config, options.picture)


if __name__ == "__main__":
    main()
