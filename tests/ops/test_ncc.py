import functools

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.ops.ncc import local_squared_ncc, ncc_ascent
from adregnet_jax.ops.sampling import warp
from tests.oracles import network as oracle
from tests.slabs import check_slabs

RNG = np.random.default_rng(0)
FIXED, MOVING = (RNG.random((1, 8, 6, 7, 1), np.float32) - 0.5 for _ in range(2))
DISPLACEMENT = RNG.uniform(-1.5, 1.5, (1, 8, 6, 7, 3)).astype(np.float32)
ASCENT = jax.jit(functools.partial(ncc_ascent, window=5))


def test_the_ascent_equals_the_derivative_of_the_oracle():
    fixed, moving, displacement = (v[0].astype(np.float64) for v in (FIXED, MOVING, DISPLACEMENT))
    expected = oracle.ascent(fixed, moving, displacement, 5)
    assert np.abs(expected).mean() > 0.05
    # The oracle's own differences have an error of 1e-6.
    np.testing.assert_allclose(ASCENT(FIXED, MOVING, DISPLACEMENT)[0], expected, atol=1e-5)


def test_a_small_step_along_the_ascent_makes_the_images_more_alike():
    def similarity(displacement):
        return jnp.sum(local_squared_ncc(FIXED[..., 0], warp(MOVING, displacement)[..., 0], 5))

    ascent = ASCENT(FIXED, MOVING, DISPLACEMENT)
    gain = similarity(DISPLACEMENT + 1e-3 * ascent) - similarity(DISPLACEMENT)
    # As much as a gradient says, but for its change on the way: curvature, and cells that a voxel leaves.
    np.testing.assert_allclose(gain, 1e-3 * jnp.sum(ascent**2), rtol=0.1)


def test_the_ascent_is_blind_to_gain_and_offset():
    ascent = ASCENT(FIXED, MOVING, DISPLACEMENT)
    np.testing.assert_allclose(ASCENT(2 * FIXED + 0.1, 3 * MOVING - 0.2, DISPLACEMENT), ascent, atol=1e-3)


def test_constant_images_have_no_ascent():
    flat = np.zeros_like(FIXED)
    for fixed, moving in ((flat, MOVING), (FIXED, flat), (flat, flat)):
        np.testing.assert_array_equal(ASCENT(fixed, moving, DISPLACEMENT), 0)


def test_slabs():
    function = functools.partial(ncc_ascent, window=5)
    check_slabs(function, 4, FIXED, MOVING, DISPLACEMENT, rtol=1e-4)
