"""Scans on any grid through a network trained on one grid: the displacement in the world is the same."""

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import linen as nn

from adregnet_jax.config import ModelConfig
from adregnet_jax.data.io.images import Image
from adregnet_jax.errors import UserError
from adregnet_jax.nn.models import make_model
from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.registration.adapter import predict_displacement
from adregnet_jax.registration.field import DisplacementField, warp_points
from adregnet_jax.registration.network import register
from adregnet_jax.weights.trained_network import TrainedNetwork, TrainingDomain
from tests.random_parameters import random_parameters
from tests.registration.test_field import oblique, smooth

TINY = ModelConfig(channels=(4,), cross_attention=False, regional_attention=False, multi_resolution=False)
SHAPE = (20, 24, 16)
# Nearly along the axes of the body: right, front, head.
AFFINE = oblique([4, -6, 5], [2.0, 2.0, 2.0], SHAPE, [15, -40, 120])


class Linear(nn.Module):
    """A network whose displacement is linear in the voxel, and whose levels halve its scans to 8 voxels."""

    multiple: int = 8

    def __call__(self, fixed, moving):
        place = identity_grid(fixed.shape[1:4])
        matrix = jnp.array([[0.1, 0.02, 0.0], [-0.03, 0.05, 0.01], [0.0, 0.04, -0.1]])
        field = place @ matrix.T + jnp.array([1.0, -2.0, 0.5])[None, None, None]
        return Prediction(field[None] + 0 * moving, (), ())


def scans(shape=SHAPE, affine=AFFINE):
    fixed, moving = (np.clip(0.5 + 0.2 * smooth(shape, 2, seed=seed), 0, 1) for seed in (1, 2))
    return Image(fixed, affine, "fixed scan"), moving


def network(trained, model=None):
    volume = jnp.zeros((1, 16, 16, 16, 1))
    if model is not None:
        return TrainedNetwork(model, {}, trained)
    model = make_model(TINY)
    return TrainedNetwork(model, random_parameters(model, volume, volume), trained)


def targets_mm(image, displacement, points_mm):
    field = DisplacementField(displacement, jnp.asarray(image.affine, jnp.float32))
    return np.asarray(warp_points(field, jnp.asarray(points_mm, jnp.float32)))


def inner_points_mm(image, margin=5):
    grid = np.stack(np.meshgrid(*[np.arange(margin, n - margin) for n in image.shape], indexing="ij"), -1)
    return nib.affines.apply_affine(image.affine, grid.reshape(-1, 3))


@pytest.mark.parametrize(
    "trained", [TrainingDomain(), TrainingDomain("RAS", (2.0, 2.0, 2.0)), TrainingDomain("RAS")]
)
def test_a_grid_that_the_network_knows_is_left_alone(trained):
    fixed, moving = scans()
    known = network(trained)
    found = predict_displacement(known, fixed, moving)
    batch = (values[None, ..., None] for values in (fixed.values, moving))
    params = jax.tree.map(jnp.asarray, known.params)
    expected = register(params, *batch, model=known.model).displacement[0]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_a_turned_scan_gives_the_same_map():
    fixed, moving = scans()
    known = network(TrainingDomain("RAS", voxels=(20 * 24 * 16,)))
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(fixed.affine), nib.orientations.axcodes2ornt("PIL")
    )
    turned = nib.orientations.apply_orientation(fixed.values, turn)
    affine = fixed.affine @ nib.orientations.inv_ornt_aff(turn, fixed.shape)
    other = Image(turned, affine, "turned scan")
    displacement = predict_displacement(known, other, nib.orientations.apply_orientation(moving, turn))
    points_mm = inner_points_mm(fixed)
    expected = targets_mm(fixed, predict_displacement(known, fixed, moving), points_mm)
    np.testing.assert_allclose(targets_mm(other, displacement, points_mm), expected, atol=1e-2)
    assert np.linalg.norm(expected - points_mm, axis=1).max() > 0.1


@pytest.mark.parametrize(
    ("trained", "shape"),
    [
        (TrainingDomain("RAS", (4.0, 3.0, 2.0)), (10, 16, 16)),
        (TrainingDomain("RAS", voxels=(20 * 24 * 16 // 8,)), (10, 12, 8)),
        (TrainingDomain("LPS", (4.0, 3.0, 2.0)), (10, 16, 16)),
    ],
)
def test_the_displacement_comes_back_in_millimetres(trained, shape):
    """A linear map on the network's grid is the same linear map in the world."""
    fixed, moving = scans()
    found = predict_displacement(network(trained, Linear()), fixed, moving)
    signs = np.array([1 if axis in "RAS" else -1 for axis in trained.axes])
    spacing_mm = np.array(SHAPE) * 2.0 / shape
    known = np.eye(4)  # voxel of the network's grid -> voxel of the scan
    known[:3, :3] = np.diag(signs * np.array(SHAPE) / shape)
    known[:3, 3] = (np.array(SHAPE) - 1) / 2 - known[:3, :3] @ ((np.array(shape) - 1) / 2)
    affine = fixed.affine @ known
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), spacing_mm)
    points_mm = inner_points_mm(fixed)
    voxels = nib.affines.apply_affine(np.linalg.inv(affine), points_mm)
    matrix = np.array([[0.1, 0.02, 0.0], [-0.03, 0.05, 0.01], [0.0, 0.04, -0.1]])
    expected = nib.affines.apply_affine(affine, voxels + voxels @ matrix.T + [1.0, -2.0, 0.5])
    np.testing.assert_allclose(targets_mm(fixed, found, points_mm), expected, atol=1e-2)


def test_millimetres_do_not_count_where_voxels_do():
    fixed, moving = scans()
    known = network(TrainingDomain("RAS", voxels=(4000,)))
    small = Image(fixed.values, fixed.affine @ np.diag([0.2, 0.2, 0.2, 1]), "small scan")
    np.testing.assert_allclose(
        predict_displacement(known, small, moving), predict_displacement(known, fixed, moving), atol=1e-3
    )


def test_the_first_run_equals_a_network_with_one_run():
    fixed, moving = scans()
    twice = network(TrainingDomain("RAS", voxels=(4000, 7000)))
    once = network(TrainingDomain("RAS", voxels=(4000,)))
    np.testing.assert_array_equal(
        predict_displacement(twice, fixed, moving, runs=1), predict_displacement(once, fixed, moving)
    )
    both = predict_displacement(twice, fixed, moving)
    assert np.abs(both - predict_displacement(once, fixed, moving)).max() > 0.01


def test_a_scan_smaller_than_the_stride_is_refused():
    fixed, moving = scans((24, 24, 4), oblique([0, 0, 0], [2.0] * 3, (24, 24, 4), [0, 0, 0]))
    with pytest.raises(
        UserError, match="fixed scan: 24 x 24 x 4 voxels on the grid of network, which takes 8"
    ):
        predict_displacement(network(TrainingDomain("RAS", (2.0, 2.0, 2.0)), Linear()), fixed, moving)
