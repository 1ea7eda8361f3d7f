"""Resampling volumes and displacements between grids of the same field of view."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adregnet_jax.ops.slabs import halo


def resize(volume: jax.Array, shape: Sequence[int], *, axis_name: str | None = None) -> jax.Array:
    """Trilinear resampling with aligned voxel centres, `q = (p + 0.5) * m / n - 0.5`.

    Meant for going up, or down by small factors: there is no smoothing against aliasing.

    Args:
      volume: [b, x, y, z, c].
      shape: (x', y', z') of the result.
      axis_name: see `ops.slabs`.

    Returns:
      [b, x', y', z', c]; the outermost voxels are repeated beyond their centres.
    """
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    # Separable: along each axis a dense product with two non-zeros a row beats a gather, and so does its
    # gradient, which is the transposed product.
    for axis, (n, m) in enumerate(zip(volume.shape[1:4], shape, strict=True), start=1):
        if n != m:
            matrix = _interpolation_matrix(n, m)
            if axis == 1 and axis_name is not None:
                # The voxels of the slab lie within half a voxel of it: one more on each side is enough.
                volume, matrix = halo(volume, 1, 1, axis_name, repeat_border=True), _slab_matrix(n, m)
            matrix = matrix.astype(volume.dtype)
            volume = jnp.moveaxis(jnp.tensordot(matrix, volume, axes=(1, axis), precision="highest"), 0, axis)
    return volume


def resize_displacement(
    displacement: jax.Array, shape: Sequence[int], *, axis_name: str | None = None
) -> jax.Array:
    """A displacement on another grid of the same field of view, in voxels of that grid.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.
      shape: (x', y', z') of the result.
      axis_name: see `ops.slabs`.

    Returns:
      [b, x', y', z', 3] in voxels of the new grid.
    """
    scale = [m / n for n, m in zip(displacement.shape[1:4], shape, strict=True)]
    return resize(displacement, shape, axis_name=axis_name) * jnp.array(scale, displacement.dtype)


def _interpolation_matrix(n: int, m: int) -> jax.Array:
    """[m, n]: row p holds the linear weights of the n voxels at the p-th of the m new centres."""
    position = jnp.clip((jnp.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(n)[None, :]))


def _slab_matrix(n: int, m: int) -> jax.Array:
    """[m, n + 2]: as `_interpolation_matrix`, for a slab of n voxels with one more on each side."""
    position = (jnp.arange(m) + 0.5) * n / m - 0.5
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(-1, n + 1)[None, :]))
