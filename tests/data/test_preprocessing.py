"""Intensities, resampling and the crop window."""

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from adregnet_jax.data import preprocessing
from adregnet_jax.errors import UserError


def in_a_circle(padding, *, noise=20.0):
    """A made-up CT: air, a body of water with denser parts, and padding outside the circle of view."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 40, 6)), indexing="ij")
    radius = np.hypot(x, y)
    values = np.where(radius < 0.6, np.where(np.hypot(x - 0.2, y) < 0.15, 800.0, 20.0), -1000.0)
    values += np.random.default_rng(0).normal(0, noise, values.shape)
    return np.where(radius > 1, padding, values).astype(np.float32), radius


@pytest.mark.parametrize("padding", [-2048, -3024, -32768])
def test_padding_does_not_count(padding):
    volume, radius = in_a_circle(padding)
    counted = preprocessing.counted_voxels(volume)
    np.testing.assert_array_equal(counted, radius <= 1)
    low, high = preprocessing.percentile_window(volume, "scan", counted=counted)
    assert -1080 < low < -1000 and 700 < high < 900
    scaled = preprocessing.rescale_percentiles(volume, "scan", counted=counted)
    assert scaled[radius > 1].max() == 0
    assert 0.5 < scaled[radius < 0.6].mean() < 0.65
    mask = radius < 0.6
    np.testing.assert_array_equal(preprocessing.counted_voxels(volume, mask), mask)


def test_scans_without_padding_count_everywhere():
    random = np.random.default_rng(0)
    for volume in (
        in_a_circle(-1000)[0],
        in_a_circle(0)[0],
        random.normal(0, 2000, (20, 20, 20)).astype(np.float32),  # a phase or noise around 0
        np.full((4, 4, 4), -2048.0, np.float32),
    ):
        assert preprocessing.counted_voxels(volume) is None
    mask = np.zeros((4, 4, 4))
    assert preprocessing.counted_voxels(np.zeros((4, 4, 4), np.float32), mask) is None  # empty


def test_percentiles_map_to_zero_and_one():
    volume = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    scaled = preprocessing.rescale_percentiles(volume, "scan")
    low, high = np.percentile(volume, [0.5, 99.5])
    np.testing.assert_allclose(scaled, np.clip((volume - low) / (high - low), 0, 1), atol=1e-6)
    assert scaled.dtype == np.float32


def test_a_scan_of_mostly_background_keeps_its_contrast():
    volume = np.zeros((20, 20, 20), np.float32)
    volume[3, 3, 3] = 7
    assert preprocessing.rescale_percentiles(volume, "scan").max() == 1


def test_a_constant_scan_is_refused_by_name():
    with pytest.raises(UserError, match=r"scan\.nii: every voxel is 3"):
        preprocessing.rescale_percentiles(np.full((4, 4, 4), 3.0), "scan.nii")


def test_hounsfield_window():
    hu = np.array([-2000, -1000, -600, -200, 300], np.float32)
    np.testing.assert_allclose(preprocessing.rescale_window(hu, -1000, -200), [0, 0, 0.5, 1, 1])


def shifted_blobs():
    """Smooth blobs on an empty background, and the same blobs moved by a voxel."""
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(24, 24, 24)), 2)
    fixed = np.clip(0.5 + 0.2 * noise / noise.std(), 0.1, 0.8).astype(np.float32)  # never 0 when inverted
    fixed[:6] = 0
    return fixed, np.roll(fixed, 1, axis=1)


@pytest.mark.parametrize(
    "curve", [lambda v: (1 - v) ** 1.5, lambda v: np.abs(v - 0.5)], ids=["gamma", "bent"]
)
def test_another_contrast_is_matched_to_that_of_the_fixed_scan(curve):
    fixed, moving = shifted_blobs()
    other = np.where(moving > 0, curve(moving), 0).astype(np.float32)
    matched = preprocessing.match_contrast(other, fixed)
    before, after = (np.corrcoef(values.ravel(), fixed.ravel())[0, 1] for values in (other, matched))
    assert after > before + 0.05
    if curve(0.2) != pytest.approx(curve(0.8)):  # else two intensities have become one
        assert np.corrcoef(matched.ravel(), moving.ravel())[0, 1] > 0.95


def test_tissue_that_inversion_makes_zero_is_not_taken_for_background():
    fixed, moving = shifted_blobs()
    bright = scipy.ndimage.binary_erosion(moving > 0, iterations=2) & (moving > 0.65)
    assert bright.sum() > 50
    other = np.where((moving > 0) & ~bright, 1 - moving, 0).astype(np.float32)
    matched = preprocessing.match_contrast(other, fixed)
    assert matched[bright].min() > matched[(moving > 0) & ~bright].mean()
    assert np.all(matched[moving == 0] == matched[0, 0, 0])


@pytest.mark.parametrize("change", [lambda v: v, lambda v: 0.7 * v + 0.1, lambda v: v**1.3])
def test_the_same_contrast_is_left_alone(change):
    fixed, moving = shifted_blobs()
    other = change(moving).astype(np.float32)
    assert preprocessing.match_contrast(other, fixed) is other


def test_contrast_of_nothing_is_left_alone():
    still, fixed = np.zeros((4, 4, 4), np.float32), shifted_blobs()[0][:4, :4, :4]
    np.testing.assert_array_equal(preprocessing.match_contrast(still, fixed), still)


def test_whole_offsets_crop_and_pad():
    volume = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    out, mask = preprocessing.resample(volume, np.ones(3), np.array([2.0, -1.0, 0.0]), (4, 7, 3))
    expected = np.zeros((4, 7, 3), np.float32)
    expected[:, 1:6] = volume[2:, :, :3]
    np.testing.assert_array_equal(out, expected)
    assert mask[:, 1:6].all()
    assert not mask[:, [0, 6]].any()


@settings(max_examples=30, deadline=None)
@given(
    scale=st.tuples(*[st.floats(0.4, 4.0)] * 3),
    offset=st.tuples(*[st.floats(-4.0, 4.0)] * 3),
    slope=st.tuples(*[st.floats(-1.0, 1.0)] * 3),
)
def test_resampling_follows_the_law_for_points(scale, offset, slope):
    """A linear image stays linear: its value at a new voxel is its value at the old coordinate."""
    scale, offset, slope = np.array(scale), np.array(offset), np.array(slope)
    old = np.stack(np.meshgrid(*[np.arange(30)] * 3, indexing="ij"), -1)
    out, mask = preprocessing.resample((old @ slope).astype(np.float32), scale, offset, (6, 6, 6))
    at = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1) * scale + offset
    np.testing.assert_array_equal(mask, ((at >= -0.5) & (at <= 29.5)).all(-1))
    assert not out[~mask].any()
    # The Gaussian bends the line where it reaches beyond the border: within 3 SD of 1.5 voxels.
    far = ((at >= 6) & (at <= 23)).all(-1)
    np.testing.assert_allclose(out[far], (at @ slope)[far], atol=1e-4)


def test_coarser_grids_do_not_alias():
    stripes = np.tile(np.array([0.0, 1.0], np.float32), 32)[:, None, None] * np.ones((1, 8, 8), np.float32)
    out, _ = preprocessing.resample(stripes, np.array([4.0, 1, 1]), np.zeros(3), (16, 8, 8))
    assert np.abs(out[2:-2] - 0.5).max() < 0.01  # without a filter every sample would be 0


def chest(shape=(60, 50, 40), spacing_mm=3.0, couch=True):
    """HU of a body with two lungs, on a couch, and the two boxes [2, 3] of first and last voxel."""
    hu = np.full(shape, -1000, np.float32)
    hu[10:50, 12:38] = 0
    hu[14:27, 17:33, 8:32] = -800
    hu[33:46, 17:33, 6:30] = -800
    if couch:
        hu[2:58, 44:46] = 0
    return (
        hu,
        np.full(3, spacing_mm),
        np.array([[10, 12, 0], [49, 37, 39]]),
        np.array([[14, 17, 6], [45, 32, 31]]),
    )


@pytest.mark.parametrize("couch", [True, False])
def test_body_and_lungs_are_found(couch):
    hu, spacing_mm, body, lungs = chest(couch=couch)
    found_body, found_lungs = preprocessing.thorax_boxes(hu, spacing_mm)
    np.testing.assert_allclose(found_body, body, atol=1)
    np.testing.assert_allclose(found_lungs, lungs, atol=1)


def test_a_lung_cut_by_the_side_of_the_scan_is_a_lung():
    hu, spacing_mm, _, _ = chest()
    body, lungs = preprocessing.thorax_boxes(hu[16:44], spacing_mm)
    np.testing.assert_allclose(body, [[0, 12, 0], [27, 37, 39]], atol=1)
    np.testing.assert_allclose(lungs, [[0, 17, 6], [27, 32, 31]], atol=1)


@pytest.mark.parametrize("value", [-1000, 0])
def test_without_a_body_or_a_lung_everything_is_kept(value):
    hu = np.full((12, 10, 8), value, np.float32)
    for box in preprocessing.thorax_boxes(hu, np.full(3, 3.0)):
        np.testing.assert_array_equal(box, [[0, 0, 0], [11, 9, 7]])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_window_never_cuts_lungs_that_fit(data):
    length = data.draw(st.integers(1, 60))
    body_low = data.draw(st.integers(0, length - 1))
    body_high = data.draw(st.integers(body_low, length - 1))
    low = data.draw(st.integers(body_low, body_high))
    high = data.draw(st.integers(low, body_high))
    window = data.draw(st.floats(high - low + 1, 80))
    box = lambda *ends: np.array([[end] * 3 for end in ends])  # noqa: E731
    start = preprocessing.window_start(
        np.full(3, length), np.full(3, window), box(body_low, body_high), box(low, high)
    )
    assert (start <= low + 1e-9).all()
    assert (start + window >= high + 1 - 1e-9).all()
    if window <= length:
        assert (start >= 0).all()
        assert (start + window <= length + 1e-9).all()
    else:
        np.testing.assert_allclose(start, (length - window) / 2)
    if body_high - body_low + 1 <= window:
        assert (start <= body_low + 1e-9).all()
        assert (start + window >= body_high + 1 - 1e-9).all()
