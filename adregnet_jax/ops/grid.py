"""The coordinate law of the package, stated once.

1. Arrays keep the index order of the file: axes 0, 1, 2 are the NIfTI (i, j, k). A volume is
   `[b, x, y, z, c]`, a displacement `[b, x, y, z, 3]`, points are `[b, n, 3]`.
2. A displacement `u` lives on the fixed grid, component k moves along array axis k, and its unit is the voxel
   of the grid it lives on. Images are pulled back: `warped(p) = moving(p + u(p))`.
3. Between grids of n and m voxels, voxel centres are aligned: `q = (p + 0.5) * m / n - 0.5`.
4. Points travel against images: a fixed landmark `p` lies at `p + u(p)` in the moving image.
5. `warp(warp(m, a), b) = warp(m, compose(a, b))` away from the borders.
6. Millimetres appear only at the edges of the package, in names that end in `_mm`.
7. The Jacobian of the map is that of `p + u(p)`: `det(I + du/dp)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from adregnet_jax.ops.slabs import slab_start

BETWEEN = (-3 / 8, 1 / 8, -1 / 8, 3 / 8)  # voxels


def identity_grid(shape: Sequence[int], *, dtype: jnp.dtype | type = jnp.float32) -> Num[Array, "x y z 3"]:
    """Voxel coordinates of every voxel.

    Args:
      shape: (x, y, z) of the grid.
      dtype: of the coordinates.

    Returns:
      [x, y, z, 3]; `grid[i, j, k] == (i, j, k)`, of a slab its place in the whole volume.

    Examples:
      >>> identity_grid((4, 5, 6))[1, 2, 3].tolist()
      [1.0, 2.0, 3.0]
    """
    axes = [jnp.arange(n, dtype=dtype) for n in shape]
    axes[0] = axes[0] + slab_start(shape[0])
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def between_voxels(shape: Sequence[int]) -> Num[Array, "x y z 3"]:
    """Displacements from the voxels to points between them, at the same mix of distances under any map.

    Interpolation smooths, most of all midway between voxels. A noisy scan therefore seems more like another
    wherever a map leads the voxels of one grid between those of the other. Compared at these points, where
    both are interpolated, the scans gain nothing by that.

    Args:
      shape: (x, y, z) of the grid.

    Returns:
      [x, y, z, 3], of the numbers in `BETWEEN`, in turn along each axis.
    """
    axes = [jnp.asarray(np.resize(BETWEEN, n), jnp.float32) for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)
