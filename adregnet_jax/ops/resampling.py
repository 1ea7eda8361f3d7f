"""Resampling volumes and displacements between grids of the same field of view."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.ops.slabs import halo, slab_count


def resize(volume: Float[AnyArray, "b x y z c"], shape: Sequence[int]) -> Float[Array, "b x2 y2 z2 c"]:
    """Trilinear resampling with aligned voxel centres, `q = (p + 0.5) * m / n - 0.5`.

    Meant for going up, or down by small factors: there is no smoothing against aliasing.

    Args:
      volume: [b, x, y, z, c].
      shape: (x', y', z') of the result.

    Returns:
      [b, x', y', z', c]; the outermost voxels are repeated beyond their centres.

    Examples:
      >>> resize(jnp.arange(2.0).reshape(1, 2, 1, 1, 1), (4, 1, 1)).ravel().tolist()
      [0.0, 0.25, 0.75, 1.0]
    """
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    volume = jnp.asarray(volume)
    for axis, (n, m) in enumerate(zip(volume.shape[1:4], shape, strict=True), start=1):
        if axis == 1 and slab_count() > 1 and n != m:
            # The voxels of the slab lie within half a voxel of it: one more on each side is enough.
            volume = _multiply(_slab_matrix(n, m), halo(volume, 1, 1, repeat_border=True), axis)
        else:
            volume = resize_axis(volume, m, axis=axis)
    return volume


def resize_axis(values: Float[AnyArray, ...], size: int, *, axis: int) -> Float[Array, ...]:
    """Linear resampling with aligned centres along one axis, which slabs don't divide.

    Args:
      values: of any rank.
      size: of the axis in the result.
      axis: along which to resample.

    Returns:
      The values with `size` along `axis`; the outermost ones are repeated beyond their centres.
    """
    n = values.shape[axis]
    if n == size:
        return jnp.asarray(values)
    if size % n == 0 and not traces_for_cpu():
        return _subdivide(jnp.asarray(values), size // n, axis)
    return _multiply(_interpolation_matrix(n, size), values, axis)


def resize_displacement(
    displacement: Float[AnyArray, "b x y z 3"], shape: Sequence[int]
) -> Float[Array, "b x2 y2 z2 3"]:
    """A displacement on another grid of the same field of view, in voxels of that grid.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.
      shape: (x', y', z') of the result.

    Returns:
      [b, x', y', z', 3] in voxels of the new grid.

    Examples:
      >>> resize_displacement(jnp.ones((1, 4, 4, 4, 3)), (8, 4, 2))[0, 0, 0, 0].tolist()
      [2.0, 1.0, 0.5]
    """
    scale = [m / n for n, m in zip(displacement.shape[1:4], shape, strict=True)]
    return resize(displacement, shape) * jnp.array(scale, displacement.dtype)[None, None, None, None]


def _subdivide(values: jax.Array, parts: int, axis: int) -> jax.Array:
    """Linear resampling to `parts` voxels for each one along an axis, without a product of matrices.

    XLA for GPUs makes it a part of what uses the result, and its gradient is a short sum.
    """
    n = values.shape[axis]
    edge = [(1, 1) if k == axis else (0, 0) for k in range(values.ndim)]
    padded = jnp.pad(values, edge, mode="edge")
    before, here, after = (
        jnp.expand_dims(jax.lax.slice_in_dim(padded, k, k + n, axis=axis), axis + 1) for k in range(3)
    )
    place = (np.arange(parts) + 0.5) / parts - 0.5  # of the new centres, in voxels from the old one
    place = np.expand_dims(place, [k for k in range(values.ndim + 1) if k != axis + 1]).astype(values.dtype)
    result = here + np.maximum(-place, 0) * (before - here) + np.maximum(place, 0) * (after - here)
    return result.reshape(*values.shape[:axis], n * parts, *values.shape[axis + 1 :])


def _multiply(matrix: jax.Array, values: AnyArray, axis: int) -> jax.Array:
    """`matrix` times `values` along an axis."""
    # A dense product with two non-zeros a row beats a gather, and so does its gradient, which is the
    # transposed product.
    product = jnp.tensordot(matrix.astype(values.dtype), values, axes=(1, axis), precision="highest")
    return jnp.moveaxis(product, 0, axis)


def _interpolation_matrix(n: int, m: int) -> jax.Array:
    """[m, n]: row p holds the linear weights of the n voxels at the p-th of the m new centres."""
    position = jnp.clip((jnp.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(n)[None, :]))


def _slab_matrix(n: int, m: int) -> jax.Array:
    """[m, n + 2]: as `_interpolation_matrix`, for a slab of n voxels with one more on each side."""
    position = (jnp.arange(m) + 0.5) * n / m - 0.5
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(-1, n + 1)[None, :]))
