import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from adregnet_jax.data.pair import Pair
from adregnet_jax.metrics import (
    dice,
    dice_by_label,
    folded_volume_percent,
    jacobian_statistics,
    mse,
    mutual_information,
    ncc,
    sd_log_jacobian,
    ssim,
    tre_mm,
    tre_snapped_mm,
)
from tests.oracles import losses as oracle
from tests.oracles.jacobian import jacobian_determinant as slow_determinant

SHAPE = (13, 14, 15)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    a = rng.random(SHAPE)
    mask = rng.random(SHAPE) > 0.2
    return a, 0.5 * a + 0.3 * rng.random(SHAPE), mask


def test_similarity_equals_the_equations(images):
    a, b, mask = images
    everywhere = np.ones(SHAPE)
    assert ncc(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-5)
    assert ncc(a, b, mask=mask) == pytest.approx(oracle.ncc(a, b, mask), abs=1e-5)
    assert mse(a, b) == pytest.approx(np.mean((a - b) ** 2))
    assert mse(a, b, mask=mask) == pytest.approx(np.mean((a[mask] - b[mask]) ** 2))
    assert ssim(a, b) == pytest.approx(oracle.ssim(a, b, everywhere), abs=1e-5)
    assert ssim(a, b, mask=mask) == pytest.approx(oracle.ssim(a, b, mask), abs=1e-5)


def test_local_ssim_is_that_of_scikit_image(images):
    a, b, _ = images
    expected = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
    )
    assert ssim(a, b, window=11) == pytest.approx(expected, abs=1e-5)


def test_jax_arrays_give_the_same_numbers(images):
    a, b, mask = images
    assert ncc(jnp.asarray(a), jnp.asarray(b), mask=jnp.asarray(mask)) == pytest.approx(
        ncc(a, b, mask=mask), abs=1e-6
    )
    assert mse(jnp.asarray(a), jnp.asarray(b)) == pytest.approx(mse(a, b), abs=1e-6)


def test_constant_images_have_no_correlation():
    assert ncc(np.ones(SHAPE), np.full(SHAPE, 0.3)) == pytest.approx(0)


def test_an_empty_mask_is_refused(images):
    a, b, _ = images
    for metric in (ncc, mse):
        with pytest.raises(ValueError, match="mask is empty"):
            metric(a, b, mask=np.zeros(SHAPE))


def test_jacobian_statistics_of_a_half_mirrored_volume():
    displacement = np.zeros((10, 3, 3, 3))
    x = np.arange(10)[:, None, None]
    # p + u is x up to 4, then 8 - x: the determinant is 1, 0 at the turn, -1 beyond.
    displacement[..., 0] = np.where(x <= 4, 0, 8 - 2 * x)
    assert jacobian_statistics(displacement) == pytest.approx(
        {
            "mean": -0.1,
            "sd": np.std([1] * 4 + [0] + [-1] * 5),
            "minimum": -1,
            "maximum": 1,
            "folded_percent": 60,
        }
    )
    first_half = np.broadcast_to(x < 4, (10, 3, 3))
    assert jacobian_statistics(displacement, mask=first_half) == pytest.approx(
        {"mean": 1, "sd": 0, "minimum": 1, "maximum": 1, "folded_percent": 0}
    )


def test_tre_at_rest_is_the_landmark_distance():
    rng = np.random.default_rng(0)
    fixed, moving = rng.random((2, 20, 3)) * 12
    spacing_mm = np.array([0.97, 1.1, 2.5])
    np.testing.assert_allclose(
        tre_mm(np.zeros((*SHAPE, 3)), fixed, moving, spacing_mm),
        np.linalg.norm((fixed - moving) * spacing_mm, axis=1),
    )


def test_tre_pulls_fixed_landmarks_into_the_moving_image():
    displacement = np.broadcast_to([1.0, -2.0, 0.5], (*SHAPE, 3))
    fixed = np.array([[3.0, 4.0, 5.0], [6.25, 7.5, 8.0]])
    moving = fixed + np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(tre_mm(displacement, fixed, moving, [1.0, 1.0, 2.0]), 0, atol=1e-6)
    np.testing.assert_allclose(
        tre_mm(-displacement, fixed, moving, [1.0, 1.0, 2.0]), 2 * np.linalg.norm([1, 2, 1]), rtol=1e-6
    )


