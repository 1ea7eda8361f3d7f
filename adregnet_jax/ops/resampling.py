"""Resampling volumes and displacements between grids of the same field of view."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def resize(volume: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Trilinear resampling with aligned voxel centres, `q = (p + 0.5) * m / n - 0.5`.

    Meant for going up, or down by small factors: there is no smoothing against aliasing.

    Args:
      volume: [b, x, y, z, c].
      shape: (x', y', z') of the result.

    Returns:
      [b, x', y', z', c]; the outermost voxels are repeated beyond their centres.
    """
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    # Separable: along each axis a dense product with two non-zeros a row beats a gather, and so does its
    # gradient, which is the transposed product.
    for axis, (n, m) in enumerate(zip(volume.shape[1:4], shape, strict=True), start=1):
        if n != m:
            matrix = _interpolation_matrix(n, m).astype(volume.dtype)
            volume = jnp.moveaxis(jnp.tensordot(matrix, volume, axes=(1, axis), precision="highest"), 0, axis)
    return volume


def resize_displacement(displacement: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A displacement on another grid of the same field of view, in voxels of that grid.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.
      shape: (x', y', z') of the result.

    Returns:
      [b, x', y', z', 3] in voxels of the new grid.
    """
    scale = [m / n for n, m in zip(displacement.shape[1:4], shape, strict=True)]
    return resize(displacement, shape) * jnp.array(scale, displacement.dtype)


def _interpolation_matrix(n: int, m: int) -> jax.Array:
    """[m, n]: row p holds the linear weights of the n voxels at the p-th of the m new centres."""
    position = jnp.clip((jnp.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(n)[None, :]))
