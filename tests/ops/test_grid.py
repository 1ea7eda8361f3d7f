import itertools

import jax.numpy as jnp
import numpy as np

from adregnet_jax.ops.grid import between_voxels, identity_grid


def test_every_voxel_holds_its_index():
    grid = np.asarray(identity_grid((2, 3, 4)))
    assert grid.shape == (2, 3, 4, 3)
    for position in itertools.product(range(2), range(3), range(4)):
        assert tuple(grid[position]) == position


def test_dtype_is_the_one_asked_for():
    assert identity_grid((1, 2, 3)).dtype == jnp.float32
    assert identity_grid((1, 2, 3), dtype=jnp.int32).dtype == jnp.int32


def test_points_between_voxels_smooth_alike_under_any_shift():
    """Linear interpolation leaves 2/3 of the variance of noise along each axis, in the mean over all shifts.

    At the voxels, it would be everything without a shift, and an eighth midway between them.
    """
    points = np.asarray(between_voxels((8, 4, 4)))
    for shift in np.linspace(0, 1, 9):
        fraction = (points + shift) % 1
        left = np.prod(fraction**2 + (1 - fraction) ** 2, axis=-1).mean()
        np.testing.assert_allclose(left, (2 / 3) ** 3, rtol=0.1)
