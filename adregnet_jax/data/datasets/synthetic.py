"""Synthetic scan pairs: random anatomy, random contrast and random motion, generated from a seed.

A case starts from a label map in the moving frame and a displacement u(p) over the fixed frame. The label map
is pulled back by nearest neighbour, fixed(p) = moving(p + u(p)). Then the moving map is painted, and the
image is pulled back by trilinear interpolation: the pair looks like two scans with the same sequence, the
fixed one slightly softer. Where contrasts differ, the values of the fixed image then pass through a random
curve, or the fixed map is painted separately, as SynthMorph does (Hoffmann et al., IEEE TMI 2022). Each image
is blurred, cropped and given its own noise and bias field.

There are three kinds of anatomy: blobs of any shape; shells with folded edges around paired nuclei, like a
head; a trunk with lungs or abdominal organs, ribs, spine and trees of vessels. There are two kinds of motion:
smooth waves of several lengths plus a small affine map, as between people; or a shift along one axis that
fades, as in breathing. No motion folds: its determinant, by central differences, is at least
`LEAST_DETERMINANT`.

No real scan is used. `python -m adregnet_jax.data.datasets.synthetic` prints statistics of the cases, and
--picture FILE draws some. `adregnet_jax.synthesis` draws pairs of the same distribution in JAX: change both.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from adregnet_jax.config import SyntheticConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.preprocessing import match_contrast, rescale_percentiles
from adregnet_jax.errors import UserError

LEAST_DETERMINANT = 0.15  # of the Jacobian of a motion
EASY_SHARE = 0.3  # of the largest motion, at the start of the curriculum; contrasts don't differ there


def synthetic_pair(config: SyntheticConfig, case: int, *, share: float = 1.0) -> Pair:
    """Case number `case`: the same settings and share give the same pair, bit for bit.

    Args:
      config: grid, motion, contrast and seed.
      case: number of the pair, 0 or more; there is no upper limit.
      share: difficulty from 0 to 1. The motion is at most this share of `config.largest_motion_mm`, and the
        probability that the contrasts differ grows from 0 at `EASY_SHARE`.

    Returns:
      A pair with labels, 0 where there is no structure, and with the displacement that made it, in voxels.

    Raises:
      UserError: a setting can't be used, or the case is below 0.
    """
    config.check()
    if case < 0:
        raise UserError(f"synthetic cases are numbered from 0, got {case}")
    rng = np.random.default_rng([config.seed, case])
    spacing_mm = np.asarray(config.spacing_mm, np.float64)
    moving_labels = _draw_anatomy(rng, config.shape)
    displacement = _draw_motion(rng, spacing_mm, config.shape, share * config.largest_motion_mm)
    positions = np.moveaxis(displacement, -1, 0) + _indices(config.shape)
    fixed_labels = _nearest(moving_labels, positions)

    differing = max(0.0, share - EASY_SHARE) / (1 - EASY_SHARE) * (1 - config.same_contrast)
    kind = rng.random()
    same_contrast = bool(kind >= differing)
    moving = _paint(rng, moving_labels)
    fixed = ndimage.map_coordinates(moving, positions, order=1, mode="nearest")
    gamma = [np.exp(rng.normal(0, 0.2))] * 2
    if not same_contrast:
        fixed = _paint(rng, fixed_labels) if kind < differing / 2 else _recolour(rng, fixed)
        gamma = np.exp(rng.normal(0, 0.2, 2)).tolist()
    fixed, moving = (
        _acquire(rng, image, exponent) for image, exponent in zip((fixed, moving), gamma, strict=True)
    )
    if config.match_contrast:
        moving = match_contrast(moving, fixed)
    return Pair(
        name=f"synthetic_{case:07d}",
        fixed=fixed,
        moving=moving,
        spacing_mm=spacing_mm,
        affine=np.diag([*spacing_mm, 1.0]),
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        displacement=displacement,
        same_contrast=same_contrast,
    )


def curriculum_share(config: SyntheticConfig, case: int) -> float:
    """Difficulty of a training case for `synthetic_pair`: it grows with the case's number up to 1."""
    if not config.curriculum_cases:
        return 1.0
    return min(1.0, EASY_SHARE + (1 - EASY_SHARE) * case / config.curriculum_cases)


