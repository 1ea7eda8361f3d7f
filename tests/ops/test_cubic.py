import jax
import numpy as np
import pytest
import scipy.ndimage
from jax.test_util import check_grads

from adregnet_jax.ops.cubic import sample_cubic

VOLUME = np.random.default_rng(0).normal(size=(6, 5, 7)).astype(np.float32)


def test_samples_are_those_of_scipy():
    coordinates = np.random.default_rng(1).uniform(0, np.array(VOLUME.shape) - 1, (200, 3)).astype(np.float32)
    expected = scipy.ndimage.map_coordinates(VOLUME, coordinates.T, order=3, mode="mirror")
    np.testing.assert_allclose(jax.jit(sample_cubic)(VOLUME, coordinates), expected, atol=2e-5)


def test_voxels_keep_their_values():
    grid = np.moveaxis(np.indices(VOLUME.shape), 0, -1)
    np.testing.assert_allclose(sample_cubic(VOLUME, grid), VOLUME, atol=2e-6)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_outside(padding):
    coordinates = np.array([[-0.4, 2, 3], [-0.6, 2, 3], [5.4, 4, 6], [5, 4.6, 6], [1, 2, 50]], np.float32)
    expected = VOLUME[[0, 0, 5, 5, 1], [2, 2, 4, 4, 2], [3, 3, 6, 6, 6]]
    if padding == "zeros":
        expected = expected * np.array([1, 0, 1, 0, 0], np.float32)
    np.testing.assert_allclose(sample_cubic(VOLUME, coordinates, padding=padding), expected, atol=2e-6)


def test_gradients_are_those_of_finite_differences():
    coordinates = np.array([[1.3, 2.6, 3.4], [0.5, 3.2, 5.7]], np.float32)
    check_grads(sample_cubic, (VOLUME, coordinates), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_nan_coordinates_stay_inside_the_memory():
    assert sample_cubic(VOLUME, np.full((2, 3), np.nan, np.float32)).shape == (2,)


@pytest.mark.usefixtures("unchecked_types")
def test_shapes():
    with pytest.raises(ValueError, match="expected a volume"):
        sample_cubic(VOLUME[0], np.zeros((2, 3)))
