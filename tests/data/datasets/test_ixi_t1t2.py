"""T1 and T2 scans named as in IXI: pairs by subject, one world for both grids, and refused input."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from adregnet_jax.config import DataConfig, IxiConfig
from adregnet_jax.data.io import nifti
from adregnet_jax.data.preprocessing import resample_to_grid
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError

T1_SHAPE, T2_SHAPE = (12, 10, 8), (9, 14, 11)
T1_AFFINE = np.array([[0, 0, 2.0, -8], [-2.0, 0, 0, 11], [0, 2.0, 0, -9], [0, 0, 0, 1]])
T2_AFFINE = np.eye(4)
T2_AFFINE[:3, :3] = Rotation.from_euler("xyz", [4, -3, 5], degrees=True).as_matrix() * [2.5, 2.0, 2.0]
T2_AFFINE[:3, 3] = [-5, -14, -11]  # the T1 begins at x = -8
SUBJECTS = [f"IXI{n:03d}-{site}-{n + 800:04d}" for n, site in enumerate(["Guys", "HH", "IOP"] * 4, 2)]


def world(shape, affine):
    """[x, y, z, 3], positions of the voxels in mm."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def anatomy(points_mm, number=0):
    """Linear in the world: trilinear interpolation is exact."""
    return (points_mm @ [1.0, 0.7, -0.4] + 3 * number).astype(np.float32)


@pytest.fixture
def root(tmp_path):
    for folder in ("IXI-T1", "IXI-T2"):
        (tmp_path / folder).mkdir()
    for number, subject in enumerate(SUBJECTS):
        t1, t2 = anatomy(world(T1_SHAPE, T1_AFFINE)), anatomy(world(T2_SHAPE, T2_AFFINE), number)
        nifti.write_volume(tmp_path / "IXI-T1" / f"{subject}-T1.nii.gz", t1, T1_AFFINE)
        nifti.write_volume(tmp_path / "IXI-T2" / f"{subject}-T2.nii.gz", t2, T2_AFFINE)
    return tmp_path


def config(root, **changes):
    settings = {"root": str(root), "mode": "t1t2", "shape": T1_SHAPE} | changes
    return DataConfig(kind="ixi", ixi=IxiConfig(**settings))


def refusal(settings):
    with pytest.raises(UserError) as error:
        for pairs in load_splits(settings):
            for pair in pairs:
                assert pair.name
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_t2_of_a_subject_is_read_on_the_grid_of_its_t1(root):
    splits = load_splits(config(root))
    assert [len(pairs) for pairs in splits] == [9, 1, 2]
    assert sorted(pair.name for pairs in splits for pair in pairs) == SUBJECTS
    pair = splits.train[0]
    np.testing.assert_array_equal(pair.affine, T1_AFFINE)
    np.testing.assert_allclose(pair.spacing_mm, [2, 2, 2])
    assert pair.fixed_labels is None and pair.fixed_landmarks is None
    # The values of both encode the position in the world, scaled to [0, 1]. An error of 3 mm, the
    # largest shift along a slope of 1.3, would show as a tenth.
    truth = anatomy(world(T1_SHAPE, T1_AFFINE))
    within = (pair.moving > 0) & (pair.moving < 1) & pair.mask
    inner = ndimage.binary_erosion(within)
    assert inner.sum() > 50
    slope, offset = np.polyfit(truth[inner], pair.moving[inner], 1)
    np.testing.assert_allclose(pair.moving[inner], slope * truth[inner] + offset, atol=1e-4)
    # The scale is that of the percentiles of the whole T2.
    low, high = np.percentile(anatomy(world(T2_SHAPE, T2_AFFINE)), [0.5, 99.5])
    assert slope == pytest.approx(1 / (high - low), rel=1e-3)
    assert not pair.moving[~pair.mask].any() and 0.25 < pair.mask.mean() < 1


def test_other_subjects_stay_in_their_split(root):
    splits = load_splits(config(root, same_subject=False, partners=1, validation_fraction=0.2))
    seen: set[str] = set()
    for pairs in splits:
        fixed, moving = ({getattr(maker, side) for maker in pairs.makers} for side in ("fixed", "moving"))
        assert len(pairs) == len(fixed) and moving <= fixed
        assert all(maker.fixed != maker.moving for maker in pairs.makers)
        assert not seen & pairs.subjects
        seen |= pairs.subjects
        assert pairs[0].name == f"{pairs.makers[0].fixed}_{pairs.makers[0].moving}"
    assert seen == set(SUBJECTS)
    two = load_splits(
        config(root, same_subject=False, partners=2, validation_fraction=0.25, test_fraction=0.25)
    )
    assert [len({pair.name for pair in pairs}) for pairs in two] == [12, 6, 6]
    message = refusal(config(root, same_subject=False, partners=2))
    assert "12 subjects give 9 / 1 / 2 to train / validate / test, with 2 partners" in message


def test_a_missing_partner_is_named(root):
    (root / "IXI-T2" / f"{SUBJECTS[3]}-T2.nii.gz").unlink()
    (root / "IXI-T1" / f"{SUBJECTS[7]}-T1.nii.gz").unlink()
    expected = f"2 of 12 subjects have only one of T1 and T2, the first is {SUBJECTS[3]} without T2"
    assert expected in refusal(config(root))


def test_unusable_folders_and_scans(root, tmp_path_factory):
    assert "data.ixi.root is not set" in refusal(config(""))
    assert "has no scans" in refusal(config(tmp_path_factory.mktemp("empty")))
    assert "has no scans" in refusal(config(root / "none"))
    assert "data.ixi.shape is (8, 8, 8)" in refusal(config(root, shape=(8, 8, 8)))
    twice = root / f"{SUBJECTS[0]}-T1.nii"
    nifti.write_volume(twice, np.zeros(T1_SHAPE, np.float32), T1_AFFINE)
    assert "are the same scan: leave one of them" in refusal(config(root))
    twice.unlink()
    far = T2_AFFINE.copy()
    far[0, 3] += 500
    for subject in SUBJECTS:
        path = root / "IXI-T2" / f"{subject}-T2.nii.gz"
        nifti.write_volume(path, anatomy(world(T2_SHAPE, T2_AFFINE)), far)
    assert "covers 0 % of the grid of" in refusal(config(root))


def test_resampling_to_the_same_grid_is_exact():
    volume = np.random.default_rng(0).random(T1_SHAPE, np.float32)
    again, inside = resample_to_grid(volume, T2_AFFINE, T1_SHAPE, T2_AFFINE)
    np.testing.assert_array_equal(again, volume)
    assert inside.all()


def test_a_crop_along_permuted_and_mirrored_axes_is_a_crop():
    volume = np.random.default_rng(0).random((6, 7, 8), np.float32)
    # New axes (i, j, k) are old (z, -x, y), starting at the old voxel (4, 1, 2).
    change = np.array([[0, -1.0, 0, 4], [0, 0, 1.0, 1], [1.0, 0, 0, 2], [0, 0, 0, 1]])
    ours, inside = resample_to_grid(volume, T1_AFFINE, (5, 4, 7), T1_AFFINE @ change)
    expected = volume[4:0:-1, 1:, 2:7].transpose(2, 0, 1)
    np.testing.assert_allclose(ours[..., :6], expected, atol=1e-6)
    assert inside[..., :6].all() and not inside[..., 6].any() and not ours[..., 6].any()
