"""Rigid and affine registration of two scans of any grids, by their images alone.

Both scans are resampled to coarser grids along their own axes; points of the fixed grid are mapped through
the world to the moving grid. Coordinates are relative to the geometric centres of the two grids, so that far
world origins cost no digits. Many rigid starts, the headers' alignment first, are tried in parallel on the
coarsest grid; the best ones continue, with more freedom on finer grids. Grids and step sizes follow the size
of the scans: millimetres don't matter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Real, Shaped

from adregnet_jax.config import AffineConfig
from adregnet_jax.losses import mutual_information_loss, ncc_loss
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.grid import BETWEEN, identity_grid
from adregnet_jax.ops.ncc import local_squared_ncc
from adregnet_jax.ops.sampling import sample
from adregnet_jax.registration import ladder

# Columns: shift, rotation, the six entries of the stretch; what each kind of map may change of the last six.
ISOTROPIC = np.outer([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]) / 3
STRETCHES = {"rigid": np.zeros((6, 6)), "similarity": ISOTROPIC, "affine": np.eye(6)}
MIN_VOXELS = 8  # along an axis of a coarse grid, where the scan has as many
KEPT = (4, 1)  # candidates kept after the first level, with all starts, and after the second; then one
LEARNING_RATE = 0.25  # of a level's spacing: the first steps, in mm at the rim of the scan
LAST_RATE = 0.02  # share of the learning rate that is left at the end of a level
ADAM_EPSILON = 1e-6
FLAT = 1e-3  # standard deviation of an image without information on its place
WINDOW = 5  # voxels of a level: of the local NCC
GLOBAL_SHARE = 0.3  # of the global NCC, added to the local one
BLOCK = 6  # voxels of the finest level: the gain in similarity is averaged over blocks of this width
FEWEST_BLOCKS = 27  # with fewer, their spread says too little
EARNED = 3.0  # standard errors by which a map must be more similar than the headers' alignment
OVERLAP_POWER = 0.1  # of the overlap, by which the normalised mutual information is multiplied
LEAST_OVERLAP = 1e-3  # of the smaller scan: the power has a gradient from there on
EXCESS_WEIGHT = 100.0  # of the squared excess of the stretch over its limit


_Shape = tuple[int, int, int]


class _Grid(NamedTuple):
    """How a scan is brought to the grid of one level."""

    weights: tuple[AnyArray, AnyArray, AnyArray]  # [voxels of the level, voxels of the scan] of each axis
    # [voxels of the level] of each axis: from the voxels' centres to the points that are compared.
    offsets: tuple[AnyArray, AnyArray, AnyArray]
    linear: AnyArray  # [3, 3], of the affine of the level's grid
    size: AnyArray  # [3], voxels of the level, without padding


class _Level(NamedTuple):
    """Both scans on the grids of one level, which may be padded behind their last voxels."""

    fixed: jax.Array  # [x, y, z]
    fixed_counts: jax.Array  # [x, y, z], 1 where the fixed scan counts, else 0
    fixed_size: jax.Array  # [3], voxels without the padding
    fixed_mm: jax.Array  # [x, y, z, 3], from the centre of the grid
    moving: jax.Array  # [x', y', z'], 0 where it doesn't count
    moving_counts: jax.Array  # [x', y', z']
    moving_size: jax.Array  # [3]
    moving_mm: jax.Array  # [x', y', z', 3], from the centre of its grid
    to_voxels: jax.Array  # [3, 3], mm from the centre of the moving grid -> voxels from there
    smaller: jax.Array  # scalar: the volume of the smaller scan, in voxels of the fixed grid
    spacing_mm: jax.Array  # scalar


def align_affine(
    fixed: Real[AnyArray, "x y z"],
    moving: Real[AnyArray, "x2 y2 z2"],
    fixed_affine: Real[np.ndarray, "4 4"],
    moving_affine: Real[np.ndarray, "4 4"],
    *,
    fixed_mask: Shaped[AnyArray, "x y z"] | None = None,
    moving_mask: Shaped[AnyArray, "x2 y2 z2"] | None = None,
    config: AffineConfig,
) -> Float[Array, "4 4"]:
    """Finds the linear map from the fixed to the moving world that makes the scans most similar.

    Pure: it works under `jit` (with affines and `config` closed over) and `vmap`. It is compiled once for all
    scans with the same shapes on all levels.

    Points that leave the moving scan don't count. The similarity counts in full where the overlap, measured
    in either scan, is at least `config.min_overlap` of the smaller scan, and in proportion to the overlap
    below that: neither shrinking nor leaving the scan pays.

    Args:
      fixed: [x, y, z], intensities in [0, 1].
      moving: [x', y', z'], on a grid of its own.
      fixed_affine: [4, 4] voxel -> RAS mm, NumPy.
      moving_affine: [4, 4] voxel -> RAS mm, NumPy.
      fixed_mask: [x, y, z], 0 where the fixed scan doesn't count, or None.
      moving_mask: [x', y', z'], 0 where the moving scan doesn't count, or None.
      config: kind of map, similarity, levels.

    Returns:
      [4, 4] float32, fixed RAS mm -> moving RAS mm. On the finest level it is never less similar than the
      best start or than the alignment of the headers. With more than one level of NCC, it is that alignment
      unless another map is more similar beyond chance. Where a scan is constant or masked all over, it is
      the identity, or the shift from one geometric centre to the other if the scans don't overlap.

    Raises:
      ValueError: shapes that don't belong together, affines that can't be inverted, or settings that make no
        sense.

    Reference:
      Jenkinson and Smith, A global optimisation method for robust affine registration of brain images,
      Medical Image Analysis 2001 (many starts on the coarsest level, freedom that grows with the levels).
    """
    masks = (fixed_mask, moving_mask)
    affines = (fixed_affine, moving_affine)
    _check(fixed, moving, affines, masks, config)
    return _registered((fixed, moving), (fixed.shape, moving.shape), affines, masks, config)


def align_affine_on_rungs(
    fixed: Float[np.ndarray, "x y z"],
    moving: Float[np.ndarray, "x2 y2 z2"],
    fixed_affine: Real[np.ndarray, "4 4"],
    moving_affine: Real[np.ndarray, "4 4"],
    *,
    fixed_mask: Shaped[np.ndarray, "x y z"] | None = None,
    moving_mask: Shaped[np.ndarray, "x2 y2 z2"] | None = None,
    config: AffineConfig,
) -> Float[np.ndarray, "4 4"]:
    """`align_affine`, compiled once for all scans on the same rungs of the ladder (`registration.ladder`).

    The grids of all levels are padded according to the extent of the scan.
    """
    _check(fixed, moving, (fixed_affine, moving_affine), (fixed_mask, moving_mask), config)
    scans = (ladder.pad(fixed), ladder.pad(moving))
    masks = tuple(
        None if mask is None else ladder.pad(mask, outside="zeros") for mask in (fixed_mask, moving_mask)
    )
    shapes = (fixed.shape, moving.shape)
    matrix = _registered(scans, shapes, (fixed_affine, moving_affine), masks, config, on_rungs=True)
    return np.asarray(matrix, np.float64)


def _registered(
    scans: tuple[AnyArray, AnyArray],
    shapes: tuple[Sequence[int], Sequence[int]],
    affines: tuple[np.ndarray, np.ndarray],
    masks: Sequence[AnyArray | None],
    config: AffineConfig,
    *,
    on_rungs: bool = False,
) -> jax.Array:
    """[4, 4] of scans that may be padded behind the voxels of `shapes`."""
    affines_64 = [np.asarray(affine, np.float64) for affine in affines]
    # Of one type, so that others don't compile again.
    values = tuple(jnp.asarray(scan, jnp.float32) for scan in scans)
    counts = tuple(None if mask is None else mask > 0 for mask in masks)
    moving_inverse = np.linalg.inv(affines_64[1][:3, :3]).astype(np.float32)
    # Of the rungs, so that all scans on the same ones have the same levels.
    extent_mm = min(
        float(np.abs(np.linalg.det(affine[:3, :3])) * np.prod(ladder.rungs(shape))) ** (1 / 3)
        for shape, affine in zip(shapes, affines_64, strict=True)
    )
    spacings_mm = [extent_mm / voxels for voxels in config.voxels]

    def level(mm: float, offsets: Sequence[float] = (0.0,)) -> _Level:
        grids = tuple(
            _grid(scan.shape, shape, affine, mm, min(spacings_mm) if on_rungs else None, offsets=moved)
            for scan, shape, affine, moved in zip(scans, shapes, affines_64, (offsets, (0.0,)), strict=True)
        )
        to_moving = moving_inverse * np.divide(grids[1].size, shapes[1]).astype(np.float32)[:, None]
        return _level(values, counts, grids, to_moving, np.float32(mm))

    # Of a box: the root mean square distance from its centre.
    radius_mm = np.sqrt(np.sum((affines_64[0][:3, :3] * np.array(shapes[0])) ** 2) / 12).astype(np.float32)
    here_mm, there_mm = (
        affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
        for shape, affine in zip(shapes, affines_64, strict=True)
    )
    header_mm = here_mm - there_mm if _overlap(shapes, affines_64) else np.zeros(3)
    linear, shift_mm = _aligned(
        tuple(level(mm) for mm in spacings_mm),
        level(spacings_mm[-1], BETWEEN) if config.similarity == "ncc" and len(spacings_mm) > 1 else None,
        radius_mm,
        header_mm.astype(np.float32),
        moving_masked=masks[1] is not None,
        config=config,
    )
    # there + shift + linear (w - here); the differences are taken first, because they are small.
    turned_mm = _linear(linear - jnp.eye(3), here_mm.astype(np.float32))
    shift_mm = shift_mm + (there_mm - here_mm).astype(np.float32) - turned_mm
    return jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift_mm)


def _overlap(shapes: Sequence[Sequence[int]], affines: Sequence[np.ndarray]) -> bool:
    """Whether the boxes around the two scans meet in the world."""
    lows, highs = [], []
    for shape, affine in zip(shapes, affines, strict=True):
        corners = (
            np.array(list(itertools.product(*((0, n - 1) for n in shape)))) @ affine[:3, :3].T + affine[:3, 3]
        )
        lows.append(corners.min(axis=0))
        highs.append(corners.max(axis=0))
    return bool(np.all(np.maximum(*lows) < np.minimum(*highs)))


@functools.partial(jax.jit, static_argnames=("moving_masked", "config"))
def _aligned(
    levels: tuple[_Level, ...],
    judged: _Level | None,
    radius_mm: jax.Array,
    header_mm: jax.Array,
    *,
    moving_masked: bool,
    config: AffineConfig,
) -> tuple[jax.Array, jax.Array]:
    """The map between the worlds around the two centres: a matrix [3, 3] and a shift [3] in mm."""
    loss_at = functools.partial(_loss, radius_mm=radius_mm, moving_masked=moving_masked, config=config)
    starts = _starts(levels[0], radius_mm, header_mm, config)

    candidates, best_start = starts, starts[0]
    for n, (level, steps) in enumerate(zip(levels, config.steps, strict=True)):
        first, last = n == 0, n == len(levels) - 1
        loss = functools.partial(loss_at, level=level, windows=not first)
        kind = "rigid" if first and not last else config.kind
        candidates, losses, before = _descend(candidates, loss, level.spacing_mm, steps, kind)
        if first:
            best_start = starts[jnp.argmin(before)]
        candidates = candidates[jnp.argsort(losses)[: KEPT[n] if n < len(KEPT) else 1]]

    # Going through the levels doesn't guarantee that the result is better than its start.
    finalists = jnp.stack([starts[0], best_start, candidates[0]])
    finest = functools.partial(loss_at, level=levels[-1], windows=len(levels) > 1)
    losses = jax.lax.map(finest, finalists)
    informative = (_spread(levels[0].fixed, levels[0].fixed_counts) > FLAT) & (
        _spread(levels[0].moving, levels[0].moving_counts) > FLAT
    )
    best = jnp.where(informative, finalists[jnp.argmin(losses)], starts[0])
    if judged is not None:
        earned = _earned(best, starts[0], level=judged, radius_mm=radius_mm, moving_masked=moving_masked)
        best = jnp.where(earned, best, starts[0])
    return _map(best, radius_mm)


def _earned(
    found: jax.Array, start: jax.Array, *, level: _Level, radius_mm: jax.Array, moving_masked: bool
) -> jax.Array:
    """Whether a map makes the scans more alike by their local NCC than the start does, beyond chance.

    The level's points lie between the voxels (see `ops.grid.between_voxels`). The gain is compared with how
    far it differs from block to block; with few blocks, any gain counts.
    """

    def similarity(theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[x, y, z]: the squared NCC around each point, 0 outside the overlap; and 1 inside of that."""
        warped, inside, _ = _warped(theta, level, radius_mm=radius_mm, moving_masked=moving_masked)
        counts = level.fixed_counts * (inside > 0.5)
        total = jnp.maximum(jnp.sum(counts), 1)
        fixed, warped = (
            counts * (values - jnp.sum(counts * values) / total) for values in (level.fixed, warped)
        )
        squared = local_squared_ncc(fixed[None], warped[None], WINDOW, mask=counts[None])[0]
        return counts * squared, counts

    (before, counted_before), (after, counted) = similarity(start), similarity(found)
    gains, sizes = _block_sums(after - before), _block_sums(jnp.maximum(counted_before, counted))
    blocks = jnp.sum(sizes > 0)
    mean = jnp.sum(gains) / jnp.maximum(blocks, 1)
    variance = jnp.sum(jnp.where(sizes > 0, (gains - mean) ** 2, 0)) / jnp.maximum(blocks - 1, 1)
    enough = blocks >= FEWEST_BLOCKS
    return ~enough | (mean > EARNED * jnp.sqrt(variance / jnp.maximum(blocks, 1)))


def _block_sums(values: jax.Array) -> jax.Array:
    """[x, y, z] -> [x', y', z']: sums over blocks."""
    padded = jnp.pad(values, [(0, -n % BLOCK) for n in values.shape])
    x, y, z = padded.shape
    split = padded.reshape(x // BLOCK, BLOCK, y // BLOCK, BLOCK, z // BLOCK, BLOCK)
    return jnp.sum(split, axis=(1, 3, 5))


def _descend(
    starts: jax.Array,
    loss_at: Callable[[jax.Array], jax.Array],
    spacing_mm: jax.Array,
    steps: int,
    kind: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam from every start: the best parameters met [k, 12], their losses, and the losses of the starts."""
    decay = optax.cosine_decay_schedule(LEARNING_RATE, max(steps, 1), LAST_RATE)
    optimiser = optax.adam(lambda n: spacing_mm * decay(n), eps=ADAM_EPSILON)
    stretches = jnp.asarray(STRETCHES[kind], jnp.float32)

    def free(theta: jax.Array) -> jax.Array:
        return theta.at[6:].set(jnp.matmul(stretches, theta[6:], precision="highest"))

    def from_one(start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            theta, moments, best, best_loss = carry
            loss, gradient = jax.value_and_grad(loss_at)(theta)
            better = loss < best_loss
            best, best_loss = jnp.where(better, theta, best), jnp.where(better, loss, best_loss)
            updates, moments = optimiser.update(free(gradient), moments)
            return (theta + updates, moments, best, best_loss), loss

        carry: Any = (start, optimiser.init(start), start, jnp.inf)
        # One more, so that the last step is evaluated, and the start if there are no steps.
        (_, _, best, best_loss), losses = jax.lax.scan(step, carry, length=steps + 1)
        return best, best_loss, losses[0]

    return jax.vmap(from_one)(starts)


def _loss(
    theta: jax.Array,
    *,
    level: _Level,
    windows: bool,
    radius_mm: jax.Array,
    moving_masked: bool,
    config: AffineConfig,
) -> jax.Array:
    """Minus the similarity, reduced in proportion where the overlap is too small, and a bound of the stretch.

    With `windows` the NCC is a local one.
    """
    warped, inside, linear = _warped(theta, level, radius_mm=radius_mm, moving_masked=moving_masked)
    fixed, warped, mask = (
        values[None, ..., None] for values in (level.fixed, warped, level.fixed_counts * (inside > 0.5))
    )
    # The fixed points that meet the moving scan may fill less of it than of the fixed scan.
    overlap = jnp.sum(level.fixed_counts * inside) * jnp.minimum(1, _determinant(linear)) / level.smaller
    # From the worst similarity there is, so that losing overlap never pays.
    if config.similarity == "nmi":
        # Normalised or not, it rises a little where background leaves the overlap.
        more = jnp.clip(overlap, LEAST_OVERLAP, 1) ** OVERLAP_POWER
        similarity, least = -mutual_information_loss(fixed, warped, mask=mask, normalised=True) * more, 0.0
    else:
        similarity, least = 1 - ncc_loss(fixed, warped, mask=mask), -1.0
        if windows:
            # The local NCC is the sharper one, the global NCC has the wider basin.
            similarity, least = GLOBAL_SHARE * similarity, -GLOBAL_SHARE
            similarity += 1 - ncc_loss(fixed, warped, mask=mask, window=WINDOW)
    enough = jnp.minimum(1, overlap / config.min_overlap)
    excess = jnp.maximum(0, _greatest(theta[6:] / radius_mm) - math.log(config.max_stretch))
    return (least - similarity) * enough + EXCESS_WEIGHT * excess**2


def _warped(
    theta: jax.Array, level: _Level, *, radius_mm: jax.Array, moving_masked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The moving scan at the points of the fixed one; 1 inside of it, 0 outside; and the linear part."""
    linear, shift_mm = _map(theta, radius_mm)
    to_voxels = jnp.matmul(level.to_voxels, linear, precision="highest")
    first = _linear(level.to_voxels, shift_mm) + (level.moving_size - 1) / 2
    # [x, y, z, 3], voxels of the moving grid
    coordinates = _linear(to_voxels, level.fixed_mm) + first[None, None, None]
    size = level.moving_size[None, None, None]
    nearest = jnp.clip(coordinates, 0, size - 1)  # not in the padding
    warped = sample(level.moving[..., None], nearest)[..., 0]
    # 1 as far as the centres of the outermost voxels, then fading to 0 over the next voxel.
    beyond = jnp.maximum(-coordinates, coordinates + 1 - size)
    inside = jnp.prod(1 - jnp.clip(beyond, 0, 1), axis=-1)
    if moving_masked:
        counts = sample(level.moving_counts[..., None], nearest)[..., 0]
        # Beside voxels that don't count, the mean of those that do.
        warped, inside = warped / jnp.maximum(counts, 0.5), inside * counts
    return warped, inside, linear


def _map(theta: jax.Array, radius_mm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Parameters [12], all in mm at the rim of the scan, as a matrix [3, 3] and a shift [3] in mm.

    Shift, rotation, scales, shears: a stretch along three axes, which a square keeps from reflecting, then
    the rotation. That by the angle a is 2 tan(a/2) times its axis (Cayley), which has a gradient at 0, too.
    """
    half = theta[3:6] / (2 * radius_mm)
    cross = _skew(half)
    square = jnp.matmul(cross, cross, precision="highest")
    rotation = jnp.eye(3) + 2 * (cross + square) / (1 + jnp.sum(half**2))
    root = jnp.eye(3) + _symmetric(theta[6:] / radius_mm) / 2
    return jnp.linalg.multi_dot([rotation, root, root], precision="highest"), theta[:3]


def _greatest(stretch: jax.Array) -> jax.Array:
    """About the greatest absolute eigenvalue of the symmetric matrix with these entries [6], and no less.

    A norm of the eigenvalues with a gradient everywhere, also where they coincide.
    """
    power = _symmetric(stretch)
    for _ in range(3):
        power = jnp.matmul(power, power, precision="highest")
    return (jnp.trace(power) + 1e-12) ** (1 / 8)


def _determinant(matrix: AnyArray) -> jax.Array:
    return jnp.dot(matrix[:, 0], jnp.cross(matrix[:, 1], matrix[:, 2]), precision="highest")


def _skew(vector: jax.Array) -> jax.Array:
    x, y, z = vector
    return jnp.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])


def _symmetric(values: jax.Array) -> jax.Array:
    xx, yy, zz, yz, xz, xy = values
    return jnp.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def _starts(level: _Level, radius_mm: jax.Array, header_mm: jax.Array, config: AffineConfig) -> jax.Array:
    """[k, 12]: the headers' alignment, then rotations about the geometric centres and the centres of mass."""
    directions = np.array(list(itertools.product((0.0, 1.0, -1.0), repeat=3)))
    directions /= np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1)
    if not config.rotation_starts_deg:
        directions = directions[:1]
    rotations = 2 * math.tan(math.radians(config.rotation_starts_deg) / 2) * directions * radius_mm
    masses = (
        _centre_of_mass(level.fixed, level.fixed_counts, level.fixed_size, level.fixed_mm),
        _centre_of_mass(level.moving, level.moving_counts, level.moving_size, level.moving_mm),
    )

    def start(rotation: jax.Array | np.ndarray, centres: tuple[jax.Array, jax.Array]) -> jax.Array:
        theta = jnp.zeros(12).at[3:6].set(rotation)
        here_mm, there_mm = centres
        turned_mm = _linear(_map(theta, radius_mm)[0], here_mm)
        return theta.at[:3].set(there_mm - turned_mm)

    return jnp.concatenate(
        [jnp.zeros((1, 12)).at[0, :3].set(header_mm)]
        + [
            jax.vmap(functools.partial(start, centres=centres))(rotations)
            for centres in ((jnp.zeros(3), jnp.zeros(3)), masses)
        ]
    )


def _centre_of_mass(image: jax.Array, counts: jax.Array, size: jax.Array, points_mm: jax.Array) -> jax.Array:
    """[3] mm, weighted by the difference from the border's intensity, which is background in any contrast."""
    voxels = identity_grid(image.shape)
    border = jnp.any((voxels == 0) | (voxels == size[None, None, None] - 1), axis=-1)
    background = jnp.nanmedian(jnp.where(border & (counts > 0), image, jnp.nan))
    mass = counts * jnp.abs(image - jnp.nan_to_num(background))
    return jnp.einsum("xyz,xyzi->i", mass, points_mm, precision="highest") / jnp.maximum(jnp.sum(mass), 1e-6)


def _spread(image: jax.Array, counts: jax.Array) -> jax.Array:
    """Standard deviation of the intensities that count; 0 if none do."""
    total = jnp.maximum(jnp.sum(counts), 1)
    mean = jnp.sum(counts * image) / total
    return jnp.sqrt(jnp.sum(counts * (image - mean) ** 2) / total)


def _grid(
    padded_shape: Sequence[int],
    shape: Sequence[int],
    affine: np.ndarray,
    spacing_mm: float,
    finest_mm: float | None,
    *,
    offsets: Sequence[float],
) -> _Grid:
    """The grid of one level; padded to the rungs of the extent in voxels of `finest_mm` if that is given."""
    sizes_mm = np.linalg.norm(affine[:3, :3], axis=0)
    level_shape = _level_shape(shape, sizes_mm, spacing_mm)
    weights, moved = [], []
    for n, padded, m, mm in zip(shape, padded_shape, level_shape, sizes_mm, strict=True):
        rows = m
        if finest_mm is not None:
            extent = ladder.rung(math.ceil(float(padded * mm / finest_mm)))
            rows = min(padded, max(MIN_VOXELS, math.ceil(extent * finest_mm / spacing_mm)))
        moved.append(np.resize(np.asarray(offsets, np.float32), rows))
        weights.append(np.pad(_weights(n, m, moved[-1][:m]), ((0, rows - m), (0, padded - n))))
    # Centres of voxels are aligned: those of the grids stay where they are.
    linear = affine[:3, :3].astype(np.float32) * np.divide(shape, level_shape).astype(np.float32)[None]
    return _Grid(
        (weights[0], weights[1], weights[2]),
        (moved[0], moved[1], moved[2]),
        linear,
        np.array(level_shape, np.float32),
    )


@jax.jit
def _level(
    scans: tuple[jax.Array, jax.Array],
    masks: tuple[jax.Array | None, jax.Array | None],
    grids: tuple[_Grid, _Grid],
    to_voxels: jax.Array,
    spacing_mm: jax.Array,
) -> _Level:
    """Both scans on the grids of one level."""
    images, counts, points_mm, volumes_mm3 = [], [], [], []
    for scan, mask, grid in zip(scans, masks, grids, strict=True):
        image, count = _resampled(scan, mask, grid)
        linear = grid.linear
        voxel_mm3 = jnp.abs(_determinant(linear))
        images.append(image)
        counts.append(count)
        middle = (grid.size - 1)[None, None, None] / 2
        points = identity_grid(image.shape) + jnp.stack(jnp.meshgrid(*grid.offsets, indexing="ij"), axis=-1)
        points_mm.append(_linear(linear, points - middle))
        volumes_mm3.append((voxel_mm3, jnp.sum(count) * voxel_mm3))
    smaller_mm3 = jnp.minimum(volumes_mm3[0][1], volumes_mm3[1][1])
    return _Level(
        fixed=images[0],
        fixed_counts=counts[0],
        fixed_size=jnp.asarray(grids[0].size),
        fixed_mm=points_mm[0],
        moving=images[1],
        moving_counts=counts[1],
        moving_size=jnp.asarray(grids[1].size),
        moving_mm=points_mm[1],
        to_voxels=to_voxels,
        smaller=jnp.maximum(smaller_mm3 / volumes_mm3[0][0], 1),
        spacing_mm=jnp.asarray(spacing_mm),
    )


def _linear(matrix: jax.Array | np.ndarray, vectors: jax.Array | np.ndarray) -> jax.Array:
    """[3, 3] times vectors [..., 3]; GPUs would multiply with 10 bits of mantissa."""
    return jnp.einsum("ij,...j->...i", matrix, vectors, precision="highest")


def _resampled(scan: jax.Array, mask: jax.Array | None, grid: _Grid) -> tuple[jax.Array, jax.Array]:
    """A masked scan smoothed to a coarser grid, and where it counts there."""

    def resize(values: jax.Array) -> jax.Array:
        for axis, weights in enumerate(grid.weights):
            product = jnp.tensordot(weights, values, axes=(1, axis), precision="highest")
            values = jnp.moveaxis(product, 0, axis)
        return values

    if mask is None:
        # Rows of padding are 0, the others sum to 1.
        x, y, z = (jnp.round(jnp.sum(weights, axis=1)) for weights in grid.weights)
        return resize(scan), x[:, None, None] * y[None, :, None] * z[None, None]
    # Selected, not multiplied: what doesn't count may be NaN.
    image, weight = resize(jnp.where(mask, scan, 0)), resize(mask.astype(jnp.float32))
    counts = (weight > 0.5).astype(jnp.float32)
    return counts * image / jnp.maximum(weight, 0.5), counts


def _weights(n: int, m: int, offsets: AnyArray) -> np.ndarray:
    """[m, n]: n voxels to m larger ones of the same extent, by triangles as wide as two of the larger ones.

    `jax.image.resize` does the same; here its weights can be padded, and the centres moved by `offsets` [m].
    """
    centres = (np.arange(m) + offsets + 0.5) * n / m - 0.5
    # On the border, the outermost voxels' own intensities.
    distance = np.abs(np.clip(centres, 0, n - 1)[:, None] - np.arange(n)[None]) / max(n / m, 1)
    weights = np.maximum(0, 1 - distance)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _level_shape(shape: Sequence[int], sizes_mm: np.ndarray, spacing_mm: float) -> _Shape:
    """Voxels along each axis of a grid of about `spacing_mm`, no finer than the scan."""
    x, y, z = (
        min(n, max(MIN_VOXELS, round(float(n * mm / spacing_mm))))
        for n, mm in zip(shape, sizes_mm, strict=True)
    )
    return x, y, z


def _check(
    fixed: AnyArray,
    moving: AnyArray,
    affines: Sequence[np.ndarray],
    masks: Sequence[AnyArray | None],
    config: AffineConfig,
) -> None:
    if fixed.ndim != 3 or moving.ndim != 3 or 0 in fixed.shape + moving.shape:
        raise ValueError(f"scans must be [x, y, z] and not empty, got {fixed.shape} and {moving.shape}")
    for name, affine in zip(("fixed_affine", "moving_affine"), affines, strict=True):
        if isinstance(affine, jax.core.Tracer):
            raise ValueError(f"{name} must be a NumPy array that is closed over under jit, not traced")
        if np.shape(affine) != (4, 4) or not _invertible(np.asarray(affine, np.float64)):
            raise ValueError(
                f"{name} must be [4, 4], finite and invertible, got {np.asarray(affine).tolist()}"
            )
    for name, mask, scan in zip(("fixed_mask", "moving_mask"), masks, (fixed, moving), strict=True):
        if mask is not None and mask.shape != scan.shape:
            raise ValueError(f"{name} must have the shape of its scan, {scan.shape}, got {mask.shape}")
    config.check()


def _invertible(affine: np.ndarray) -> bool:
    sizes_mm = np.linalg.norm(affine[:3, :3], axis=0)
    # Of axes of length 1: far from 0 whatever the unit.
    return (
        bool(np.isfinite(affine).all())
        and bool((sizes_mm > 0).all())
        and abs(float(np.linalg.det(affine[:3, :3] / sizes_mm))) > 1e-3
    )
