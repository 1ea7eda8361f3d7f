"""Measures whether affine registration recovers known transforms of a real scan, and its time.

    python benchmarks/affine.py --images FILE [FILE ...] [--moving FILE ...] [--scenes whole small ...]
        [--trials 20] [--similarity ncc] [--json FILE]

Each trial makes a moving scan from the fixed one: rotated by up to 30 degrees about a random axis, each axis
scaled by 0.8 to 1.25, shifted by up to 40 mm or a fifth of the scan, in a world with another origin, on a
grid with another spacing and with permuted and flipped axes, with noise. The moving grid is as large as the
fixed one and ignores the shift: parts shifted out of it are lost. With `--similarity nmi` its intensities are
also inverted and gamma-transformed; or `--moving` names, for each image, a scan of another contrast that its
header places over it. The border of the scans is extended outwards, so that no edge of the field of view
gives the transform away. Scenes (`--scenes`):

- whole: the whole scan, voxels of 1.2, 1.5 and 2.5 mm in the moving one;
- small: the middle half of the scan along each axis;
- thick: slices of 6 mm in the moving scan;
- tiny: all lengths divided by 20, as in a mouse.

Prints one row per trial: the mean distance over the foreground between the estimated map and the true one, in
mm, before (geometric centres aligned) and after, and after also in voxels (the edge of a cube as large as a
voxel of the coarser scan); the seconds of the first call, which compiles for a new
grid; and those of a second call. `--rounds` is not used.
"""

import functools
import itertools
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
SHIFT_SHARE = 0.2  # of the shortest edge of the scan, where that is less
NOISE = 0.02  # of the range of intensities
PERCENTILES = (0.5, 99.5)
FOREGROUND = 0.2  # of the range of intensities
ORIGIN_MM = 300.0
GRIDS = 4  # taken in turn: each compiles once
SPACINGS_MM = (1.2, 1.5, 2.5)  # of the moving grid
THICK_MM = (1.2, 1.5, 6.0)
TINY = 1 / 20
SCENES = ("whole", "small", "thick", "tiny")


def centre_mm(shape, affine):
    return affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]


def around(linear, before_mm, after_mm):
    """[4, 4]: maps the point `before_mm` to `after_mm`, with the matrix as linear part."""
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = after_mm - linear @ before_mm
    return matrix


def random_transform(rng, shape, affine, scale):
    """The true map fixed -> moving world, and the geometric centre of the moving grid in that world."""
    axis, direction = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 3)))
    rotation = scipy.spatial.transform.Rotation.from_rotvec(axis * np.radians(rng.uniform(0, ROTATION_DEG)))
    scales = np.diag(SCALE ** rng.uniform(-1, 1, 3))
    origin_mm = rng.uniform(-ORIGIN_MM, ORIGIN_MM, 3) * scale
    here_mm = centre_mm(shape, affine)
    edges_mm = np.linalg.norm(affine[:3, :3], axis=0) * shape
    shift_mm = direction * rng.uniform(0, min(SHIFT_MM * scale, SHIFT_SHARE * edges_mm.min()))
    return around(rotation.as_matrix() @ scales, here_mm, here_mm + shift_mm + origin_mm), here_mm + origin_mm


def random_grid(rng, shape, affine, spacings_mm):
    """Shape and voxel axes [3, 3] of a grid as large as the fixed one, with permuted and flipped axes."""
    size_mm = np.abs(affine[:3, :3]) @ shape
    order = rng.permutation(3)
    spacing_mm = rng.permutation(spacings_mm)
    linear = np.zeros((3, 3))
    linear[order, np.arange(3)] = rng.choice((-1, 1), 3) * spacing_mm
    return tuple(np.round(size_mm[order] / spacing_mm).astype(int).tolist()), linear


def moved(values, affine, true, shape, moving_affine):
    """A scan of the fixed world moved by the true map."""
    to_fixed = np.linalg.inv(true @ affine) @ moving_affine  # moving voxel -> fixed voxel
    return scipy.ndimage.affine_transform(
        values, to_fixed[:3, :3], to_fixed[:3, 3], shape, order=1, mode="nearest"
    )


