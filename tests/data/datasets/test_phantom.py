"""The phantom obeys its laws: exact landmarks, no folds, and a true displacement that aligns the images."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from adregnet_jax.config import PhantomConfig
from adregnet_jax.data.datasets.phantom import phantom_pair
from adregnet_jax.errors import UserError

SMALL = PhantomConfig(shape=(32, 24, 24), spacing_mm=(10.0, 10.0, 12.0))  # the default chest, coarser
ARRAYS = ("fixed", "moving", "displacement", "fixed_landmarks", "moving_landmarks", "affine")


@pytest.fixture(scope="module")
def pairs():
    return [phantom_pair(PhantomConfig(), case) for case in range(12)]


def landmark_distance_mm(pair):
    return np.linalg.norm((pair.moving_landmarks - pair.fixed_landmarks) * pair.spacing_mm, axis=1)


def determinant(displacement):
    gradient = [np.stack(np.gradient(displacement[..., k].astype(float)), axis=-1) for k in range(3)]
    return np.linalg.det(np.eye(3) + np.stack(gradient, axis=-2))


def warp(volume, displacement):
    identity = np.indices(volume.shape)
    return ndimage.map_coordinates(
        volume, identity + np.moveaxis(displacement, -1, 0), order=1, mode="nearest"
    )


def ncc(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def mse(a, b):
    return np.mean((a - b) ** 2)


def test_the_same_case_is_the_same_pair_bit_for_bit():
    first, second = phantom_pair(SMALL, 3), phantom_pair(SMALL, 3)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


def test_cases_and_seeds_differ_in_anatomy_and_motion():
    first = phantom_pair(SMALL, 0)
    for other in (phantom_pair(SMALL, 1), phantom_pair(dataclasses.replace(SMALL, seed=1), 0)):
        assert np.abs(first.fixed - other.fixed).mean() > 0.03  # twice what noise alone would give
        assert np.abs(first.displacement - other.displacement).max() > 0.3


def test_images_and_points_have_the_format_of_a_pair(pairs):
    for pair in pairs:
        for image in (pair.fixed, pair.moving):
            assert image.shape == (64, 48, 48) and image.dtype == np.float32
            assert image.min() == 0 and 0.8 < image.max() <= 1
        assert pair.displacement.shape == (64, 48, 48, 3) and pair.displacement.dtype == np.float32
        assert pair.mask is None
        for points in (pair.fixed_landmarks, pair.moving_landmarks):
            assert points.shape == (300, 3)
            assert (points >= 0).all() and (points <= np.array(pair.fixed.shape) - 1).all()


def test_landmarks_follow_the_displacement(pairs):
    for pair in pairs:
        at_landmarks = [
            ndimage.map_coordinates(pair.displacement[..., k], pair.fixed_landmarks.T, order=3)
            for k in range(3)
        ]
        error = pair.moving_landmarks - pair.fixed_landmarks - np.stack(at_landmarks, axis=-1)
        # The landmarks are exact; the remaining error comes from interpolating the sampled field.
        assert np.abs(error).mean() < 0.005
        assert np.abs(error).max() < 0.2


def test_landmarks_lie_in_lung_and_prefer_vessels(pairs):
    for pair in pairs:
        for image, points in ((pair.fixed, pair.fixed_landmarks), (pair.moving, pair.moving_landmarks)):
            at_landmarks = ndimage.map_coordinates(image, points.T, order=1)
            assert np.median(at_landmarks) < 0.55  # soft tissue is at 0.75
            lung = image[(image > 0.05) & (image < 0.5)]
            assert np.median(at_landmarks) > 1.1 * np.median(lung)


def test_motion_is_as_large_as_in_dirlab(pairs):
    means = [landmark_distance_mm(pair).mean() for pair in pairs]
    assert min(means) > 3.5 and max(means) < 15.5
    assert 7 < np.mean(means) < 10  # 8.46 in DIR-Lab; the mean of 12 cases has a standard error of 0.7
    assert np.std(means) > 1.5


def test_diaphragm_rises_from_inhale_to_exhale_and_ribs_stay(pairs):
    for pair in pairs:
        rise_mm = pair.displacement[..., 2] * pair.spacing_mm[2]
        low = pair.fixed_landmarks[:, 2] < np.percentile(pair.fixed_landmarks[:, 2], 20)
        high = pair.fixed_landmarks[:, 2] > np.percentile(pair.fixed_landmarks[:, 2], 80)
        distance = landmark_distance_mm(pair)
        assert distance[low].mean() > 1.5 * distance[high].mean()
        bone = pair.fixed > 0.95
        assert np.abs(rise_mm[bone]).mean() < 0.15 * distance.mean()


def test_nothing_folds(pairs):
    for pair in pairs:
        assert determinant(pair.displacement).min() > 0.3


def test_the_truth_aligns_the_images(pairs):
    for pair in pairs:
        warped = warp(pair.moving, pair.displacement)
        assert ncc(pair.fixed, warped) > 0.99
        assert 1 - ncc(pair.fixed, warped) < 0.25 * (1 - ncc(pair.fixed, pair.moving))
        assert mse(pair.fixed, warped) < 0.25 * mse(pair.fixed, pair.moving)
        # Pulling the other way is worse than not moving at all: the law's direction matters.
        assert mse(pair.fixed, warp(pair.moving, -pair.displacement)) > mse(pair.fixed, pair.moving)


def test_lung_is_darker_at_inhale(pairs):
    for pair in pairs:
        warped = warp(pair.moving, pair.displacement)
        lung = (warped < 0.25) & (warped > 0.08)
        assert pair.fixed[lung].mean() < warped[lung].mean()


@pytest.mark.parametrize(
    ("shape", "spacing_mm"),
    [((16, 16, 16), (20.0, 15.0, 18.0)), ((32, 24, 24), (10.0, 10.0, 10.0)), ((40, 56, 33), (8.0, 4.0, 9.0))],
)
def test_other_grids_hold_the_same_chest(shape, spacing_mm):
    pair = phantom_pair(PhantomConfig(shape=shape, spacing_mm=spacing_mm, landmarks=20), 5)
    assert pair.fixed.shape == shape and pair.fixed_landmarks.shape == (20, 3)
    assert determinant(pair.displacement).min() > 0.3
    warped = warp(pair.moving, pair.displacement)
    assert ncc(pair.fixed, warped) > 0.97
    assert mse(pair.fixed, warped) < 0.4 * mse(pair.fixed, pair.moving)


def test_a_finer_grid_samples_the_same_field():
    # The centre of a coarse voxel lies between 2 x 2 x 2 fine ones, whose mean agrees except for curvature.
    coarse = phantom_pair(SMALL, 2).displacement
    fine = phantom_pair(PhantomConfig(), 2).displacement / 2
    means = fine.reshape(32, 2, 24, 2, 24, 2, 3).mean(axis=(1, 3, 5))
    assert np.abs(means - coarse).mean() < 0.01 * np.abs(coarse).max()


@pytest.mark.parametrize(
    ("change", "case", "words"),
    [({}, -1, "got -1"), ({"shape": (4, 9, 9)}, 0, "at least 8 voxels")],
)
def test_impossible_settings_are_named(change, case, words):
    with pytest.raises(UserError, match=words):
        phantom_pair(dataclasses.replace(SMALL, **change), case)
