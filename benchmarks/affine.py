"""Measures whether affine registration recovers known transforms of a real scan, and its time.

    python benchmarks/affine.py --images FILE [FILE ...] [--trials 20] [--similarity ncc] [--json FILE]

Each trial makes a moving scan from the fixed one: rotated by up to 30 degrees about a random axis, each axis
scaled by 0.8 to 1.25, shifted by up to 40 mm, in a world with another origin, on a grid with another spacing
and with permuted and flipped axes, with noise. The moving grid is as large as the fixed one and ignores the
shift: parts shifted out of it are lost. With `--similarity nmi` its intensities are also inverted and
gamma-transformed. The border of the fixed scan is extended outwards, so that no edge of the field of view
gives the transform away.

Prints one row per trial: the mean distance over the foreground between the estimated map and the true one, in
mm, before (geometric centres aligned) and after; the seconds of the first call, which compiles for a new
grid; and those of a second call. `--rounds` is not used.
"""

import functools
import time
from pathlib import Path

import comparison
import jax
import numpy as np
import scipy.ndimage
import scipy.spatial.transform

from adregnet_jax import AffineConfig, align_affine
from adregnet_jax.data.io.images import read_image

ROTATION_DEG, SCALE, SHIFT_MM = 30.0, 1.25, 40.0
NOISE = 0.02  # of the range of intensities
PERCENTILES = (0.5, 99.5)
FOREGROUND = 0.2  # of the range of intensities
ORIGIN_MM = 300.0
GRIDS = 4  # taken in turn: each compiles once
SPACINGS_MM = (1.2, 1.5, 2.5)  # of the moving grid


def centre_mm(shape, affine):
    return affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]


def around(linear, before_mm, after_mm):
    """[4, 4]: maps the point `before_mm` to `after_mm`, with the matrix as linear part."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = after_mm - linear @ before_mm
    return matrix


def random_transform(rng, shape, affine):
    """The true map fixed -> moving world, and the geometric centre of the moving grid in that world."""
    axis, direction = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 3)))
    rotation = scipy.spatial.transform.Rotation.from_rotvec(axis * np.radians(rng.uniform(0, ROTATION_DEG)))
    scales = np.diag(SCALE ** rng.uniform(-1, 1, 3))
    origin_mm = rng.uniform(-ORIGIN_MM, ORIGIN_MM, 3)
    here_mm = centre_mm(shape, affine)
    shift_mm = direction * rng.uniform(0, SHIFT_MM)
    return around(rotation.as_matrix() @ scales, here_mm, here_mm + shift_mm + origin_mm), here_mm + origin_mm


def random_grid(rng, shape, affine):
    """Shape and voxel axes [3, 3] of a grid as large as the fixed one, with permuted and flipped axes."""
    size_mm = np.abs(affine[:3, :3]) @ shape
    order = rng.permutation(3)
    spacing_mm = rng.permutation(SPACINGS_MM)
    linear = np.zeros((3, 3))
    linear[order, np.arange(3)] = rng.choice((-1, 1), 3) * spacing_mm
    return tuple(np.round(size_mm[order] / spacing_mm).astype(int).tolist()), linear


def moved(values, affine, true, shape, moving_affine):
    """The fixed scan moved by the true map."""
    to_fixed = np.linalg.inv(true @ affine) @ moving_affine  # moving voxel -> fixed voxel
    return scipy.ndimage.affine_transform(
        values, to_fixed[:3, :3], to_fixed[:3, 3], shape, order=1, mode="nearest"
    )


def errors_mm(found, true, points_mm):
    difference = found - true
    return np.linalg.norm(points_mm @ difference[:3, :3].T + difference[:3, 3], axis=1)


def rows_of(path, trials, config):
    image = read_image(path)
    low, high = np.percentile(image.values, PERCENTILES)
    fixed = np.clip((image.values - low) / (high - low), 0, 1).astype(np.float32)
    voxels = np.argwhere(fixed > FOREGROUND)[::7]
    points_mm = voxels @ image.affine[:3, :3].T + image.affine[:3, 3]
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        true, middle_mm = random_transform(rng, fixed.shape, image.affine)
        shape, linear = random_grid(np.random.default_rng(trial % GRIDS), fixed.shape, image.affine)
        affine = around(linear, (np.array(shape) - 1) / 2, middle_mm)
        moving = moved(fixed, image.affine, true, shape, affine)
        if config.similarity == "nmi":
            moving = 1 - moving ** rng.uniform(0.5, 2)
        moving = np.clip(moving + rng.normal(0, NOISE, shape), 0, 1).astype(np.float32)
        run = functools.partial(align_affine, fixed, moving, image.affine, affine, config=config)
        start = time.perf_counter()
        found = np.asarray(run(), float)
        first_seconds = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - start
        shift = around(np.eye(3), centre_mm(fixed.shape, image.affine), centre_mm(shape, affine))
        yield {
            "image": Path(path).name,
            "trial": trial,
            "before mm": round(float(errors_mm(shift, true, points_mm).mean()), 1),
            "mean mm": round(float(errors_mm(found, true, points_mm).mean()), 3),
            "max mm": round(float(errors_mm(found, true, points_mm).max()), 3),
            "first s": round(first_seconds, 2),
            "again s": round(seconds, 2),
        }


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--similarity", choices=("ncc", "nmi"), default="ncc")
    options = parser.parse_args()
    config = AffineConfig(similarity=options.similarity)
    rows = []
    for path in options.images:
        for row in rows_of(path, options.trials, config):
            print(row, flush=True)
            rows.append(row)
    comparison.report(rows, options.json)
    print(f"{sum(row['mean mm'] < 1 for row in rows)} of {len(rows)} under 1 mm")


if __name__ == "__main__":
    main()