def errors_mm(found, true, points_mm):
    difference = found - true
    return np.linalg.norm(points_mm @ difference[:3, :3].T + difference[:3, 3], axis=1)


def normalised(path):
    image = read_image(path)
    low, high = np.percentile(image.values, PERCENTILES)
    values = np.clip((image.values - low) / (high - low), 0, 1).astype(np.float32)
    return values, np.asarray(image.affine, float)


def scene_of(name, fixed, fixed_affine, moving_affine):
    """The part of the fixed scan that is registered, both affines, and the factor of all lengths."""
    scale = TINY if name == "tiny" else 1.0
    affines = [affine * [[scale], [scale], [scale], [1]] for affine in (fixed_affine, moving_affine)]
    if name == "small":
        first = np.array(fixed.shape) // 4
        fixed = fixed[tuple(slice(n, -n) for n in first)]
        affines[0][:3, 3] += affines[0][:3, :3] @ first
    return fixed, *affines, scale


def voxel_mm(affine):
    return np.abs(np.linalg.det(affine[:3, :3])) ** (1 / 3)


def rows_of(path, moving_path, scene, trials, config):
    whole, affine = normalised(path)
    source, source_affine = (whole, affine) if moving_path is None else normalised(moving_path)
    fixed, affine, source_affine, scale = scene_of(scene, whole, affine, source_affine)
    voxels = np.argwhere(fixed > FOREGROUND)[::7]
    points_mm = voxels @ affine[:3, :3].T + affine[:3, 3]
    spacings_mm = np.multiply(THICK_MM if scene == "thick" else SPACINGS_MM, scale)
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        true, middle_mm = random_transform(rng, fixed.shape, affine, scale)
        shape, linear = random_grid(np.random.default_rng(trial % GRIDS), fixed.shape, affine, spacings_mm)
        moving_affine = around(linear, (np.array(shape) - 1) / 2, middle_mm)
        moving = moved(source, source_affine, true, shape, moving_affine)
        if config.similarity == "nmi" and moving_path is None:
            moving = 1 - moving ** rng.uniform(0.5, 2)
        moving = np.clip(moving + rng.normal(0, NOISE, shape), 0, 1).astype(np.float32)
        run = functools.partial(align_affine, fixed, moving, affine, moving_affine, config=config)
        start = time.perf_counter()
        found = np.asarray(run(), float)
        first_seconds = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds = time.perf_counter() - start
        shift = around(np.eye(3), centre_mm(fixed.shape, affine), centre_mm(shape, moving_affine))
        mean_mm = float(errors_mm(found, true, points_mm).mean())
        yield {
            "image": Path(path).name,
            "scene": scene,
            "trial": trial,
            "before mm": round(float(errors_mm(shift, true, points_mm).mean()), 2),
            "mean mm": round(mean_mm, 4),
            "max mm": round(float(errors_mm(found, true, points_mm).max()), 4),
            "voxels": round(mean_mm / max(voxel_mm(affine), voxel_mm(moving_affine)), 3),
            "first s": round(first_seconds, 2),
            "again s": round(seconds, 2),
        }


def main():
    parser = comparison.argument_parser(__doc__)
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--moving", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=["whole"])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--similarity", choices=("ncc", "nmi"), default="ncc")
    options = parser.parse_args()
    if options.moving and len(options.moving) != len(options.images):
        parser.error("--moving needs one scan per image")
    config = AffineConfig(similarity=options.similarity)
    rows = []
    for path, moving in itertools.zip_longest(options.images, options.moving):
        for scene in options.scenes:
            for row in rows_of(path, moving, scene, options.trials, config):
                print(row, flush=True)
                rows.append(row)
    comparison.report(rows, options.json)
    print(f"{sum(row['voxels'] < 1 for row in rows)} of {len(rows)} under 1 voxel")


if __name__ == "__main__":
    main()
