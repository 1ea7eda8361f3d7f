import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import LossConfig
from adregnet_jax.losses import (
    field_loss,
    jacobian_loss,
    landmark_loss,
    mutual_information_loss,
    ncc_loss,
    smoothness_loss,
    ssd_loss,
    ssim_loss,
    total_loss,
)
from tests.losses.inputs import SPACING_MM, landmarks
from tests.slabs import check_slabs


def batch_of(images):
    fixed, _, mask = images
    fixed_landmarks, moving_landmarks, valid = landmarks()
    return {
        "fixed": fixed,
        "mask": mask,
        "spacing_mm": SPACING_MM,
        "fixed_landmarks": fixed_landmarks,
        "moving_landmarks": moving_landmarks,
        "landmark_valid": valid,
    }


def test_total_loss_is_the_weighted_sum_of_its_terms(images, displacement):
    config = LossConfig(
        similarity=2.0,
        regularisation=0.5,
        landmark=3.0,
        ncc=0.7,
        ncc_window=5,
        ssim=0.3,
        ssim_window=5,
        smoothness=1.5,
        jacobian=10.0,
    )
    total, terms = jax.jit(partial(total_loss, config=config))(batch_of(images), displacement, images[1])
    similarity = 0.7 * terms["ncc"] + 0.3 * terms["ssim"]
    regularisation = 1.5 * terms["smoothness"] + 10 * terms["jacobian"]
    np.testing.assert_allclose(
        total, 2 * similarity + 0.5 * regularisation + 3 * terms["landmark"], rtol=1e-5
    )
    fixed, warped, mask = images
    ncc_of_window_5 = ncc_loss(fixed, warped, window=5, mask=mask)
    np.testing.assert_allclose(terms["ncc"], ncc_of_window_5, rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "absent"),
    [
        ("similarity", {"ncc", "ssim"}),
        ("regularisation", {"smoothness", "jacobian"}),
        ("landmark", {"landmark"}),
        ("ssim", {"ssim"}),
    ],
)
def test_a_term_of_weight_zero_is_not_computed(weight, absent, images, displacement):
    changes: dict[str, Any] = {weight: 0.0}
    names = {"ncc", "ssim", "smoothness", "jacobian", "landmark"}
    config = dataclasses.replace(LossConfig(ssim=1.0, ncc_window=0), **changes)
    _, terms = jax.eval_shape(partial(total_loss, config=config), batch_of(images), displacement, images[1])
    assert set(terms) == names - absent


def test_padding_counts_where_it_is_asked_for(images, displacement):
    warped, batch = images[1], batch_of(images)
    everywhere = batch | {"mask": np.ones_like(batch["mask"])}
    settings = LossConfig(ncc_window=5, landmark=0.0)
    found, _ = total_loss(batch, displacement, warped, dataclasses.replace(settings, masked=False))
    np.testing.assert_allclose(found, total_loss(everywhere, displacement, warped, settings)[0], rtol=1e-5)
    assert abs(float(found - total_loss(batch, displacement, warped, settings)[0])) > 1e-3


@pytest.mark.usefixtures("unchecked_types")
def test_shapes_are_checked(images, displacement):
    fixed, warped, mask = images
    with pytest.raises(ValueError, match="on one grid"):
        ncc_loss(fixed, warped[:, 1:])
    with pytest.raises(ValueError, match="on one grid"):
        ssim_loss(fixed[..., 0], warped[..., 0])
    with pytest.raises(ValueError, match="mask"):
        ncc_loss(fixed, warped, mask=mask[..., 0])
    with pytest.raises(ValueError, match="smaller than SSIM windows"):
        ssim_loss(fixed, warped, window=11)
    with pytest.raises(ValueError, match="spacing_mm"):
        smoothness_loss(displacement, SPACING_MM[0])
    with pytest.raises(ValueError, match="displacement"):
        jacobian_loss(displacement[..., :2])
    with pytest.raises(ValueError, match="landmarks"):
        fixed_points, moving_points, valid = landmarks()
        landmark_loss(displacement, fixed_points, moving_points, valid[:, :1], SPACING_MM)
    with pytest.raises(ValueError, match="one shape"):
        field_loss(displacement, displacement[:1], SPACING_MM)


