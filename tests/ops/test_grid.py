import itertools

import jax.numpy as jnp
import numpy as np

from adregnet_jax.ops.grid import identity_grid


def test_every_voxel_holds_its_index():
    grid = np.asarray(identity_grid((2, 3, 4)))
    assert grid.shape == (2, 3, 4, 3)
    for position in itertools.product(range(2), range(3), range(4)):
        assert tuple(grid[position]) == position


def test_dtype_is_the_one_asked_for():
    assert identity_grid((1, 2, 3)).dtype == jnp.float32
    assert identity_grid((1, 2, 3), dtype=jnp.int32).dtype == jnp.int32
