"""Instance optimisation: registration of two scans by their images alone, with or without a network's start.

The displacement is found coarse to fine. A discrete search finds large motions on a grid of features; then,
level by level, Adam moves a grid of control points, which is interpolated to the voxels. Landmarks and labels
take no part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Shaped

from adregnet_jax.config import InstanceConfig
from adregnet_jax.losses import (
    bending_energy_loss,
    jacobian_loss,
    mutual_information_loss,
    ncc_loss,
    smoothness_loss,
    ssd_loss,
)
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.composition import exponential
from adregnet_jax.ops.filters import box_mean
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.jacobian import jacobian_determinant, least_determinant
from adregnet_jax.ops.mind import mind_ssc
from adregnet_jax.ops.resampling import resize_displacement
from adregnet_jax.ops.sampling import Padding, warp
from adregnet_jax.ops.search import search_displacement
from adregnet_jax.registration import ladder
from adregnet_jax.registration.results import Registration

SEARCH_POOLING = 2  # least number of voxels of the coarsest level per voxel of the search
SEARCH_RADIUS = 6  # most voxels of the search: its memory grows with the cube
LOGARITHM_STEPS = 8
ADAM_EPSILON = 1e-2  # keeps control points with far smaller gradients from following noise
MIN_SHAPE = (2, 2, 2)  # grid of a displacement that is zero everywhere
# Of one level: "fixed", "moving" and masks, [b, x, y, z, c], and "to_moving" where the moving scan has a grid
# of its own: [b, 3, 4], from fixed to moving voxels of the level.
Features = dict[str, jax.Array]
Shape = tuple[int, int, int]


class _Plan(NamedTuple):
    """What the settings, the size and the spacing of the scans require of the program."""

    factors: tuple[Shape, ...]  # voxels along each axis of the scan that a voxel of each level spans
    multiple: Shape  # of which the scan's size must be one
    moving_factors: tuple[Shape, ...]  # likewise of the moving scan
    moving_multiple: Shape
    pooling: int  # voxels of the coarsest level that one voxel of the search spans, along each axis
    radius: Shape  # of the search, in its voxels


class MovingGrid(NamedTuple):
    """The grid of a moving scan that isn't the fixed one."""

    matrix: Float[np.ndarray, "4 4"]  # from voxels of the fixed scan to voxels of the moving scan
    spacing_mm: Sequence[float]  # as the fixed scan's


class _Weights(NamedTuple):
    """Weights of the terms of the energy that need no program of their own."""

    similarity: jax.Array | float  # share of the voxels that aren't padding: it is a mean over the others
    smoothness: jax.Array | float


LEAST_DETERMINANT = 0.05  # by central differences; below it, a fold is near
LEAST_TETRAHEDRON = 0.01  # of the determinants of tetrahedra, which see folds between voxels
UNFOLDING_ROUNDS = 50
TOLERANCE_STEPS = 10  # between two checks of whether a pair can stop early


def align(
    fixed: Float[AnyArray, "b x y z 1"],
    moving: Float[AnyArray, "b x y z 1"],
    *,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    start: Float[AnyArray, "b x y z 3"] | None = None,
    fixed_mask: Shaped[AnyArray, "b x y z 1"] | None = None,
    moving_mask: Shaped[AnyArray, "b x y z 1"] | None = None,
    config: InstanceConfig = InstanceConfig(),  # noqa: B008 -- frozen in use: nothing here changes it
) -> Registration:
    """Registers moving images to fixed images by their intensities alone, without a network.

    Pure: it works under `jit` (with `spacing_mm` and `config` closed over), `vmap` and, if `config.tolerance`
    is 0, `grad`.

    Args:
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      spacing_mm: voxel size along each axis.
      start: [b, x, y, z, 3] in voxels, for instance a network's displacement. Without it, motions of up to
        `config.search_range_mm` are searched for.
      fixed_mask: [b, x, y, z, 1], 0 where the fixed images don't count.
      moving_mask: [b, x, y, z, 1], 0 where the moving images don't count.
      config: levels, similarity and regularisation.

    Returns:
      A `Registration` without pyramid and match_entropy; with an inverse if `config.diffeomorphic`.

    Raises:
      ValueError: inconsistent shapes or settings.

    Examples:
      >>> config = instance_preset("default", "same")
      >>> aligned = jax.jit(functools.partial(align, spacing_mm=(1, 1, 2.5), config=config))(fixed, moving)
    """
    _check(fixed, moving, spacing_mm, start, (fixed_mask, moving_mask), config)
    return _aligned(
        fixed,
        moving,
        start,
        fixed_mask,
        moving_mask,
        np.asarray(spacing_mm),
        config.smoothness,
        plan=_plan(fixed.shape[1:4], spacing_mm, config),
        config=config,
    )


