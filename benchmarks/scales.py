"""Registers the same arrays with voxels from 30 nanometres to 100 metres, by the default options.

    python benchmarks/scales.py FIXED MOVING [--sizes 2 0.1 ...] [--options NAME=VALUE ...]

The headers of both scans are magnified so that a fixed voxel measures each size in mm (the geometric mean of
its axes). Prints one row per size: how far the displacement is from that of the first size, in voxels, on
average and at most; how far it moves on average; and the seconds of a registration, the least of `--rounds`
after one that compiles.
"""

import dataclasses
import time
from pathlib import Path

import comparison
import numpy as np

from adregnet_jax.launch import process

process.keep_freed_memory()
process.use_compilation_cache()

from adregnet_jax import load_pretrained  # noqa: E402
from adregnet_jax.data.io.images import read_image  # noqa: E402
from adregnet_jax.registration.options import RegistrationOptions  # noqa: E402
from adregnet_jax.registration.scans import register_scans  # noqa: E402

SIZES_MM = (2.0, 0.1, 0.025, 0.002, 3e-5, 1e5)


def registered_at(size_mm, scans, options, network, rounds):
    """The registration of scans whose fixed voxels measure `size_mm`, and its least seconds."""
    factor = size_mm / float(np.exp(np.mean(np.log(scans[0].spacing_mm))))
    magnified = np.diag([factor, factor, factor, 1.0])
    pair = [dataclasses.replace(scan, affine=magnified @ scan.affine) for scan in scans]
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        found = register_scans(
            *pair,
            affine=options.affine_config,
            instance=options.instance_config,
            network=network,
            modality=options.modality,
            adaptive=options.adaptive,
        )
        seconds.append(time.perf_counter() - began)
    return found, min(seconds[1:])


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("fixed", type=Path, metavar="FIXED")
    parser.add_argument("moving", type=Path, metavar="MOVING")
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES_MM))
    parser.add_argument("--options", nargs="+", metavar="NAME=VALUE", default=[])
    arguments = parser.parse_args()
    options = dataclasses.replace(
        RegistrationOptions(), **dict(option.split("=", 1) for option in arguments.options)
    )
    network = load_pretrained() if options.by_network else None
    scans = [read_image(path) for path in (arguments.fixed, arguments.moving)]
    rows, first = [], None
    for size_mm in arguments.sizes:
        found, seconds = registered_at(size_mm, scans, options, network, arguments.rounds)
        displacement = np.asarray(found.field.displacement)
        first = displacement if first is None else first
        apart = np.linalg.norm(displacement - first, axis=-1)
        rows.append(
            {
                "size mm": size_mm,
                "mean voxels": float(f"{apart.mean():.2g}"),
                "largest voxels": float(f"{apart.max():.2g}"),
                "moved voxels": round(float(np.linalg.norm(displacement, axis=-1).mean()), 3),
                "seconds": round(seconds, 2),
            }
        )
        print(rows[-1], flush=True)
    comparison.report(rows, arguments.json)


if __name__ == "__main__":
    main()
