import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant, least_determinant, spatial_gradient
from tests.oracles.jacobian import folded_volume as slow_folded_volume
from tests.oracles.jacobian import jacobian_determinant as slow_determinant


def linear_displacement(matrix, shape):
    """u(p) = (A - I) p, so that the map is p -> A p."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return (grid @ (matrix - np.eye(3)).T).astype(np.float32)[None]


@settings(max_examples=4, deadline=None)
@given(shape=st.tuples(*[st.integers(2, 6)] * 3), seed=st.integers(0, 1000))
def test_gradient_is_that_of_numpy(shape, seed):
    volume = np.random.default_rng(seed).normal(size=(2, *shape, 2)).astype(np.float32)
    gradients = [np.gradient(volume, step, axis=axis) for axis, step in enumerate((0.5, 1.0, 3.0), start=1)]
    expected = np.stack(gradients, axis=-1)
    gradient = jax.jit(lambda v: spatial_gradient(v, spacing=(0.5, 1.0, 3.0)))(volume)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_determinant_of_a_map_at_rest_is_one():
    np.testing.assert_array_equal(jacobian_determinant(jnp.zeros((2, 3, 4, 5, 3))), np.ones((2, 3, 4, 5)))


@pytest.mark.parametrize(
    "matrix",
    [
        np.diag([2.0, 0.5, 3.0]),
        np.diag([-1.0, 1.0, 1.0]),  # a mirror
        [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]],  # a rotation
        [[1.1, 0.2, -0.3], [0.4, 0.9, 0.1], [-0.2, 0.5, 1.3]],
    ],
)
def test_determinant_of_a_linear_map_is_that_of_its_matrix(matrix):
    determinant = jax.jit(jacobian_determinant)(linear_displacement(np.array(matrix), (4, 5, 6)))
    # Differences of coordinates of about 10 in float32, times numbers of about 3.
    np.testing.assert_allclose(determinant, np.full((1, 4, 5, 6), np.linalg.det(matrix)), atol=2e-5)


def test_determinant_equals_the_oracle():
    displacement = np.random.default_rng(0).normal(size=(2, 4, 3, 5, 3)).astype(np.float32)
    expected = np.stack([slow_determinant(u) for u in displacement])
    np.testing.assert_allclose(jax.jit(jacobian_determinant)(displacement), expected, atol=1e-5)


def test_gradients_match_finite_differences():
    displacement = 0.3 * jax.random.normal(jax.random.key(0), (1, 3, 4, 3, 3))
    # 1e-2: what float32 finite differences can tell.
    check_grads(jax.jit(jacobian_determinant), (displacement,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(1, 4, 4, 4, 2), (4, 4, 4, 3), (1, 4, 1, 4, 3), (1, 1, 4, 4, 4, 3)])
def test_determinant_rejects_what_is_no_displacement(shape):
    with pytest.raises(ValueError, match=r"must be \[b, x, y, z, 3\]|at least 2 elements"):
        jacobian_determinant(jnp.zeros(shape))


def test_folded_volume_equals_the_oracle():
    displacement = np.random.default_rng(0).normal(size=(2, 4, 3, 5, 3)).astype(np.float32)
    expected = [slow_folded_volume(u) for u in displacement]
    np.testing.assert_allclose(jax.jit(folded_volume)(displacement), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [(np.diag([2.0, 0.5, 3.0]), 0), (np.diag([-1.0, 1.0, 1.0]), 1), (np.diag([-2.0, 1.0, 1.0]), 2)],
)
def test_folded_volume_of_a_linear_map(matrix, expected):
    volume = folded_volume(jnp.asarray(linear_displacement(matrix, (3, 4, 5))))
    np.testing.assert_allclose(volume, [expected], atol=1e-6)


def test_folded_volume_sees_the_checkerboard_that_central_differences_miss():
    checkerboard = 1.2 * (-1.0) ** np.indices((6, 6, 6)).sum(axis=0)
    displacement = jnp.zeros((1, 6, 6, 6, 3)).at[..., 0].set(checkerboard / 2)
    # One-sided differences on the faces would see it.
    assert jacobian_determinant(displacement)[:, 1:-1, 1:-1, 1:-1].min() > 0
    assert folded_volume(displacement)[0] > 0.01


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(1, 4, 4, 4, 2), (4, 4, 4, 3), (1, 4, 1, 4, 3)])
def test_folded_volume_rejects_what_is_no_displacement(shape):
    with pytest.raises(ValueError, match="displacement must be"):
        folded_volume(jnp.zeros(shape))


def test_nothing_is_folded_where_the_least_determinant_is_positive():
    matrix = np.array([[1.1, 0.2, -0.3], [0.4, 0.9, 0.1], [-0.2, 0.5, 1.3]])
    least = least_determinant(linear_displacement(matrix, (4, 5, 3)))
    np.testing.assert_allclose(least, np.full((1, 4, 5, 3), np.linalg.det(matrix)), rtol=1e-5)
    for seed in range(20):
        noise = np.random.default_rng(seed).uniform(-0.3, 0.3, (2, 3, 4, 2, 3)).astype(np.float32)
        folded, least = folded_volume(noise), np.asarray(least_determinant(noise)).reshape(2, -1).min(axis=1)
        np.testing.assert_array_equal(folded > 0, least < 0)
    one = np.zeros((1, 6, 6, 6, 3), np.float32)
    one[0, 3, 3, 3, 0] = -2  # past its neighbour
    turned = np.argwhere(np.asarray(least_determinant(one))[0] < 0)
    np.testing.assert_array_equal([turned.min(axis=0), turned.max(axis=0)], [[2, 2, 2], [3, 4, 4]])