def align_on_rungs(
    fixed: Float[np.ndarray, "x y z"],
    moving: Float[np.ndarray, "x2 y2 z2"],
    *,
    spacing_mm: Sequence[float],
    start: Float[np.ndarray, "x y z 3"] | None,
    fixed_mask: Shaped[np.ndarray, "x y z"] | None,
    moving_mask: Shaped[np.ndarray, "x2 y2 z2"] | None,
    config: InstanceConfig,
    to_moving: MovingGrid | None = None,
) -> tuple[Float[np.ndarray, "x y z 3"], Float[np.ndarray, "x y z 3"] | None]:
    """`align` for one pair, compiled once for all sizes on the same rungs (`registration.ladder`).

    Spacings and smoothness need no program of their own either, unless levels and search take other numbers
    of voxels.

    Args:
      fixed: [x, y, z], intensities in [0, 1].
      moving: [x, y, z], or [x2, y2, z2] with `to_moving`.
      spacing_mm: voxel size of the fixed scan along each axis.
      start: [x, y, z, 3] in voxels of the fixed scan, or None.
      fixed_mask: [x, y, z], 0 where the fixed scan doesn't count, or None.
      moving_mask: on the moving grid, likewise. With `to_moving`, nothing beyond the grid counts either, but
        without a mask its outermost voxels repeat.
      config: as for `align`.
      to_moving: the grid of the moving scan; None: that of the fixed one. On its own grid a scan is
        interpolated once; one that was resampled before would be blurred anew by each displacement.

    Returns:
      Displacement and inverse (None unless `config.diffeomorphic`) in voxels of the fixed scan: the moving
      voxel of p is `to_moving.matrix` times p + u(p).
    """
    if to_moving is not None and (config.similarity == "mind" or config.symmetric):
        raise ValueError("MIND and symmetric comparison need both scans on one grid")
    # Beyond the scan, a mask on its own grid is 0.
    outside = "border" if to_moving is None else "zeros"
    padded_mask = None if moving_mask is None else ladder.pad(moving_mask, outside=outside)
    arrays = [None if a is None else ladder.pad(a) for a in (fixed, moving, start, fixed_mask)]
    numbers, static = _on_rungs(fixed.shape, spacing_mm, config, to_moving, moving.shape)
    displacement, inverse = _aligned_on_rungs(*arrays, padded_mask, *numbers, **static)
    return (
        ladder.crop(displacement, fixed.shape),
        None if inverse is None else ladder.crop(inverse, fixed.shape),
    )


