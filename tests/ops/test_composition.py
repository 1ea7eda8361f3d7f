import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.composition import compose
from adregnet_jax.ops.sampling import warp

SHAPE = (18, 19, 20)
INSIDE = (slice(None), *[slice(4, -4)] * 3)


compiled_warp = jax.jit(warp)
compiled_compose = jax.jit(compose)


def grid():
    return np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)


def affine_displacement(seed):
    """Linear about the centre, at most about 2 voxels."""
    matrix = np.random.default_rng(seed).uniform(-0.08, 0.08, (3, 3))
    return (grid() - np.array(SHAPE) / 2) @ matrix.T


def smooth_displacement(seed):
    """Waves of 48 voxels along every axis, at most 2 voxels."""
    phase = np.random.default_rng(seed).uniform(0, 6, (3, 3))
    return (2 / 3) * np.sin(2 * np.pi / 48 * grid()[..., None, :] + phase).sum(axis=-1)


def batch(array):
    return array[None].astype(np.float32)


def test_affine_maps_compose_exactly():
    # Linear interpolation reproduces affine functions: only rounding of numbers of about 20 is left.
    moving = batch((grid() @ np.array([1.0, -0.5, 0.3]))[..., None])
    a, b = batch(affine_displacement(0)), batch(affine_displacement(1))
    twice, once = compiled_warp(compiled_warp(moving, a), b), compiled_warp(moving, compiled_compose(a, b))
    np.testing.assert_allclose(twice[INSIDE], once[INSIDE], atol=2e-5)
    # And it is the composition in this order.
    assert np.abs(twice - compiled_warp(moving, compiled_compose(b, a)))[INSIDE].max() > 0.05


def test_smooth_fields_compose_up_to_interpolation():
    moving = batch(np.sin(2 * np.pi / 48 * grid()).sum(axis=-1, keepdims=True))
    a, b = batch(smooth_displacement(0)), batch(smooth_displacement(1))
    twice, once = compiled_warp(compiled_warp(moving, a), b), compiled_warp(moving, compiled_compose(a, b))
    # Linear interpolation errs by f'' / 8 along each axis: here 3 (2 pi / 48)^2 / 8 = 0.0064, in three
    # interpolations of the image, and somewhat less in that of the field.
    assert np.abs(twice - once)[INSIDE].max() < 4 * 0.0064
    assert np.abs(twice - compiled_warp(moving, compiled_compose(b, a)))[INSIDE].max() > 4 * 0.0064


def test_zero_is_neutral_on_both_sides():
    displacement = batch(smooth_displacement(0))
    zero = np.zeros_like(displacement)
    np.testing.assert_array_equal(compiled_compose(displacement, zero), displacement)
    np.testing.assert_array_equal(compiled_compose(zero, displacement), displacement)


def test_opposite_shifts_cancel():
    shift = np.broadcast_to(np.array([1.5, -2, 0.25], np.float32), (1, 4, 4, 4, 3))
    np.testing.assert_allclose(compose(shift, -shift), np.zeros((1, 4, 4, 4, 3)), atol=1e-6)


@pytest.mark.usefixtures("unchecked_types")
def test_fields_of_two_grids_do_not_compose():
    fields = [jnp.zeros((1, 3, 3, 3, 3)), jnp.zeros((1, 3, 3, 4, 3))]
    for both in (fields, fields[::-1]):
        with pytest.raises(ValueError, match="different grids"):
            compose(*both)
