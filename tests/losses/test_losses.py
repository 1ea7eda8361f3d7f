import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from adregnet_jax.config import LossConfig
from adregnet_jax.losses import (
    bending_energy_loss,
    dice_loss,
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
from tests.oracles import losses as oracle
from tests.slabs import check_slabs

SHAPE = (7, 8, 9)
SPACING_MM = np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 2.5]], np.float32)
IMAGE_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "global ncc": partial(ncc_loss, window=0),
    "local ncc": partial(ncc_loss, window=5),
    "global ssim": partial(ssim_loss, window=0),
    "local ssim": partial(ssim_loss, window=5),
    "ssd": ssd_loss,
}
ORACLES = {
    "global ncc": oracle.ncc,
    "local ncc": lambda f, w, mask: oracle.local_squared_ncc(f, w, 5, mask),
    "global ssim": oracle.ssim,
    "local ssim": lambda f, w, mask: oracle.local_ssim(f, w, 5, mask),
    "ssd": lambda f, w, mask: 1 - ((f - w)[mask > 0] ** 2).mean(),
}
VALUE_AND_GRADIENT = {name: jax.jit(jax.value_and_grad(f, argnums=1)) for name, f in IMAGE_LOSSES.items()}
each_image_loss = pytest.mark.parametrize("name", IMAGE_LOSSES)


@pytest.fixture(scope="module")
def images():
    """Two pairs of related images, and a mask that leaves out two faces."""
    rng = np.random.default_rng(0)
    fixed = rng.random((2, *SHAPE, 1)).astype(np.float32)
    warped = (0.6 * fixed + 0.4 * rng.random(fixed.shape)).astype(np.float32)
    mask = np.ones_like(fixed)
    mask[:, :2] = 0
    mask[1, :, :, -1:] = 0
    return fixed, warped, mask


@pytest.fixture(scope="module")
def displacement():
    return np.random.default_rng(1).normal(scale=0.7, size=(2, *SHAPE, 3)).astype(np.float32)


def assert_gradient_is_the_slope(value_and_gradient, array, step=1e-2):
    """The gradient along one direction against the central difference of the values."""
    _, gradient = value_and_gradient(array)
    # Half random, half uphill: along a random direction alone the slope drowns in float32 rounding.
    direction = np.random.default_rng(2).normal(size=array.shape) + gradient / np.std(gradient)
    direction = direction.astype(np.float32)
    above, _ = value_and_gradient(array + step * direction)
    below, _ = value_and_gradient(array - step * direction)
    np.testing.assert_allclose(np.sum(gradient * direction), (above - below) / (2 * step), rtol=1e-2)


def slow_image_loss(name, *batches):
    pairs = zip(*(batch[..., 0].astype(np.float64) for batch in batches), strict=True)
    return np.mean([1 - ORACLES[name](*pair) for pair in pairs])


@each_image_loss
def test_image_losses_equal_their_oracles(name, images):
    fixed, warped, mask = images
    loss, _ = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    np.testing.assert_allclose(loss, slow_image_loss(name, fixed, warped, mask), atol=1e-5)


@each_image_loss
def test_image_losses_without_a_mask_equal_their_oracles(name, images):
    fixed, warped, _ = images
    loss = jax.jit(IMAGE_LOSSES[name])(fixed, warped)
    np.testing.assert_allclose(loss, slow_image_loss(name, fixed, warped, np.ones_like(fixed)), atol=1e-5)


@each_image_loss
def test_what_lies_outside_the_mask_changes_nothing(name, images):
    fixed, warped, mask = images
    garbage = np.where(mask > 0, 0, np.nan).astype(np.float32)
    garbage[:, 0] = 1e6
    clean, clean_gradient = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    soiled, soiled_gradient = VALUE_AND_GRADIENT[name](fixed + garbage, warped - garbage, mask=mask)
    np.testing.assert_array_equal(soiled, clean)
    np.testing.assert_array_equal(soiled_gradient, clean_gradient)
    np.testing.assert_array_equal(clean_gradient[mask == 0], 0)


@each_image_loss
def test_image_loss_gradients_match_finite_differences(name, images):
    fixed, warped, mask = images
    assert_gradient_is_the_slope(lambda w: VALUE_AND_GRADIENT[name](fixed, w, mask=mask), warped)


@each_image_loss
@pytest.mark.parametrize("case", ["fixed constant", "both constant", "mask empty"])
def test_image_losses_are_finite_with_finite_gradients(name, case, images):
    fixed, warped, mask = images
    if case != "mask empty":
        fixed = np.full_like(fixed, 0.3)
        warped = np.full_like(warped, 0.7) if case == "both constant" else warped
    mask = np.zeros_like(mask) if case == "mask empty" else mask
    value, gradient = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    assert np.isfinite(value)
    assert abs(gradient).max() < 1  # fails on NaN too


@each_image_loss
def test_image_losses_of_an_image_with_itself_are_zero(name, images):
    fixed, _, mask = images
    np.testing.assert_allclose(VALUE_AND_GRADIENT[name](fixed, fixed, mask=mask)[0], 0, atol=1e-5)


@pytest.mark.parametrize("name", ["global ncc", "local ncc"])
def test_ncc_is_blind_to_gain_and_offset(name, images):
    fixed, warped, mask = images
    loss, _ = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    # 1e-4: the addends that keep the quotients finite are not scaled along.
    changed, _ = VALUE_AND_GRADIENT[name](fixed, 0.5 * warped + 0.3, mask=mask)
    np.testing.assert_allclose(changed, loss, atol=1e-4)


def test_local_ncc_keeps_small_contrast_on_a_large_offset(images):
    fixed, warped, mask = images
    loss, _ = VALUE_AND_GRADIENT["local ncc"](fixed, warped, mask=mask)
    # On an offset of 4096, float32 keeps contrasts of 1 to 2.4e-4.
    offset, _ = VALUE_AND_GRADIENT["local ncc"](fixed + 4096, warped + 4096, mask=mask)
    np.testing.assert_allclose(offset, loss, atol=1e-3)


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


def landmarks():
    fixed = np.array([[[2, 3, 4], [1, 1, 1], [0, 0, 0]], [[5.5, 2, 3], [0, 0, 0], [0, 0, 0]]], np.float32)
    moving = fixed + np.array([1, -2, 0.5], np.float32)
    return fixed, moving, np.array([[1, 1, 0], [1, 0, 0]], np.float32)


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
    ncc_of_window_5, _ = VALUE_AND_GRADIENT["local ncc"](fixed, warped, mask=mask)
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