def compile_on_rungs(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    *,
    started: bool,
    fixed_masked: bool,
    moving_masked: bool,
    config: InstanceConfig,
) -> jax.stages.Compiled:
    """Compiles the program of `align_on_rungs`, into JAX's cache on disk, without running it.

    Args:
      shape: (x, y, z) of both scans.
      spacing_mm: of both scans.
      started: whether there will be a start.
      fixed_masked: whether there will be a mask of the fixed scan.
      moving_masked: whether there will be a mask of the moving scan.
      config: as for `align_on_rungs`.

    Returns:
      The program, which knows its plan of the memory.
    """
    scan = jax.ShapeDtypeStruct(ladder.rungs(shape), jnp.float32)
    start = jax.ShapeDtypeStruct((*scan.shape, 3), jnp.float32) if started else None
    masks = (scan if masked else None for masked in (fixed_masked, moving_masked))
    to_moving = None
    if has_own_grid(config):
        to_moving = MovingGrid(np.eye(4), tuple(spacing_mm))
    numbers, static = _on_rungs(shape, spacing_mm, config, to_moving, shape)
    return _aligned_on_rungs.lower(scan, scan, start, *masks, *numbers, **static).compile()


def has_own_grid(config: InstanceConfig) -> bool:
    """Whether the moving scan may keep its grid, which MIND and a symmetric comparison don't allow."""
    return config.similarity != "mind" and not config.symmetric


