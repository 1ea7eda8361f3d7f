"""Spatial derivatives and the Jacobian determinant of a deformation."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def spatial_gradient(volume: jax.Array, *, spacing: float | Sequence[float] = 1.0) -> jax.Array:
    """Derivatives along the three spatial axes, as `numpy.gradient` takes them.

    Central differences inside, one-sided differences on the outermost voxels.

    Args:
      volume: [b, x, y, z, c], at least two voxels along every axis.
      spacing: distance between voxels, one number or one an axis; 1 gives derivatives by voxel.

    Returns:
      [b, x, y, z, c, 3]; the last axis is the direction of the derivative.

    Raises:
      ValueError: wrong rank, or an axis of a single voxel.
    """
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    return jnp.stack(jnp.gradient(volume, *np.broadcast_to(spacing, 3).tolist(), axis=(1, 2, 3)), axis=-1)


def jacobian_determinant(displacement: jax.Array) -> jax.Array:
    """Determinant of the Jacobian of the map `p + u(p)`: `det(I + du/dp)`.

    1 is no change of volume, 0 or less is a fold. The paper writes det(grad Phi), without the identity: the
    determinant of a registration at rest would be 0. Differences are those of `spatial_gradient`: central
    ones don't see a fold that alternates from voxel to voxel.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.

    Returns:
      [b, x, y, z].

    Raises:
      ValueError: wrong shape, or an axis of a single voxel.
    """
    if displacement.ndim != 5 or displacement.shape[-1] != 3:
        raise ValueError(f"displacement must be [b, x, y, z, 3], got shape {displacement.shape}")
    # Nine arrays and the closed formula: a [b, x, y, z, 3, 3] array is never made.
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (
        jnp.gradient(displacement[..., k], axis=(1, 2, 3)) for k in range(3)
    )
    xx, yy, zz = 1 + xx, 1 + yy, 1 + zz
    return xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)
