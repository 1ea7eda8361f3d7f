"""Measures memory and time of instance optimisation for a given size.

    python benchmarks/instance.py [--shape 256 256 106] [--spacing 1.0 1.0 2.5] [--effort default]
        [--target a100|h100] [--json FILE]

The pair is a random smooth scan of the given size and the same one moved by two voxels, registered as by
`adregnet register --method instance --no-affine`. Prints the seconds of compilation and of one call,
the memory of its temporaries as reported by XLA, and the peak of the whole process.

--target compiles for an NVIDIA card that need not be there, with the extra `cuda12` or `cuda13`, and runs
nothing; the help of `python -m adregnet_jax.benchmark` explains the columns.
"""

import resource
import time

import comparison
import numpy as np
from scipy import ndimage

from adregnet_jax.launch import process

process.keep_freed_memory()  # as the command line does, before JAX starts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from adregnet_jax.benchmark.target import compiling_for, cpu_seconds, plan  # noqa: E402
from adregnet_jax.config import instance_preset  # noqa: E402
from adregnet_jax.registration.instance import align  # noqa: E402
from adregnet_jax.training.sharding import replicated  # noqa: E402


def smooth_scan(shape):
    coarse = np.random.default_rng(0).normal(size=[-(-n // 8) for n in shape])
    zoomed = ndimage.zoom(coarse, np.divide(shape, coarse.shape), order=1, grid_mode=True, mode="nearest")
    return jnp.asarray(1 / (1 + np.exp(-zoomed)), jnp.float32)[None, ..., None]


def compiled_for(card, run, shape):
    """Counts the parts of the program for a card that isn't there."""
    scan = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    with compiling_for(card) as mesh:
        used = cpu_seconds()
        lowered = jax.jit(run, in_shardings=replicated(mesh), out_shardings=replicated(mesh)).lower(
            scan, scan
        )
        traced = cpu_seconds() - used
        row, compiled = plan(lowered)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return {"trace CPU s": round(traced, 2)} | row | {"temporaries GiB": round(temporaries / 2**30, 2)}


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 106), metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 1.0, 2.5), metavar=("X", "Y", "Z"))
    parser.add_argument("--effort", default="default")
    parser.add_argument("--target", help="compile for this card, a100 or h100")
    options = parser.parse_args()
    config = instance_preset(options.effort)

    def run(fixed, moving):
        return align(fixed, moving, spacing_mm=tuple(options.spacing), config=config).displacement

    if options.target:
        shape = "x".join(map(str, options.shape))
        comparison.report([{"shape": shape} | compiled_for(options.target, run, options.shape)], options.json)
        return
    fixed = smooth_scan(options.shape)
    scans = [fixed, jnp.roll(fixed, 2, axis=1)]
    run = jax.jit(run)
    began = time.perf_counter()
    program = run.lower(*scans).compile()
    compilation = time.perf_counter() - began
    began = time.perf_counter()
    jax.block_until_ready(program(*scans))
    seconds = time.perf_counter() - began
    gib = 2**30
    row = {
        "shape": " x ".join(map(str, options.shape)),
        "effort": options.effort,
        "s": round(seconds, 1),
        "compilation s": round(compilation, 1),
        "temporaries GiB": round(program.memory_analysis().temp_size_in_bytes / gib, 2),
        "peak of the process GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / gib, 2),
    }
    comparison.report([row], options.json)


if __name__ == "__main__":
    main()