def _on_rungs(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    config: InstanceConfig,
    to_moving: MovingGrid | None,
    moving_shape: Sequence[int],
) -> tuple[tuple[np.ndarray | None, ...], dict[str, Any]]:
    """The last arguments of `_aligned_on_rungs`: numbers, and what it is compiled for."""
    plan = _plan(ladder.rungs(shape), spacing_mm, config, to_moving and to_moving.spacing_mm)
    # What `align` would pad the scans to. Only this counts in the regularisation.
    size = [-(-n // m) * m for n, m in zip(shape, plan.multiple, strict=True)]
    numbers = (
        np.array(shape, np.int32),
        *(np.array(number, np.float32) for number in (spacing_mm, math.prod(size), config.smoothness)),
        None if to_moving is None else np.asarray(to_moving.matrix, np.float32)[:3],
    )
    # Whether there is a search and a regularisation: how much is in the plan and in the numbers.
    compiled = dataclasses.replace(
        config, search_range_mm=float(config.search_range_mm > 0), smoothness=float(config.smoothness > 0)
    )
    return numbers, {"plan": plan, "config": compiled}


@functools.partial(jax.jit, static_argnames=("plan", "config"))
def _aligned_on_rungs(
    fixed: jax.Array,
    moving: jax.Array,
    start: jax.Array | None,
    fixed_mask: jax.Array | None,
    moving_mask: jax.Array | None,
    shape: jax.Array,
    spacing_mm: jax.Array,
    voxels: jax.Array,
    smoothness: jax.Array,
    to_moving: jax.Array | None,
    *,
    plan: _Plan,
    config: InstanceConfig,
) -> tuple[jax.Array, jax.Array | None]:
    """Displacement and inverse [x, y, z, 3], without the warped image, which isn't needed."""
    scan = functools.reduce(
        jnp.logical_and,
        (index < size for index, size in zip(jnp.indices(fixed.shape, sparse=True), shape, strict=True)),
    )

    def batch(values: jax.Array | None) -> jax.Array | None:
        return None if values is None else values[None, ..., None]

    found = _aligned(
        fixed[None, ..., None],
        moving[None, ..., None],
        None if start is None else start[None],
        batch(fixed_mask),
        batch(moving_mask),
        spacing_mm,
        smoothness,
        plan=plan,
        config=config,
        scan=batch(scan.astype(fixed.dtype)),
        voxels=voxels,
        to_moving=to_moving,
    )
    return found.displacement[0], None if found.inverse is None else found.inverse[0]


def _aligned(
    fixed: AnyArray,
    moving: AnyArray,
    start: AnyArray | None,
    fixed_mask: AnyArray | None,
    moving_mask: AnyArray | None,
    spacing_mm: AnyArray,
    smoothness: jax.Array | float,
    *,
    plan: _Plan,
    config: InstanceConfig,
    scan: jax.Array | None = None,
    voxels: jax.Array | None = None,
    to_moving: jax.Array | None = None,
) -> Registration:
    """`align` with arguments that fit.

    With `scan` [1, x, y, z, 1], 0 in padding, which repeats the borders of images and masks, and `voxels`,
    the number of those that count in the regularisation. With `to_moving` [3, 4], the moving scan has a grid
    of its own.
    """
    shape = fixed.shape[1:4]

    def padding(volume: AnyArray, multiple: Shape) -> list[tuple[int, int]]:
        missing = [(0, -n % m) for n, m in zip(volume.shape[1:4], multiple, strict=True)]
        return [(0, 0), *missing, (0, 0)]

    # Padding doesn't count; images and start repeat their edges into it.
    inside = jnp.ones_like(fixed) if fixed_mask is None else (fixed_mask > 0).astype(fixed.dtype)
    around, around_moving = padding(fixed, plan.multiple), padding(moving, plan.moving_multiple)
    fixed_scans = {
        "fixed": jnp.pad(fixed, around, mode="edge"),
        "fixed_mask": jnp.pad(inside, around),
    }
    moving_scans = {"moving": jnp.pad(moving, around_moving, mode="edge")}
    if moving_mask is not None:
        moving_scans["moving_mask"] = jnp.pad((moving_mask > 0).astype(fixed.dtype), around_moving)
    if start is not None:
        start = jnp.pad(start, around, mode="edge")

    def levels_of_both() -> list[Features]:
        levels = []
        for factor, moving_factor in zip(plan.factors, plan.moving_factors, strict=True):
            level = {name: _pooled(scan, factor) for name, scan in fixed_scans.items()}
            if to_moving is None:
                level |= {name: _pooled(scan, factor) for name, scan in moving_scans.items()}
            else:
                level |= {name: _overlapping(scan, moving_factor) for name, scan in moving_scans.items()}
                between = _between_levels(to_moving, factor, moving_factor)
                level["to_moving"] = jnp.broadcast_to(between, (len(fixed), 3, 4))
            levels.append(level)
        return levels

    levels = levels_of_both()
    if start is None:
        masked = not (fixed_mask is None and moving_mask is None)
        start = _searched(levels[0], plan, config, masked=masked)
    share: jax.Array | float = 1.0
    if scan is not None and voxels is not None:
        # Only from here on: the search would take displacements of what doesn't count from the others.
        fixed_scans["fixed_mask"] = jnp.pad(inside * scan, around)
        if moving_mask is not None and to_moving is None:
            moving_scans["moving_mask"] *= jnp.pad(scan, around)
        levels = levels_of_both()
        # The similarity is a mean over what counts, the regularisation one over all voxels.
        share = voxels / math.prod(fixed_scans["fixed"].shape[1:4])
    method = _diffeomorphism if config.diffeomorphic else _small_deformation
    spacings_mm = [spacing_mm * np.array(factor) for factor in plan.factors]
    displacement, inverse = method(levels, start, spacings_mm, _Weights(share, smoothness), config)
    crop = (slice(None), *(slice(0, n) for n in shape))

    def finest(field: jax.Array) -> jax.Array:
        return resize_displacement(field, fixed_scans["fixed"].shape[1:4])[crop]

    displacement = finest(displacement)
    if config.unfold and not config.diffeomorphic:  # which has no folds, and an inverse to agree with
        displacement = _unfolded(displacement)
    whole = {} if to_moving is None else {"to_moving": to_moving[None]}
    return Registration(
        displacement,
        _pulled_back(moving, displacement, whole),
        inverse=None if inverse is None else finest(inverse),
    )


def _small_deformation(
    levels: list[Features],
    start: jax.Array,
    spacings_mm: list[AnyArray],
    weights: _Weights,
    config: InstanceConfig,
) -> tuple[jax.Array, None]:
    """The sum of the start, which keeps its detail, and the interpolated control points of every level."""
    correction = jnp.zeros((len(start), *MIN_SHAPE, 3))
    for level, spacing_mm, steps, stride in zip(
        levels, spacings_mm, config.steps, config.strides, strict=True
    ):
        shape = level["fixed"].shape[1:4]
        correction = resize_displacement(correction, shape)
        before = resize_displacement(start, shape) + correction

        control = jnp.zeros((len(start), *_control_shape(shape, stride), 3))
        control = _minimise(_displaced, control, before, level, spacing_mm, weights, steps, config)
        correction = correction + resize_displacement(control, shape)
    finest = np.maximum(start.shape[1:4], correction.shape[1:4]).tolist()
    return resize_displacement(start, finest) + resize_displacement(correction, finest), None


def _diffeomorphism(
    levels: list[Features],
    start: jax.Array,
    spacings_mm: list[AnyArray],
    weights: _Weights,
    config: InstanceConfig,
) -> tuple[jax.Array, jax.Array]:
    """The flow of a stationary velocity given at control points, and its inverse."""
    velocity = _logarithm(
        resize_displacement(start, _control_shape(levels[0]["fixed"].shape[1:4], config.strides[0]))
    )
    for level, spacing_mm, steps, stride in zip(
        levels, spacings_mm, config.steps, config.strides, strict=True
    ):
        shape = level["fixed"].shape[1:4]

        velocity = resize_displacement(velocity, _control_shape(shape, stride))
        velocity = _minimise(_flowed, velocity, None, level, spacing_mm, weights, steps, config)
    # The inverse of a flow on voxels, which the flow on control points, interpolated, would lack.
    velocity = resize_displacement(box_mean(velocity, 3), levels[-1]["fixed"].shape[1:4])
    return exponential(velocity), exponential(-velocity)


def _displaced(control: jax.Array, before: jax.Array, shape: Shape) -> tuple[jax.Array, None]:
    return before + resize_displacement(control, shape), None


def _flowed(velocity: jax.Array, _: None, shape: Shape) -> tuple[jax.Array, jax.Array]:
    forth, back = (resize_displacement(_flow(sign * velocity), shape) for sign in (1, -1))
    return forth, back


def _flow(velocity: jax.Array) -> jax.Array:
    # Smoothed, so that neighbouring control points can't pass each other between two squarings.
    return exponential(box_mean(velocity, 3))


def _minimise(
    fields_of: Callable[..., tuple[jax.Array, jax.Array | None]],
    control: jax.Array,
    before: jax.Array | None,
    level: Features,
    spacing_mm: AnyArray,
    weights: _Weights,
    steps: int,
    config: InstanceConfig,
) -> jax.Array:
    """The control points [b, ...] after Adam; each pair is optimised, and stopped, on its own."""
    optimiser = optax.adam(config.learning_rate, eps=ADAM_EPSILON)
    points = math.prod(control.shape[1:4])
    features = {
        name: mind_ssc(scan) if config.similarity == "mind" and "mask" not in name else scan
        for name, scan in level.items()
    }

    def one_pair(control: jax.Array, before: jax.Array | None, features: Features) -> jax.Array:
        features = {name: scan[None] for name, scan in features.items()}
        before = None if before is None else before[None]

        def loss(control: jax.Array) -> jax.Array:
            forth, back = fields_of(control[None], before, features["fixed"].shape[1:4])
            # Times the points, so that the gradient of one of them doesn't shrink with their number.
            back = back if config.symmetric else None
            return points * _energy(forth, back, features, spacing_mm, weights, config)

        def step(state: Any, _: None) -> tuple[Any, jax.Array]:
            control, moments = state
            value, gradient = jax.value_and_grad(loss)(control)
            updates, moments = optimiser.update(gradient, moments)
            return (optax.apply_updates(control, updates), moments), value

        state = (control, optimiser.init(control))
        if not config.tolerance:
            return jax.lax.scan(step, state, length=steps)[0][0]

        def unfinished(carry: Any) -> jax.Array:
            _, _, improves, done = carry
            return improves & (done < steps)

        def some_steps(carry: Any) -> Any:
            state, last, _, done = carry
            state, values = jax.lax.scan(step, state, length=min(TOLERANCE_STEPS, steps))
            improves = last - values[-1] > config.tolerance * jnp.abs(values[-1])
            return state, values[-1], improves, done + TOLERANCE_STEPS

        start = (state, jnp.inf, True, 0)
        return jax.lax.while_loop(unfinished, some_steps, start)[0][0]

    return jax.vmap(one_pair)(control, before, features)


def _energy(
    forth: jax.Array,
    back: jax.Array | None,
    features: Features,
    spacing_mm: AnyArray,
    weights: _Weights,
    config: InstanceConfig,
) -> jax.Array:
    """The minimised energy: dissimilarity and regularisation."""
    grids = {name: matrix for name, matrix in features.items() if name == "to_moving"}
    similarity = functools.partial(_dissimilarity, config=config)
    fixed, moving = features["fixed"], features["moving"]
    fixed_mask, moving_mask = features["fixed_mask"], features.get("moving_mask")
    total = similarity(fixed, moving, forth, fixed_mask, moving_mask, grids)
    if back is not None:
        inside = jnp.ones_like(fixed_mask) if moving_mask is None else moving_mask
        total = (total + similarity(moving, fixed, back, inside, fixed_mask, {})) / 2
    total = weights.similarity * total
    spacings_mm = jnp.asarray(spacing_mm, forth.dtype)[None]
    if config.smoothness:
        total += weights.smoothness * smoothness_loss(forth, spacings_mm)
    if config.bending:
        total += config.bending * bending_energy_loss(forth, spacings_mm)
    if config.jacobian:
        total += config.jacobian * jacobian_loss(forth, least=config.least_jacobian)
    return total


def _dissimilarity(
    still: jax.Array,
    moving: jax.Array,
    displacement: jax.Array,
    still_mask: jax.Array,
    moving_mask: jax.Array | None,
    grids: Features,
    *,
    config: InstanceConfig,
) -> jax.Array:
    warped = _pulled_back(moving, displacement, grids)
    mask = still_mask
    if moving_mask is not None:
        # Nothing beyond a grid of the moving scan's own counts.
        padding: Padding = "zeros" if grids else "border"
        there = _pulled_back(moving_mask, jax.lax.stop_gradient(displacement), grids, padding=padding)
        mask = mask * (there > 0.5)
    if config.similarity == "ncc":
        return ncc_loss(still, warped, window=config.ncc_window, floor=config.ncc_floor, mask=mask)
    if config.similarity == "mi":
        return mutual_information_loss(still, warped, mask=mask)
    return ssd_loss(still, warped, mask=mask)


def _pulled_back(
    scan: AnyArray, displacement: jax.Array, grids: Features, *, padding: Padding = "border"
) -> jax.Array:
    """[b, x, y, z, c]: the moving scan, which has a grid of its own if `grids` has "to_moving"."""
    if "to_moving" in grids:
        fixed = identity_grid(displacement.shape[1:4])
        there = fixed + displacement
        matrix = grids["to_moving"]
        points = jnp.einsum("bij,bxyzj->bxyzi", matrix[..., :3], there, precision="highest")
        displacement = points + matrix[:, None, None, None, :, 3] - fixed
    return warp(scan, displacement, padding=padding)


def _between_levels(to_moving: jax.Array, factor: Shape, moving_factor: Shape) -> jax.Array:
    """[3, 4], from `_pooled` voxels of the fixed scan to `_overlapping` ones of the moving scan."""
    forth, back = np.array(factor, np.float32), np.array(moving_factor, np.float32)
    stride = np.array(_strides(moving_factor), np.float32)
    linear, offset = to_moving[:, :3], to_moving[:, 3]
    offset = (linear @ ((forth - 1) / 2) + offset - (back - 1) / 2) / stride
    return jnp.concatenate([linear * forth / stride[:, None], offset[:, None]], axis=1)


def _plan(
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    config: InstanceConfig,
    moving_spacing_mm: Sequence[float] | None = None,
) -> _Plan:
    factors = tuple(axis_factors(factor, spacing_mm) for factor in config.factors)
    finest_mm = min(np.multiply(spacing_mm, factors[0]))
    pooling = max(SEARCH_POOLING, math.ceil(config.search_range_mm / SEARCH_RADIUS / finest_mm))
    searched = [pooling * factor for factor in factors[0]]
    x, y, z = (math.lcm(*column) for column in zip(*factors, searched, strict=True))
    grid = [-(-n // m) * m // f for n, m, f in zip(shape, (x, y, z), searched, strict=True)]
    # No further than the grid reaches.
    radius = np.minimum(
        np.ceil(config.search_range_mm / np.multiply(spacing_mm, searched)), np.array(grid) - 1
    )
    rx, ry, rz = radius.astype(int).tolist()
    if moving_spacing_mm is None:
        return _Plan(factors, (x, y, z), factors, (x, y, z), pooling, (rx, ry, rz))
    # Voxels of a level as large as those of the fixed scan.
    width_mm = [min(np.multiply(spacing_mm, factor)) for factor in factors]
    own = tuple(axis_factors(width / min(moving_spacing_mm), moving_spacing_mm) for width in width_mm)
    u, v, w = (math.lcm(*column) for column in zip(*map(_strides, own), strict=True))
    return _Plan(factors, (x, y, z), own, (u, v, w), pooling, (rx, ry, rz))


def _searched(level: Features, plan: _Plan, config: InstanceConfig, *, masked: bool) -> jax.Array:
    """The start: the displacement of the discrete search on its own grid, or zeros without a search."""
    if not config.search_range_mm:
        return jnp.zeros((len(level["fixed"]), *MIN_SHAPE, 3))
    if "to_moving" in level:
        still = jnp.zeros((*level["fixed"].shape[:4], 3))
        paddings: dict[str, Padding] = {"moving": "border", "moving_mask": "zeros"}
        level = level | {
            name: _pulled_back(level[name], still, level, padding=padding)
            for name, padding in paddings.items()
            if name in level
        }
    pooling = (plan.pooling,) * 3
    fixed, moving = (_pooled(mind_ssc(level[name]), pooling) for name in ("fixed", "moving"))
    masks = {}
    if masked:
        names = [name for name in ("fixed_mask", "moving_mask") if name in level]
        masks = {name: _pooled(level[name], pooling) for name in names}
    # Without the barrier the features are made again and again.
    fixed, moving = jax.lax.optimization_barrier((fixed, moving))
    return jax.lax.stop_gradient(search_displacement(fixed, moving, plan.radius, **masks))


def _unfolded(displacement: jax.Array) -> jax.Array:
    """The displacement, smoothed where it folds, over a wider region with every round, until it doesn't.

    Its gradient is that of the identity, which it is where nothing folds. What central differences see comes
    first, since they are cheap; then the folds that they miss, between voxels.
    """

    def central(displacement: jax.Array) -> jax.Array:
        return jacobian_determinant(displacement)[..., None] < LEAST_DETERMINANT

    def by_tetrahedra(displacement: jax.Array) -> jax.Array:
        return central(displacement) | (least_determinant(displacement)[..., None] < LEAST_TETRAHEDRON)

    still = jax.lax.stop_gradient(displacement)
    found = _smoothed_where(_smoothed_where(still, central), by_tetrahedra)
    return displacement + jax.lax.stop_gradient(found - still)


def _smoothed_where(displacement: jax.Array, folds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The displacement, smoothed near what folds, [b, x, y, z, 1], until nothing does."""

    def unfinished(carry: Any) -> jax.Array:
        _, folded, rounds = carry
        return jnp.any(folded) & (rounds < UNFOLDING_ROUNDS)

    def smooth(carry: Any) -> Any:
        displacement, folded, rounds = carry
        share = box_mean(box_mean(folded.astype(displacement.dtype), 3), 3)
        near = jnp.minimum(1, 4 * share)  # fades out, where a hard edge would fold anew
        displacement = displacement + near * (box_mean(displacement, 3) - displacement)
        return displacement, folds(displacement), rounds + 1

    return jax.lax.while_loop(unfinished, smooth, (displacement, folds(displacement), 0))[0]


def _logarithm(displacement: jax.Array) -> jax.Array:
    """A velocity whose flow is near the displacement, found by adding the difference repeatedly."""

    def correct(velocity: jax.Array, _: None) -> tuple[jax.Array, None]:
        return velocity + displacement - _flow(velocity), None

    return jax.lax.scan(correct, displacement, length=LOGARITHM_STEPS)[0]


def _pooled(scan: jax.Array, factor: Shape) -> jax.Array:
    """[b, x, y, z, c] averaged over blocks of `factor` voxels, which divides the size of the scan."""
    b, c = scan.shape[0], scan.shape[-1]
    split = [size for n, f in zip(scan.shape[1:4], factor, strict=True) for size in (n // f, f)]
    return jnp.mean(scan.reshape(b, *split, c), axis=(2, 4, 6))


def _overlapping(scan: jax.Array, factor: Shape) -> jax.Array:
    """[b, x, y, z, c] averaged over blocks of `factor` voxels, a new one beginning in the middle of the last.

    Interpolation between blocks that only touch would blur them by as much as a block.
    """
    strides = _strides(factor)
    scan = _pooled(scan, strides)
    for axis, (size, stride) in enumerate(zip(factor, strides, strict=True), start=1):
        width = size // stride
        after = [(0, width - 1 if n == axis else 0) for n in range(5)]
        padded = jnp.pad(scan, after, mode="edge")
        parts = [jax.lax.slice_in_dim(padded, n, n + scan.shape[axis], axis=axis) for n in range(width)]
        scan = sum(parts[1:], start=parts[0]) / width
    return scan


def _strides(factor: Shape) -> Shape:
    """Half of each factor, or 1 if it is odd."""
    x, y, z = (1 if size % 2 else size // 2 for size in factor)
    return x, y, z


def axis_factors(factor: float, spacing_mm: Sequence[float]) -> Shape:
    """Voxels along each axis that span `factor` times the finest spacing."""
    x, y, z = (max(1, round(factor * min(spacing_mm) / size)) for size in spacing_mm)
    return x, y, z


def _control_shape(shape: Sequence[int], stride: int) -> Shape:
    x, y, z = (max(2, -(-n // stride)) for n in shape)
    return x, y, z


def _check(
    fixed: AnyArray,
    moving: AnyArray,
    spacing_mm: Sequence[float],
    start: AnyArray | None,
    masks: Sequence[AnyArray | None],
    config: InstanceConfig,
) -> None:
    if fixed.ndim != 5 or fixed.shape[-1] != 1 or moving.shape != fixed.shape:
        raise ValueError(f"images must be [b, x, y, z, 1] on one grid, got {fixed.shape} and {moving.shape}")
    if start is not None and start.shape != (*fixed.shape[:4], 3):
        raise ValueError(f"start must be {(*fixed.shape[:4], 3)}, got {start.shape}")
    for mask in masks:
        if mask is not None and mask.shape != fixed.shape:
            raise ValueError(f"a mask must have the shape of the images, {fixed.shape}, got {mask.shape}")
    if len(spacing_mm) != 3 or not all(size > 0 for size in spacing_mm):
        raise ValueError(f"spacing_mm must be three numbers above 0, got {tuple(spacing_mm)}")
    config.check()