def test_snapped_tre_rounds_to_voxels_of_the_native_scan():
    pair = Pair(
        name="resampled",
        fixed=np.zeros(SHAPE),
        moving=np.zeros(SHAPE),
        spacing_mm=np.array([1.0, 1.0, 1.0]),
        native_scale=np.array([1.0, 1.0, 0.4]),
        native_offset=np.array([10.0, 0.0, -0.3]),
        native_spacing_mm=np.array([1.0, 1.0, 2.5]),
    )
    native_moving = np.array([[14.0, 5.0, 2.0]])
    moving = (native_moving - pair.native_offset) / pair.native_scale
    # 0.4 and 1.4 voxels off along x, and 0.5 mm off (a fifth of a native slice) along z.
    fixed = np.concatenate([moving, moving]) + np.array([[0.4, 0, 0.5], [1.4, 0, 0.5]])
    moving = np.concatenate([moving, moving])
    snapped = tre_snapped_mm(
        np.zeros((*SHAPE, 3)),
        fixed,
        moving,
        to_native=pair.to_native,
        native_spacing_mm=pair.native_spacing_mm,
    )
    np.testing.assert_allclose(snapped, [0, 1], atol=1e-6)


def test_dice_counts_overlap_and_knows_absent_labels():
    a = np.array([[[0, 1, 1, 2]]])
    b = np.array([[[0, 1, 2, 3]]])
    np.testing.assert_allclose(dice(a, b, [0, 1, 2, 3, 7]), [1, 2 / 3, 0, 0, np.nan])


@pytest.mark.usefixtures("unchecked_types")
def test_dice_is_of_labels_on_one_grid():
    labels = np.ones((2, 2, 2), int)
    with pytest.raises(ValueError, match="differ in shape"):
        dice(labels, labels[1:], [1])


def test_sd_log_jacobian_is_that_of_the_challenge():
    displacement = np.random.default_rng(0).normal(0, 1.5, (8, 9, 10, 3)).astype(np.float32)
    inside = slow_determinant(displacement)[2:-2, 2:-2, 2:-2]
    assert (inside < -3).any()  # where the clip has something to do
    expected = np.log(np.clip(inside + 3, 1e-9, 1e9)).std()
    assert sd_log_jacobian(displacement) == pytest.approx(expected, rel=1e-4)
    assert sd_log_jacobian(np.zeros((6, 6, 6, 3))) == 0
    with pytest.raises(ValueError, match="5 voxels"):
        sd_log_jacobian(np.zeros((4, 6, 6, 3)))


def test_padding_counts_in_no_statistic_of_the_jacobian():
    displacement = np.random.default_rng(0).normal(0, 1, (8, 9, 10, 3)).astype(np.float32)
    padded = np.pad(displacement, ((3, 0), (1, 2), (0, 4), (0, 0)), mode="edge")
    mask = np.pad(np.ones((8, 9, 10), bool), ((3, 0), (1, 2), (0, 4)))
    for measure in (sd_log_jacobian, folded_volume_percent):
        assert measure(padded, mask=mask) == pytest.approx(measure(displacement), rel=1e-5)
        assert measure(padded) != pytest.approx(measure(displacement), rel=0.01)
        assert measure(displacement, mask=np.ones((8, 9, 10))) == pytest.approx(measure(displacement))


def test_folded_volume_is_in_percent():
    mirror = np.zeros((4, 4, 4, 3))
    mirror[..., 0] = -2 * np.arange(4)[:, None, None]
    assert folded_volume_percent(mirror) == pytest.approx(100)
    assert folded_volume_percent(np.zeros((4, 4, 4, 3))) == 0


def test_mutual_information_of_independent_and_of_equal_images():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 24, 24, 24))
    assert mutual_information(a, b) == pytest.approx(0, abs=0.02)
    assert mutual_information(a, 1 - a) == pytest.approx(mutual_information(a, a), abs=1e-3)
    half = np.arange(24)[:, None, None] < np.full((24, 24, 24), 12)
    glued = np.where(half, a, b)
    assert mutual_information(a, glued, mask=half) == pytest.approx(mutual_information(a, a, mask=half))


def test_dice_by_label_counts_labels_that_warping_removes():
    fixed = np.array([[[0, 1, 1, 2]]])
    moving = np.array([[[0, 1, 2, 3, 3]]])  # on a grid of its own
    gone = np.array([[[0, 1, 1, 0]]])
    scores = dice_by_label(fixed, moving, {"perfect": fixed, "gone": gone})
    np.testing.assert_equal(scores["perfect"], {1: 1.0, 2: 1.0, 3: np.nan})
    np.testing.assert_equal(scores["gone"], {1: 1.0, 2: 0.0, 3: np.nan})
