"""Measures memory and time of the bundled network for a given size, including the adaptation of the scans.

    python benchmarks/network.py [--shape 160 192 224] [--spacing 1.0 1.0 1.0] [--rounds 3] [--json FILE]

The pair is a random smooth scan of the given size and the same one moved by two voxels, processed as by
`adregnet register --method network --no-affine`: reoriented, resampled, passed twice through the network, and
the field mapped back. Prints the seconds to load the weights, those of the first call, which compiles or
takes programs from the cache on disk, the median of later calls, and the peak of the whole process.
"""

import resource
import statistics
import time

import comparison
import numpy as np
from instance import smooth_scan  # sets the process up as the command line does

from adregnet_jax.launch import process

process.use_compilation_cache()

from adregnet_jax.data.io.images import Image  # noqa: E402
from adregnet_jax.registration.adapter import predict_displacement  # noqa: E402
from adregnet_jax.weights.packed import load_pretrained  # noqa: E402


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(160, 192, 224), metavar=("X", "Y", "Z"))
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), metavar=("X", "Y", "Z"))
    options = parser.parse_args()
    fixed = np.asarray(smooth_scan(options.shape))[0, ..., 0]
    moving = np.roll(fixed, 2, axis=0)
    image = Image(fixed, np.diag([*options.spacing, 1.0]), "random scan")
    began = time.perf_counter()
    network = load_pretrained()
    loading = time.perf_counter() - began
    seconds = []
    for _ in range(1 + options.rounds):
        began = time.perf_counter()
        predict_displacement(network, image, moving)
        seconds.append(time.perf_counter() - began)
    row = {
        "shape": " x ".join(map(str, options.shape)),
        "loading s": round(loading, 2),
        "first call s": round(seconds[0], 1),
        "s, median": round(statistics.median(seconds[1:]), 1),
        "peak of the process GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    comparison.report([row], options.json)


if __name__ == "__main__":
    main()
