"""Separable filters that treat borders by counting only the voxels inside the volume.

A mean over a window that reaches over the border is the mean over the part of it that lies inside: a constant
volume stays constant, and nothing beyond the border is made up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.slabs import halo, slab_count, slab_start, whole_width

GAUSSIAN_TRUNCATE = 3.5  # half-width of a Gaussian window in SD, as scikit-image cuts it for SSIM


def box_sum(volume: Float[AnyArray, "b x y z c"], width: int) -> Float[Array, "b x y z c"]:
    """Sum over a cube around each voxel; what lies beyond the border counts as 0.

    Three one-dimensional sums: a window of `width**3` voxels costs 3 * `width` additions. Running sums would
    cost less, but lose digits in float32.

    Args:
      volume: [b, x, y, z, c].
      width: of the cube, an odd number of voxels.

    Returns:
      [b, x, y, z, c].

    Raises:
      ValueError: wrong rank or width.
    """
    _check(volume, width)
    if slab_count() > 1 and width > 1:
        radius = width // 2
        return _box_sum(halo(volume, radius, radius), width)[:, radius:-radius]
    return _box_sum(volume, width)


def _box_sum(volume: AnyArray, width: int) -> jax.Array:
    # Without the barrier XLA folds the sums of a volume that is a constant, at minutes of compilation.
    volume = lax.optimization_barrier(jnp.moveaxis(volume, -1, 1))  # [b, c, x, y, z]: z vectorises
    for axis in (2, 3, 4):
        window = [width if k == axis else 1 for k in range(5)]
        volume = lax.reduce_window(volume, 0.0, lax.add, window, [1] * 5, "SAME")
    return jnp.moveaxis(volume, 1, -1)


def box_mean(volume: Float[AnyArray, "b x y z c"], width: int) -> Float[Array, "b x y z c"]:
    """Mean over the voxels inside the volume of a cube around each voxel.

    Args:
      volume: [b, x, y, z, c].
      width: of the cube, an odd number of voxels.

    Returns:
      [b, x, y, z, c].

    Raises:
      ValueError: wrong rank or width.

    Examples:
      >>> box_mean(jnp.array([0.0, 3, 6]).reshape(1, 3, 1, 1, 1), 3).ravel().tolist()
      [1.5, 3.0, 4.5]
    """
    counts = window_counts(volume.shape[1:4], width)
    return box_sum(volume, width) / counts[None, ..., None]


def window_counts(shape: tuple[int, ...], width: int) -> Float[Array, "x y z"]:
    """Counts the voxels inside the volume of the window around each voxel.

    Args:
      shape: (x, y, z) of the volume, or of a slab.
      width: of the window, an odd number of voxels.

    Returns:
      [x, y, z].
    """
    radius = width // 2
    counts = []
    for axis, n in enumerate(shape):
        position, last = jnp.arange(n), n - 1
        if axis == 0:
            position, last = position + slab_start(n), whole_width(n) - 1
        counts.append(jnp.minimum(position + radius, last) - jnp.maximum(position - radius, 0) + 1.0)
    # The counts of a cube are the product of those of its sides.
    x, y, z = jnp.ix_(*counts)
    return x * y * z


def gaussian_filter(
    volume: Float[AnyArray, "b x y z c"], sigma: float, *, width: int | None = None
) -> Float[Array, "b x y z c"]:
    """Gaussian mean over the voxels inside the volume.

    Args:
      volume: [b, x, y, z, c].
      sigma: SD of the Gaussian in voxels.
      width: of the window, an odd number of voxels; by default it reaches 3.5 SD to either side.

    Returns:
      [b, x, y, z, c].

    Raises:
      ValueError: wrong rank or width, or a sigma that is not positive.

    Examples:
      >>> edge = jnp.array([0.0, 0, 1, 1]).reshape(1, 4, 1, 1, 1)
      >>> [round(value, 2) for value in gaussian_filter(edge, 0.5).ravel().tolist()]
      [0.0, 0.11, 0.89, 1.0]
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if width is None:
        width = 2 * int(GAUSSIAN_TRUNCATE * sigma + 0.5) + 1
    _check(volume, width)
    volume = jnp.asarray(volume)
    for axis in (1, 2, 3):
        # A dense product along the axis: its gradient is one more product, where eleven shifted slices
        # cost several times the forward pass.
        source = position = jnp.arange(volume.shape[axis])
        outside: bool | jax.Array = False
        if axis == 1 and slab_count() > 1:
            radius, n = width // 2, volume.shape[1]
            volume = halo(volume, radius, radius)
            source = jnp.arange(-radius, n + radius)
            place = slab_start(n) + source
            outside = ((place < 0) | (place >= whole_width(n)))[None]
        distance = position[:, None] - source[None]  # [n, n], or of a slab [n, before + n + after]
        near = (jnp.abs(distance) <= width // 2) & jnp.logical_not(outside)
        weights = jnp.where(near, jnp.exp(-0.5 * (distance / sigma) ** 2), 0)
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(volume.dtype)
        # TF32, the default of newer GPUs, has too few digits for variances as differences of such means.
        smoothed = jnp.tensordot(weights, volume, axes=(1, axis), precision="highest")
        volume = jnp.moveaxis(smoothed, 0, axis)
    return volume


def _check(volume: AnyArray, width: int) -> None:
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    if width < 1 or width % 2 == 0:
        raise ValueError(f"a window is an odd number of voxels wide, got {width}")
