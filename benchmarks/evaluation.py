"""Measures the time and memory that the metrics and figures of one case take.

    python benchmarks/evaluation.py [--shape 256 256 106] [--labels 0] [--rounds 3] [--json FILE]

The case is a random smooth pair of the given size with 300 landmarks and N label values. Prints one row per
part: `measure_pair` and `label_scores` of `registration.measure`, the rows of the landmarks, and the two
figures as PNG. The first round compiles and is left out. The peak is that of the whole process, with JAX.
"""

import io
import resource
import time

import comparison
import numpy as np
from scipy import ndimage

from adregnet_jax.launch import process

process.keep_freed_memory()  # as eval.py does, before JAX starts

from adregnet_jax import metrics  # noqa: E402
from adregnet_jax.data.pair import Pair  # noqa: E402
from adregnet_jax.evaluation.figures import case_figures  # noqa: E402
from adregnet_jax.evaluation.inference import RegisteredPair  # noqa: E402
from adregnet_jax.evaluation.uncertainty import landmark_rows  # noqa: E402
from adregnet_jax.registration.measure import label_scores, measure_pair  # noqa: E402


def random_pair(shape, labels):
    rng = np.random.default_rng(0)

    def smooth(*channels):
        coarse = rng.normal(size=(*[-(-n // 16) for n in shape], *channels))
        zoom = [n / m for n, m in zip(shape, coarse.shape, strict=False)] + [1] * len(channels)
        return ndimage.zoom(coarse, zoom, order=1).astype(np.float32)

    fixed, moving = (1 / (1 + np.exp(-smooth())) for _ in range(2))
    points = rng.uniform(0, np.array(shape) - 1, (2, 300, 3))
    maps = [np.floor(image * labels).astype(np.uint8) for image in (fixed, moving)] if labels else [None] * 2
    pair = Pair(
        "random",
        fixed,
        moving,
        np.array([1.0, 1.0, 2.5]),
        fixed_landmarks=points[0],
        moving_landmarks=points[1],
        fixed_labels=maps[0],
        moving_labels=maps[1],
    )
    pyramid = tuple(smooth(3)[:: 2**k, :: 2**k, :: 2**k] for k in (3, 2, 1))
    entropy = tuple(np.abs(field[..., 0]) for field in pyramid)
    return pair, RegisteredPair(smooth(3), moving, pyramid, entropy, 0.0)


def main():
    parser = comparison.argument_parser(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 106), metavar=("X", "Y", "Z"))
    parser.add_argument("--labels", type=int, default=0)
    options = parser.parse_args()
    pair, registered = random_pair(tuple(options.shape), options.labels)

    jacobian = metrics.jacobian(registered.displacement)

    def figures():
        for figure in case_figures(pair, registered, jacobian=jacobian, title="random").values():
            figure.savefig(io.BytesIO(), format="png")

    parts = {
        "metrics": lambda: measure_pair(pair, registered.displacement, registered.warped),
        "landmarks": lambda: landmark_rows(
            pair, registered.displacement, match_entropy=registered.match_entropy
        ),
        "labels": lambda: label_scores(pair, registered.displacement),
        "figures": figures,
    }
    rows = []
    for name, part in parts.items():
        seconds = []
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            part()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row = {"part": name, "first s": round(seconds[0], 3)} | comparison.spread(seconds[1:], "s")
        rows.append(row | {"peak GiB so far": round(peak, 2)})
    comparison.report(rows, options.json)


if __name__ == "__main__":
    main()
