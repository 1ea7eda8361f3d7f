import jax
import numpy as np
import pytest
from jax.test_util import check_grads

from adregnet_jax.losses import (
    dice_loss,
    field_loss,
    landmark_loss,
)
from tests.losses.gradients import assert_gradient_is_the_slope
from tests.losses.inputs import SHAPE, SPACING_MM, landmarks

landmark_value_and_gradient = jax.jit(jax.value_and_grad(landmark_loss))


def test_landmark_loss_is_the_mean_distance_in_mm():
    fixed, moving, valid = landmarks()
    moving[valid == 0] = 99
    displacement = np.zeros((2, *SHAPE, 3), np.float32)
    at_rest, _ = landmark_value_and_gradient(displacement, fixed, moving, valid, SPACING_MM)
    distance_mm = np.linalg.norm(np.array([1, -2, 0.5]) * SPACING_MM, axis=-1)
    np.testing.assert_allclose(at_rest, distance_mm.mean(), rtol=1e-5)


def test_landmark_loss_at_the_solution_is_zero_with_zero_gradient():
    fixed, moving, valid = landmarks()
    displacement = np.zeros((2, *SHAPE, 3), np.float32) + np.array([1, -2, 0.5], np.float32)
    value, gradient = landmark_value_and_gradient(displacement, fixed, moving, valid, SPACING_MM)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_a_pair_without_landmarks_contributes_nothing():
    fixed, moving, valid = landmarks()
    displacement = np.zeros((2, *SHAPE, 3), np.float32)
    valid[1] = 0
    value, gradient = landmark_value_and_gradient(displacement, fixed, moving, valid, SPACING_MM)
    first_pair_mm = np.linalg.norm(np.array([1, -2, 0.5]) * SPACING_MM[0])
    np.testing.assert_allclose(value, first_pair_mm / 2, rtol=1e-5)
    assert np.any(gradient[0])
    np.testing.assert_array_equal(gradient[1], 0)


def test_landmark_gradients_match_finite_differences(displacement):
    fixed, moving, valid = landmarks()
    assert_gradient_is_the_slope(
        lambda u: landmark_value_and_gradient(u, fixed + np.float32(0.3), moving, valid, SPACING_MM),
        displacement,
        step=1e-3,
    )


def label_maps():
    rng = np.random.default_rng(3)
    return [rng.integers(0, 4, (2, 5, 6, 7, 1)).astype(np.int32) for _ in range(2)]


def test_dice_loss_of_a_field_of_whole_voxels_is_that_of_the_shifted_labels():
    fixed, moving = label_maps()
    displacement = np.zeros((2, 5, 6, 7, 3), np.float32)
    displacement[..., 1] = 1
    shifted = moving[:, :, np.minimum(np.arange(6) + 1, 5)]
    scores = [
        2 * np.sum((f == label) & (s == label)) / (np.sum(f == label) + np.sum(s == label))
        for f, s in zip(fixed, shifted, strict=True)
        for label in (1, 3)
    ]
    assert dice_loss(fixed, moving, displacement, (1, 3)) == pytest.approx(1 - np.mean(scores), abs=1e-5)
    assert dice_loss(fixed, fixed, 0 * displacement, (1, 2)) == pytest.approx(0, abs=1e-6)
    assert dice_loss(fixed, moving, 0 * displacement, (9,)) == pytest.approx(0, abs=1e-6)


def test_dice_loss_has_gradients_and_checks_its_input():
    fixed, moving = label_maps()
    displacement = 0.3 * jax.random.normal(jax.random.key(0), (2, 5, 6, 7, 3)) + 0.1
    loss = jax.jit(lambda u: dice_loss(fixed, moving, u, (1, 2)))
    check_grads(loss, (displacement,), order=1, modes=["rev"], eps=1e-3, atol=2e-2, rtol=2e-2)
    with pytest.raises(ValueError, match="labels not empty"):
        dice_loss(fixed, moving, displacement, ())


def test_field_loss_is_the_mean_distance_in_mm(images):
    rng = np.random.default_rng(3)
    shape = (2, 5, 6, 7)
    ours, truth = (rng.normal(size=(*shape, 3)).astype(np.float32) for _ in range(2))
    mask = rng.random((*shape, 1)) < 0.7
    spacing_mm = np.array([[1, 2, 3], [2, 1, 0.5]], np.float32)
    distance = np.linalg.norm((ours - truth) * spacing_mm[:, None, None, None], axis=-1)
    expected = np.mean([distance[n][mask[n, ..., 0]].mean() for n in range(2)])
    found = field_loss(ours, truth, spacing_mm, mask=mask.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # the addend under the root
    value_and_gradient = jax.value_and_grad(lambda u: field_loss(u, truth, spacing_mm))
    assert_gradient_is_the_slope(value_and_gradient, ours)
    at_the_truth = jax.grad(lambda u: field_loss(u, truth, spacing_mm))(truth)
    np.testing.assert_array_equal(at_the_truth, 0)