def _draw_anatomy(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Labels [x, y, z] int16, numbered from 1 in random order."""
    kind = rng.choice(["blobs", "shells", "trunk"], p=[0.3, 0.35, 0.35])
    labels = _blobs(rng, shape) if kind == "blobs" else np.zeros(shape, np.int16)
    if kind != "blobs":
        # Coordinates from -1 to 1, bent, so that no organ is an ellipsoid.
        bend = rng.uniform(0.03, 0.12)
        bent = _noise(rng, shape, int(rng.integers(2, 5)), 3)
        axes = np.ix_(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape))
        x, y, z = (axis + bend * wave for axis, wave in zip(axes, bent, strict=True))
        (_shells if kind == "shells" else _trunk)(rng, labels, x, y, z)
    count = int(labels.max())
    order = np.concatenate([[0], 1 + rng.permutation(count)]).astype(np.int16)
    return order[labels]


def _blobs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    noise = _noise(rng, shape, int(rng.integers(3, 9)), int(rng.integers(5, 14)))
    return np.argmax(noise, axis=0).astype(np.int16)


def _shells(
    rng: np.random.Generator, labels: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray
) -> None:
    """A layered ellipsoid with folded edges, on average more folded with depth, and paired nuclei."""
    half_axes = rng.uniform(0.6, 0.95, 3)
    depth = 1 - _radius(x, y, z, (0, 0, 0), half_axes)
    folds = _noise(rng, labels.shape, int(rng.integers(6, 15)))[0]
    for number, edge in enumerate(np.sort(rng.uniform(0, 0.5, rng.integers(3, 7)))):
        labels[depth + rng.uniform(0, 0.3) * edge * folds > edge] = number + 1
    for _ in range(rng.integers(2, 7)):
        centre, size = rng.uniform(-0.4, 0.4, 3) * half_axes, rng.uniform(0.06, 0.25, 3)
        number = labels.max() + 1
        for side in (-1, 1):
            labels[_radius(x, y, z, (side * abs(centre[0]), *centre[1:]), size) < 1] = number


def _trunk(rng: np.random.Generator, labels: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    """Chest to pelvis, partly in the field of view."""
    z = z * rng.uniform(0.5, 1.0) + rng.uniform(-0.6, 0.6)  # the diaphragm is at about 0, the head above
    wide, deep = rng.uniform(0.7, 0.95), rng.uniform(0.5, 0.8)
    wall = rng.uniform(0.12, 0.22)
    across = np.sqrt((x / wide) ** 2 + (y / deep) ** 2)
    number = iter(range(1, 100))

    def add(inside: np.ndarray) -> None:
        labels[inside] = next(number)

    add(across < 1)
    inside = across < 1 - wall
    add(inside)
    dome = 0.15 - rng.uniform(0.2, 0.5) * ((np.abs(x) - 0.35) ** 2 + y**2)
    lungs = inside & (z > dome) & (np.abs(x) > rng.uniform(0.1, 0.2))
    add(lungs)
    add(_radius(x, y, z, (rng.uniform(0, 0.2), -0.1, rng.uniform(0.15, 0.35)), rng.uniform(0.2, 0.32, 3)) < 1)
    below = inside & (z < dome - 0.03)
    add(below & (x < rng.uniform(0.0, 0.25)) & (z > rng.uniform(-0.5, -0.2)))  # liver
    for _ in range(rng.integers(3, 9)):  # other organs
        centre = rng.uniform(-0.55, 0.55), rng.uniform(-0.4, 0.4), rng.uniform(-0.9, -0.15)
        add(below & (_radius(x, y, z, centre, rng.uniform(0.1, 0.3, 3)) < 1))
    pitch = rng.uniform(0.12, 0.25)
    height = np.mod(z - rng.uniform(0.2, 0.5) * y, pitch) / pitch
    shell = (across > 1 - 0.7 * wall) & (across < 1 - 0.3 * wall)
    add(shell & (height < rng.uniform(0.3, 0.5)) & (z > -0.35))  # ribs
    spine = np.hypot(x, y - 0.75 * deep) < rng.uniform(0.1, 0.16)
    add(spine)
    add(spine & (np.mod(z, pitch) < 0.2 * pitch))  # discs
    vessels = next(number)
    for region, start in (
        (lungs & (x < 0), (-0.2, 0, 0.3)),
        (lungs & (x > 0), (0.2, 0, 0.3)),
        (below, (0, 0.2, -0.2)),
    ):
        if rng.random() < 0.8:
            tree = _tree(rng, labels.shape, x, y, z, np.array(start))
            labels[tree & region] = vessels


def _radius(
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    centre: Sequence[float],
    half_axes: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """1 on the surface of an ellipsoid, 0 in its centre."""
    a, b, c = half_axes
    return np.sqrt(
        ((x - centre[0]) / a) ** 2 + ((y - centre[1]) / b) ** 2 + ((z - centre[2]) / c) ** 2,
        dtype=np.float32,
    )


def _tree(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    x: np.ndarray,
    y: np.ndarray,
    z: np.ndarray,
    start: np.ndarray,
    generations: int = 8,
) -> np.ndarray:
    """A mask of branches that fork and become thinner; `start` is in the coordinates x, y, z."""
    origin = np.array(
        np.unravel_index(np.argmin((x - start[0]) ** 2 + (y - start[1]) ** 2 + (z - start[2]) ** 2), shape)
    )
    ends = origin[None].astype(float)
    ways = _directions(rng.standard_normal((1, 3)))
    length, radius = 0.22 * min(shape), rng.uniform(1.0, 2.0)
    mask = np.zeros(shape, bool)
    for _ in range(generations):
        ends, ways = np.repeat(ends, 2, axis=0), np.repeat(ways, 2, axis=0)
        ways = _directions(ways + 0.8 * rng.standard_normal(ways.shape))
        steps = np.linspace(0, 1, int(np.ceil(length)) + 1)[:, None, None]
        points = (ends + steps * length * ways).reshape(-1, 3)
        reach = np.arange(-int(radius), int(radius) + 1)
        ball = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), axis=-1).reshape(-1, 3)
        ball = ball[np.linalg.norm(ball, axis=1) <= radius]
        voxels = np.rint(points[:, None] + ball).astype(int).reshape(-1, 3)
        voxels = voxels[((voxels >= 0) & (voxels < shape)).all(axis=1)]
        mask[tuple(voxels.T)] = True
        ends = ends + length * ways
        length, radius = 0.78 * length, 0.75 * radius
    return mask


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _draw_motion(
    rng: np.random.Generator, spacing_mm: np.ndarray, shape: tuple[int, ...], largest_mm: float
) -> np.ndarray:
    """u [x, y, z, 3] float32 in voxels of the fixed frame, without folds."""
    axes = np.ix_(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape))
    motion = np.zeros((3, *shape), np.float32)  # mm, up to a factor
    if rng.random() < 0.4:  # a breath
        along = int(rng.choice(3, p=[0.15, 0.15, 0.7]))
        front = rng.uniform(-0.6, 0.6) + rng.uniform(-0.4, 0.4) * axes[(along + 1) % 3]
        motion[along] = 1 + np.tanh(rng.choice([-1, 1]) * (axes[along] - front) / rng.uniform(0.4, 1.0))
        motion[along] *= rng.choice([-1, 1])  # forth or back
        motion += rng.uniform(0.1, 0.3) * _noise(rng, shape, int(rng.integers(3, 6)), 3)
    else:
        for cells, size in ((2, 1.0), (3, 0.7), (5, 0.4), (8, 0.2)):
            motion += rng.uniform(0, size) * _noise(rng, shape, cells, 3)
        half_mm = (np.array(shape) - 1) / 2 * spacing_mm
        matrix = rng.normal(0, rng.uniform(0, 0.7), (3, 3)) * half_mm / half_mm.mean()
        for n in range(3):
            motion[n] += sum(factor * axis for factor, axis in zip(matrix[n], axes, strict=True))
    longest = np.sqrt((motion**2).sum(axis=0).max())
    motion *= np.float32(largest_mm * rng.uniform(0.1, 1.0) / longest)
    motion /= spacing_mm.astype(np.float32).reshape(3, 1, 1, 1)
    return np.moveaxis(motion, 0, -1) * np.float32(_unfolding_factor(motion))


def _unfolding_factor(motion: np.ndarray) -> float:
    """The largest of 1, 0.85, 0.85^2, ... that scales a displacement [3, x, y, z] until it doesn't fold."""
    (a, b, c), (d, e, f), (g, h, i) = (np.gradient(component) for component in motion)
    # det(I + s G) is a polynomial in s, whose coefficients are the invariants of the gradient G.
    trace = a + e + i
    minors = a * e - b * d + a * i - c * g + e * i - f * h
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    factor = 1.0
    while (1 + factor * (trace + factor * (minors + factor * determinant))).min() < LEAST_DETERMINANT:
        factor *= 0.85
    return factor


def _paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """A value for each label, and a texture: [x, y, z] float32."""
    count = int(labels.max()) + 1
    values = rng.uniform(0, 1, count).astype(np.float32)
    strength = rng.uniform(0, 0.12, count).astype(np.float32)
    if rng.random() < 0.7:
        values[0] = strength[0] = 0  # empty background
    texture = _noise(rng, labels.shape, int(min(labels.shape) / rng.uniform(2.5, 6)))[0]
    return values[labels] + strength[labels] * texture


def _recolour(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Maps intensities through a random curve that rises and falls; the background stays 0."""
    curve = np.interp(image, np.linspace(0, 1, 5), rng.uniform(0, 1, 5)).astype(np.float32)
    return np.where(image > 0, curve, 0)


def _acquire(rng: np.random.Generator, image: np.ndarray, exponent: float) -> np.ndarray:
    """Simulates a scanner, in [0, 1]: partial volume, thick slices, bias field, noise, a crop."""
    width = np.full(3, rng.uniform(0.3, 0.9))
    if rng.random() < 0.3:
        width[rng.integers(3)] += rng.uniform(0.5, 1.5)
    image = ndimage.gaussian_filter(image, width, mode="nearest", truncate=2.5)
    image = rescale_percentiles(image, "a synthetic scan") ** np.float32(exponent)
    if rng.random() < 0.5:
        bias = _noise(rng, image.shape, int(rng.integers(1, 4)))[0]
        image *= np.exp(np.float32(rng.uniform(0, 0.3)) * bias)
    image += np.float32(rng.uniform(0, 0.06)) * rng.standard_normal(image.shape, np.float32)
    if rng.random() < 0.25:
        low = (rng.uniform(0, 0.15, 3) * image.shape).astype(int)
        high = image.shape - (rng.uniform(0, 0.15, 3) * image.shape).astype(int)
        inside = tuple(map(slice, low, high))
        cropped = np.zeros_like(image)
        cropped[inside] = image[inside]
        image = cropped
    return np.clip(image, 0, 1)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], cells: int, count: int = 1) -> np.ndarray:
    """Smooth random fields [count, x, y, z] float32 of mean 0 and SD 1, `cells` waves across the volume.

    Cubic B-splines over a grid of random numbers, one axis after another.
    """
    field = rng.standard_normal((count, *(cells + 3,) * 3), np.float32)
    for axis, n in enumerate(shape, start=1):
        field = np.moveaxis(np.tensordot(field, _spline_weights(n, cells), (axis, 1)), -1, axis)
    field = np.ascontiguousarray(field)
    field -= field.mean(axis=(1, 2, 3), keepdims=True)
    return field / field.std(axis=(1, 2, 3), keepdims=True)


@functools.lru_cache(maxsize=64)
def _spline_weights(n: int, cells: int) -> np.ndarray:
    """[n, cells + 3]: cubic B-splines at the centres of n voxels over `cells` cells."""
    place = (np.arange(n) + 0.5) / n * cells
    distance = np.abs(place[:, None] - (np.arange(cells + 3) - 1))
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    return np.where(distance < 1, near, far).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _indices(shape: tuple[int, ...]) -> np.ndarray:
    return np.indices(shape, dtype=np.float32)


def _nearest(labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Labels [x, y, z] of the voxels nearest to positions [3, x, y, z], clamped to the border."""
    index = tuple(
        np.clip(np.rint(place).astype(np.intp), 0, n - 1)
        for place, n in zip(positions, labels.shape, strict=True)
    )
    return labels[index]


def main() -> None:
    parser = argparse.ArgumentParser(description="Statistics of synthetic cases.")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="PNG of the middle slices of eight cases"
    )
    arguments = parser.parse_args()
    config = SyntheticConfig()
    pairs = []
    print("case  structures  contrast  motion mean, max (mm)  determinant min  max  seconds")
    for case in range(arguments.cases):
        start = time.perf_counter()
        pair = synthetic_pair(config, case)
        seconds = time.perf_counter() - start
        assert pair.displacement is not None and pair.moving_labels is not None
        length = np.linalg.norm(pair.displacement * pair.spacing_mm, axis=-1)
        gradient = np.stack([np.stack(np.gradient(pair.displacement[..., n]), -1) for n in range(3)], -2)
        jacobian = np.linalg.det(np.eye(3) + gradient)
        print(
            f"{case:4d}{len(np.unique(pair.moving_labels)):12d}{'same' if pair.same_contrast else 'own':>10}"
            f"{length.mean():16.1f}{length.max():7.1f}{jacobian.min():17.2f}{jacobian.max():5.2f}{seconds:9.2f}"
        )
        pairs.append(pair)
    if arguments.picture:
        draw_pairs(pairs[:8], arguments.picture)


def draw_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Draws the middle slices of synthetic pairs, a column each: images, labels, length of the motion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * len(pairs), 8), layout="constrained")
    axes = figure.subplots(4, len(pairs), squeeze=False)
    for column, pair in zip(axes.T, pairs, strict=True):
        middle = pair.fixed.shape[1] // 2
        rows = {"fixed": pair.fixed, "moving": pair.moving, "labels": pair.fixed_labels}
        for ax, (name, volume) in zip(column, rows.items(), strict=False):
            assert volume is not None
            ax.imshow(
                volume[:, middle].T, origin="lower", cmap="nipy_spectral" if name == "labels" else "gray"
            )
        assert pair.displacement is not None
        length = np.linalg.norm(pair.displacement * pair.spacing_mm, axis=-1)
        column[3].imshow(length[:, middle].T, origin="lower")
        column[0].set_title(pair.name, fontsize=8)
        column[3].set_title(f"to {length.max():.0f} mm", fontsize=8)
    for name, ax in zip(("fixed", "moving", "fixed labels", "displacement"), axes[:, 0], strict=True):
        ax.set_ylabel(name)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
