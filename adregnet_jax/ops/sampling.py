"""Sampling a volume at real-valued voxel coordinates: `sample`, `warp`, `sample_at_points`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from adregnet_jax.ops.grid import identity_grid

Mode = Literal["linear", "nearest"]
Padding = Literal["border", "zeros"]


def sample(
    volume: jax.Array, coordinates: jax.Array, *, mode: Mode = "linear", padding: Padding = "border"
) -> jax.Array:
    """Values of one volume at voxel coordinates.

    Args:
      volume: [x, y, z, c].
      coordinates: [..., 3] in voxels; integers are voxel centres.
      mode: "linear" (trilinear, differentiable in both arguments) or "nearest" (for labels; halves round up).
      padding: "border" repeats the outermost voxels; "zeros" takes everything outside the grid as 0, so that
        a linear sample fades out over the last voxel.

    Returns:
      [..., c] in the dtype of the volume.

    Raises:
      ValueError: wrong rank, last axis not 3, an unknown mode or padding, or whole numbers to interpolate.
    """
    if mode == "linear" and not jnp.issubdtype(volume.dtype, jnp.inexact):
        raise ValueError(f"linear interpolation needs floating-point values, got {volume.dtype}")
    if volume.ndim != 4:
        raise ValueError(f"volume must be [x, y, z, c], got shape {volume.shape}")
    if coordinates.shape[-1:] != (3,):
        raise ValueError(f"coordinates must be [..., 3], got shape {coordinates.shape}")
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
    if padding not in ("border", "zeros"):
        raise ValueError(f"padding must be 'border' or 'zeros', got {padding!r}")
    # Coordinates stay float32: bfloat16 can't tell voxel 256 from 257.
    coordinates = coordinates.astype(jnp.float32)
    if mode == "nearest":
        return _sample_nearest(volume, coordinates, padding)
    return _sample_linear(volume, coordinates, padding)


def warp(
    volume: jax.Array, displacement: jax.Array, *, mode: Mode = "linear", padding: Padding = "border"
) -> jax.Array:
    """Pull volumes back through displacements: `warped(p) = volume(p + u(p))` (eq. 1).

    Args:
      volume: [b, x, y, z, c], the moving volumes.
      displacement: [b, x', y', z', 3] in voxels; its grid is that of the result.
      mode: see `sample`.
      padding: see `sample`.

    Returns:
      [b, x', y', z', c].

    Raises:
      ValueError: wrong ranks or batch sizes.
    """
    if displacement.ndim != 5 or displacement.shape[-1] != 3:
        raise ValueError(f"displacement must be [b, x, y, z, 3], got shape {displacement.shape}")
    coordinates = identity_grid(displacement.shape[1:4]) + displacement
    return _sample_batch(volume, coordinates, mode, padding)


def warp_labels(labels: jax.Array, displacement: jax.Array, classes: Sequence[int] | jax.Array) -> jax.Array:
    """Label maps pulled back as images of 0 and 1, one a class, warped trilinearly: the largest one wins.

    One class at a time, so that memory does not grow with their number.

    Args:
      labels: [b, x, y, z, 1], integers.
      displacement: [b, x', y', z', 3] in voxels.
      classes: the labels that take part, background among them; the first one wins a tie.

    Returns:
      [b, x', y', z', 1] in the dtype of the labels.

    Raises:
      ValueError: wrong ranks or batch sizes, or no class.
    """
    if len(classes) == 0:
        raise ValueError("classes is empty: at least one label is needed")

    def compare(best, label):
        score = warp((labels == label).astype(jnp.float32), displacement)
        return (jnp.maximum(score, best[0]), jnp.where(score > best[0], label, best[1])), None

    shape = (*displacement.shape[:-1], 1)
    first = jnp.asarray(classes, labels.dtype)
    start = (jnp.zeros(shape), jnp.full(shape, first[0]))
    return jax.lax.scan(compare, start, first)[0][1]


def sample_at_points(
    volume: jax.Array, points: jax.Array, *, mode: Mode = "linear", padding: Padding = "border"
) -> jax.Array:
    """Values of volumes at points.

    Args:
      volume: [b, x, y, z, c].
      points: [b, n, 3] in voxels.
      mode: see `sample`.
      padding: see `sample`.

    Returns:
      [b, n, c].

    Raises:
      ValueError: wrong ranks or batch sizes.
    """
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"points must be [b, n, 3], got shape {points.shape}")
    return _sample_batch(volume, points, mode, padding)


def _sample_batch(volume, coordinates, mode, padding):
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    if volume.shape[0] != coordinates.shape[0]:
        raise ValueError(f"batch sizes differ: volume {volume.shape[0]}, coordinates {coordinates.shape[0]}")
    return jax.vmap(lambda v, q: sample(v, q, mode=mode, padding=padding))(volume, coordinates)


def _sample_nearest(volume, coordinates, padding):
    index = jnp.floor(coordinates + 0.5).astype(jnp.int32)
    values = _gather(volume, [index[..., k] for k in range(3)])
    if padding == "zeros":
        inside = jnp.all((index >= 0) & (index < jnp.array(volume.shape[:3])), axis=-1)
        values = jnp.where(inside[..., None], values, 0)
    return values


def _sample_linear(volume, coordinates, padding):
    shape = volume.shape[:3]
    margin = 0 if padding == "border" else 1  # a voxel outside, a linear sample has faded to 0
    position = [jnp.clip(coordinates[..., k], -margin, n - 1 + margin) for k, n in enumerate(shape)]
    lower = [jnp.floor(p) for p in position]
    fraction = [(p - low)[..., None].astype(volume.dtype) for p, low in zip(position, lower, strict=True)]
    first = [low.astype(jnp.int32) for low in lower]

    def corner(*step):
        index = [i + s for i, s in zip(first, step, strict=True)]
        value = _gather(volume, index)
        if padding == "border":
            return value
        inside = [(i >= 0) & (i < n) for i, n in zip(index, shape, strict=True)]
        return jnp.where((inside[0] & inside[1] & inside[2])[..., None], value, 0)

    # Along one axis after another: seven products, where the sum over corners of weights takes three times
    # as many, and a gradient in the coordinates that reuses the differences.
    def along(axis, *step):
        if axis == 3:
            return corner(*step)
        near, far = (along(axis + 1, *step, s) for s in (0, 1))
        return near + fraction[axis] * (far - near)

    return along(0)


def _gather(volume, index):
    """volume[i, j, k] by one flat index, which XLA on CPU gathers faster than three.

    Clipping the integers first makes the promise true whatever the coordinates are, NaN included.
    """
    nx, ny, nz, channels = volume.shape
    i, j, k = (jnp.clip(axis, 0, n - 1) for axis, n in zip(index, (nx, ny, nz), strict=True))
    flat = jnp.asarray(volume).reshape(-1, channels)
    return flat.at[(i * ny + j) * nz + k].get(mode="promise_in_bounds")