def test_image_terms_are_of_pairs_of_one_contrast_alone(images, displacement):
    warped = jnp.asarray(images[1])
    batch = batch_of(images) | {"same_contrast": np.array([1, 0], np.float32)}
    config = LossConfig(ncc_window=5, ssim=0.5, regularisation=0, landmark=0)
    gradient = jax.grad(lambda w: total_loss(batch, displacement, w, config)[0])(warped)
    whole = jax.grad(lambda w: total_loss(batch_of(images), displacement, w, config)[0])(warped)
    np.testing.assert_allclose(gradient[0], whole[0], rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.abs(whole[1]).max() > 0


SLAB_TERMS = {
    "global ncc": LossConfig(ncc_window=0, regularisation=0, landmark=0),
    "local ncc": LossConfig(ncc_window=5, regularisation=0, landmark=0),
    "global ssim": LossConfig(ncc=0, ssim=1, regularisation=0, landmark=0),
    "local ssim": LossConfig(ncc=0, ssim=1, ssim_window=5, regularisation=0, landmark=0),
    "mind": LossConfig(ncc=0, mind=1, regularisation=0, landmark=0),
    "mutual information": LossConfig(ncc=0, mutual_information=1, regularisation=0, landmark=0),
    "regularisation": LossConfig(similarity=0, bending=1, landmark=0),
    "landmarks and dice": LossConfig(similarity=0, regularisation=0, dice=1, dice_labels=(1, 2)),
    "field": LossConfig(similarity=0, regularisation=0, landmark=0, field=1),
}


@pytest.mark.parametrize("config", SLAB_TERMS.values(), ids=SLAB_TERMS)
def test_terms_of_slabs_are_those_of_the_whole_volume(config):
    """Slabs of two voxels, windows of five, folds, landmarks on both sides of a cut."""
    rng = np.random.default_rng(0)
    shape = (2, 8, 6, 7)
    labels = [rng.integers(0, 3, (*shape, 1)) for _ in range(2)]
    points = [rng.uniform(0, 6, (2, 9, 3)).astype(np.float32) for _ in range(2)]

    def terms(fixed, warped, displacement, truth, mask, fixed_labels, moving_labels):
        batch = {
            "fixed": fixed,
            "mask": mask,
            "displacement": truth,
            "spacing_mm": jnp.array([[1.0, 2.0, 3.0], [2.0, 1.0, 1.0]]),
            "fixed_landmarks": points[0],
            "moving_landmarks": points[1],
            "landmark_valid": jnp.array([[1.0] * 9, [1.0] * 4 + [0.0] * 5]),
            "fixed_labels": fixed_labels,
            "moving_labels": moving_labels,
        }
        total, each = total_loss(batch, displacement, warped, config)
        return jnp.stack([total, *each.values()])

    images = [rng.random((*shape, 1), np.float32) for _ in range(2)]
    displacement, truth = (rng.normal(size=(*shape, 3)).astype(np.float32) for _ in range(2))
    mask = (rng.random((*shape, 1)) < 0.8).astype(np.float32)
    # Variances of windows are differences of sums: they lose a digit or two.
    check_slabs(terms, 4, *images, displacement, truth, mask, *labels, differentiable=(1, 2), rtol=1e-4)


@pytest.mark.parametrize(
    "term",
    [
        partial(ncc_loss, window=3),
        partial(ssim_loss, window=3),
        ssd_loss,
        mutual_information_loss,
    ],
)
def test_images_in_slabs_without_a_mask(term):
    rng = np.random.default_rng(0)
    images = [rng.random((1, 8, 5, 6, 1), np.float32) for _ in range(2)]
    check_slabs(term, 4, *images, differentiable=(1,), rtol=1e-4)


def test_displacements_in_slabs_without_a_mask():
    displacement = np.random.default_rng(0).normal(size=(1, 8, 5, 6, 3)).astype(np.float32)

    def regularise(displacement):
        spacing_mm = jnp.ones((1, 3))
        return (
            smoothness_loss(displacement, spacing_mm),
            jacobian_loss(displacement),
        )

    check_slabs(regularise, 4, displacement, differentiable=(0,))
