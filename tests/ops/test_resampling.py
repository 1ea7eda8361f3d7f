import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from adregnet_jax.ops.resampling import resize, resize_displacement
from adregnet_jax.ops.sampling import warp

compiled_resize = jax.jit(resize, static_argnums=1)
SHAPES = st.tuples(*[st.integers(1, 7)] * 3)


def aligned_centres(new_shape, shape):
    """q = (p + 0.5) * n / m - 0.5 of every voxel p of the new grid, [x, y, z, 3]."""
    axes = [(np.arange(m) + 0.5) * n / m - 0.5 for m, n in zip(new_shape, shape, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


@settings(max_examples=4, deadline=None)
@given(shape=SHAPES, new_shape=SHAPES)
def test_resize_is_scipys_sampling_at_aligned_centres(shape, new_shape):
    volume = np.random.default_rng(0).normal(size=(2, *shape, 2)).astype(np.float32)
    coordinates = np.moveaxis(aligned_centres(new_shape, shape), -1, 0)
    resized = compiled_resize(volume, new_shape)
    for b in range(2):
        for c in range(2):
            expected = scipy.ndimage.map_coordinates(volume[b, ..., c], coordinates, order=1, mode="nearest")
            np.testing.assert_allclose(resized[b, ..., c], expected, atol=1e-5)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("parts", [(2, 3, 1), (5, 1, 4)])
def test_whole_multiples_are_scipys_sampling_and_its_transpose(parts):
    """On accelerators these have a form of their own."""
    rng = np.random.default_rng(0)
    volume = jnp.asarray(rng.normal(size=(1, 3, 1, 4, 2)), jnp.float32)
    new_shape = tuple(n * part for n, part in zip(volume.shape[1:4], parts, strict=True))
    resized, pull_back = jax.vjp(lambda v: resize(v, new_shape), volume)
    coordinates = np.moveaxis(aligned_centres(new_shape, volume.shape[1:4]), -1, 0)
    for c in range(2):
        expected = scipy.ndimage.map_coordinates(volume[0, ..., c], coordinates, order=1, mode="nearest")
        np.testing.assert_allclose(resized[0, ..., c], expected, atol=1e-6)
    # <g, A v> = <A' g, v>
    cotangent = jnp.asarray(rng.normal(size=resized.shape), jnp.float32)
    other = jnp.asarray(rng.normal(size=volume.shape), jnp.float32)
    (transposed,) = pull_back(cotangent)
    expected = np.vdot(cotangent, resize(other, new_shape))
    assert np.vdot(transposed, other) == pytest.approx(expected, rel=1e-4)


def test_same_shape_is_the_identity():
    volume = np.random.default_rng(0).normal(size=(1, 3, 4, 5, 2)).astype(np.float32)
    np.testing.assert_array_equal(resize(volume, (3, 4, 5)), volume)


def test_a_constant_stays_constant():
    volume = np.full((1, 3, 5, 4, 2), 7.0, np.float32)
    # Weights are differences of coordinates in float32.
    np.testing.assert_allclose(resize(volume, (7, 3, 11)), np.full((1, 7, 3, 11, 2), 7.0), rtol=1e-6)


def test_bfloat16_stays_bfloat16():
    assert resize(jnp.ones((1, 2, 3, 4, 1), jnp.bfloat16), (4, 6, 8)).dtype == jnp.bfloat16


def test_magnitudes_scale_with_the_grid():
    displacement = np.broadcast_to(np.array([1, -2, 3], np.float32), (1, 2, 3, 4, 3))
    resized = resize_displacement(displacement, (4, 9, 2))
    np.testing.assert_allclose(resized, np.broadcast_to([2.0, -6.0, 1.5], (1, 4, 9, 2, 3)), rtol=1e-6)


def test_a_linear_map_is_the_same_map_on_the_finer_grid():
    """u(p) = G (p + 1/2 - centre), about the centre of the field of view, which both grids share."""
    gradient = np.random.default_rng(0).normal(size=(3, 3))
    coarse, fine = np.array([4, 5, 6]), np.array([8, 15, 6])
    scale = fine / coarse
    # In coarse voxels at the places of the fine grid, then in fine voxels.
    places = aligned_centres(fine, coarse)
    expected = ((places + 0.5 - coarse / 2) @ gradient.T) * scale
    on_coarse = (aligned_centres(coarse, coarse) + 0.5 - coarse / 2) @ gradient.T
    resized = np.asarray(resize_displacement(on_coarse[None].astype(np.float32), tuple(fine.tolist())))[0]
    # Beyond the centres of the outermost coarse voxels the field is repeated, not continued.
    inside = np.all((places >= 0) & (places <= coarse - 1), axis=-1)
    assert inside.sum() > 100
    np.testing.assert_allclose(resized[inside], expected[inside], atol=1e-5)


def test_resizing_commutes_with_warping_by_a_shift():
    """A shift by one coarse voxel is one by two fine voxels, of the volume's own fine version."""
    volume = np.random.default_rng(0).normal(size=(1, 6, 4, 4, 1)).astype(np.float32)
    shift = np.zeros((1, 6, 4, 4, 3), np.float32)
    shift[..., 0] = 1
    fine = (12, 8, 8)
    warped_then_resized = compiled_resize(warp(volume, shift), fine)
    resized_then_warped = warp(compiled_resize(volume, fine), resize_displacement(shift, fine))
    # The last coarse voxel, two fine ones, and the half voxel around it see the border.
    np.testing.assert_allclose(warped_then_resized[:, 1:-4], resized_then_warped[:, 1:-4], atol=1e-6)


def test_the_gradient_is_the_transposed_product():
    volume = np.random.default_rng(0).normal(size=(1, 3, 4, 2, 1)).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=(1, 5, 2, 4, 1)).astype(np.float32)
    resized, pullback = jax.vjp(lambda v: resize(v, (5, 2, 4)), volume)
    # <R v, g> = <v, R^T g>
    left, right = np.vdot(resized, cotangent), np.vdot(volume, pullback(cotangent)[0])
    np.testing.assert_allclose(left, right, rtol=1e-5)


@pytest.mark.usefixtures("unchecked_types")
def test_resize_rejects_an_unbatched_volume():
    with pytest.raises(ValueError, match=r"\[b, x, y, z, c\]"):
        resize(jnp.zeros((3, 4, 5, 1)), (3, 4, 5))
