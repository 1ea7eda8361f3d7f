import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.losses import (
    bending_energy_loss,
    jacobian_loss,
    smoothness_loss,
)
from tests.losses.gradients import assert_gradient_is_the_slope
from tests.losses.inputs import SHAPE, SPACING_MM
from tests.oracles import losses as oracle


def test_smoothness_equals_the_oracle(images, displacement):
    mask = images[2]
    loss = jax.jit(smoothness_loss)(displacement, SPACING_MM, mask=mask)
    per_pair = zip(displacement.astype(np.float64), SPACING_MM, mask[..., 0], strict=True)
    np.testing.assert_allclose(loss, np.mean([oracle.smoothness(*pair) for pair in per_pair]), rtol=1e-5)


def test_smoothness_is_in_mm_per_mm():
    # A stretch by 10 % along y, whatever the voxel: (0.1 mm/mm)^2.
    y = np.arange(8, dtype=np.float32)[:, None]
    displacement = np.zeros((2, *SHAPE, 3), np.float32)
    displacement[..., 1] = 0.1 * y
    np.testing.assert_allclose(smoothness_loss(displacement, SPACING_MM), 0.01, rtol=1e-5)
    # 0.1 voxels of x (1 mm) a voxel of y (2 mm), and 0.1 voxels of 0.5 mm a voxel of 0.5 mm.
    shear = displacement[..., [1, 0, 2]]
    np.testing.assert_allclose(smoothness_loss(shear, SPACING_MM), (0.05**2 + 0.1**2) / 2, rtol=1e-5)


def test_smoothness_sees_a_checkerboard():
    checkerboard = ((-1.0) ** np.indices(SHAPE).sum(axis=0))[None, ..., None] * np.ones(3)
    spacing_mm = np.ones((1, 3), np.float32)
    np.testing.assert_allclose(smoothness_loss(jnp.asarray(checkerboard), spacing_mm), 9 * 4, rtol=1e-5)


def test_bending_of_a_quadratic_map_is_known():
    """u = a(x, x)/2 in mm has the second derivatives a everywhere, which central differences find exactly."""
    a = np.random.default_rng(4).normal(size=(2, 3, 3, 3))  # of pairs and components
    a = (a + np.swapaxes(a, -1, -2)) / 2
    grid = np.moveaxis(np.indices((5, 4, 6)), 0, -1)
    place_mm = grid * SPACING_MM[:, None, None, None]
    displacement_mm = np.einsum("bcjk,bxyzj,bxyzk->bxyzc", a, place_mm, place_mm) / 2
    displacement = (displacement_mm / SPACING_MM[:, None, None, None]).astype(np.float32)
    expected = np.mean((a**2).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(bending_energy_loss(displacement, SPACING_MM), expected, rtol=1e-3)


def test_bending_costs_nothing_where_nothing_bends():
    matrix = np.random.default_rng(5).normal(size=(3, 3))
    displacement = np.moveaxis(np.indices((4, 4, 4)), 0, -1) @ matrix + 1
    loss = bending_energy_loss(displacement[None].astype(np.float32), SPACING_MM[:1])
    np.testing.assert_allclose(loss, 0, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "spacing_shape"),
    [
        ((2, 2, 3, 3, 3), (2, 3)),
        ((2, 3, 3, 3, 3), (1, 3)),
        ((2, 3, 3, 3, 3), (3, 3)),
        ((2, 3, 3, 3, 3), (2,)),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_bending_needs_three_voxels_and_a_spacing_a_pair(shape, spacing_shape):
    with pytest.raises(ValueError, match="bending needs three voxels"):
        bending_energy_loss(jnp.zeros(shape), jnp.ones(spacing_shape))


def test_jacobian_loss_equals_the_oracle(images, displacement):
    mask = images[2]
    loss = jax.jit(jacobian_loss)(displacement, mask=mask)
    expected = np.mean([oracle.jacobian(*pair) for pair in zip(displacement, mask[..., 0], strict=True)])
    assert expected > 0.01
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_jacobian_loss_is_zero_without_folds():
    gentle = 0.05 * np.random.default_rng(0).normal(size=(1, *SHAPE, 3))
    assert jacobian_loss(jnp.asarray(gentle, jnp.float32)) == 0


@pytest.mark.parametrize("least", [0.0, 0.4])
def test_a_uniform_scaling_costs_what_its_determinant_lacks(least):
    positions = jnp.stack(jnp.meshgrid(*map(jnp.arange, SHAPE), indexing="ij"), axis=-1)[None]
    for factor in (0.5, 0.7, 0.9, -0.2):
        loss = jacobian_loss((factor - 1) * positions.astype(jnp.float32), least=least)
        np.testing.assert_allclose(loss, max(0, least - factor**3), atol=1e-4)


@pytest.mark.parametrize(
    "loss",
    [jacobian_loss, lambda u, mask: smoothness_loss(u, SPACING_MM, mask=mask)],
    ids=["jacobian", "smoothness"],
)
def test_regularisation_gradients(loss, images, displacement):
    mask = images[2]
    value_and_gradient = jax.jit(jax.value_and_grad(lambda u, m: loss(u, mask=m)))
    assert_gradient_is_the_slope(lambda u: value_and_gradient(u, mask), displacement, step=1e-3)
    value, gradient = value_and_gradient(displacement, np.zeros_like(mask))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
