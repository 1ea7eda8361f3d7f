"""Tiles: they cover, their weights blend without seams, and a network that looks nearby gives the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.nn.tiles import predict_in_tiles, tile_ramp, tile_starts
from adregnet_jax.registration.network import register


class Constant(nn.Module):
    """A displacement that is the mean difference of what it sees: another in each tile."""

    def __call__(self, fixed, moving):
        mean = jnp.mean(fixed - moving, axis=(1, 2, 3), keepdims=True)
        return Prediction(jnp.broadcast_to(mean, (*fixed.shape[:4], 3)), (), ())


class Pointwise(nn.Module):
    def __call__(self, fixed, moving):
        return Prediction((fixed - moving) * jnp.array([[[[[1.0, 2.0, -3.0]]]]]), (), ())


def random_pair(shape):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.random((2, *shape, 1), np.float32)) for _ in range(2)]


@pytest.mark.parametrize(("n", "width"), [(8, 8), (9, 8), (14, 8), (15, 8), (100, 32), (33, 32), (7, 4)])
def test_tiles_cover_the_axis_and_overlap_by_a_quarter(n, width):
    starts = tile_starts(n, width)
    assert starts[0] == 0 and starts[-1] == n - width
    steps = np.diff(starts)
    assert all(0 < step <= width - width // 4 for step in steps)
    assert len(starts) == 1 or -(-(n - width) // (len(starts) - 1)) <= width - width // 4
    assert len(starts) < 3 or (n - width) > (len(starts) - 2) * (width - width // 4)  # not one too many
    assert tile_ramp(width).min() > 0


def test_a_network_that_looks_at_the_voxel_alone_gives_the_same():
    fixed, moving = random_pair((13, 8, 5))
    prediction: Any = Pointwise().apply({}, fixed, moving)
    tiled = jax.jit(lambda *pair: predict_in_tiles(Pointwise(), {}, *pair, tile=6))(fixed, moving)
    np.testing.assert_allclose(tiled, prediction.displacement, atol=1e-6)
    np.testing.assert_array_equal(register({}, fixed, moving, model=Pointwise(), tile=6).displacement, tiled)


def test_tiles_that_disagree_leave_no_seams():
    fixed, moving = jnp.zeros((2, 1, 40, 4, 4, 1))
    fixed = fixed.at[:, 20:].set(1.0)
    tiled = np.asarray(predict_in_tiles(Constant(), {}, fixed, moving, tile=16))[0, :, 0, 0, 0]
    assert tiled[0] == 0 and tiled[-1] == pytest.approx(1)
    # From one tile's value to the next over a quarter of a tile: two tiles differ by 1 at most.
    assert np.abs(np.diff(tiled)).max() < 1.5 / 4


def test_a_tile_has_a_least_width():
    with pytest.raises(ValueError, match="4 voxels"):
        predict_in_tiles(Pointwise(), {}, *random_pair((5, 5, 5)), tile=3)
