"""Reading and writing NIfTI, and refusing bad files."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from adregnet_jax.data.io import nifti
from adregnet_jax.errors import UserError

AFFINE = np.diag([-2.0, 1.5, 3.0, 1.0])
AFFINE[:3, 3] = [10, -20, 5]


def volume(shape=(5, 4, 3), dtype=np.float32):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(path, values, affine=AFFINE):
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def refusal(path, read=nifti.read_volume):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.int64, bool])
def test_round_trip(tmp_path, suffix, dtype):
    path = tmp_path / f"a{suffix}"
    nifti.write_volume(path, volume(dtype=dtype), AFFINE)
    values, affine, spacing_mm = nifti.read_volume(path)
    np.testing.assert_array_equal(values, volume(dtype=dtype))
    assert values.dtype == np.float32
    np.testing.assert_allclose(affine, AFFINE)
    np.testing.assert_allclose(spacing_mm, [2, 1.5, 3])
    shape, affine, spacing_mm = nifti.read_grid(path)
    assert shape == (5, 4, 3)
    np.testing.assert_allclose(affine, AFFINE)
    np.testing.assert_allclose(spacing_mm, [2, 1.5, 3])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_extensions_of_the_header_may_be_long(tmp_path, kind):
    image = kind(volume(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"what a scanner has to say " * 100))
    nib.save(image, tmp_path / "a.nii")
    np.testing.assert_array_equal(nifti.read_volume(tmp_path / "a.nii")[0], volume())


def test_an_extension_that_is_cut_off(tmp_path):
    """The header of the extension declares more than the file holds."""
    image = nib.Nifti1Image(volume(), AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a" * 100))
    nib.save(image, tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[352:356] = np.int32(10**6).tobytes()
    (tmp_path / "a.nii").write_bytes(content)
    assert "not a NIfTI image that can be read" in refusal(tmp_path / "a.nii")


def test_nifti_2_is_read(tmp_path):
    nib.save(nib.Nifti2Image(volume(), AFFINE), tmp_path / "a.nii")
    np.testing.assert_array_equal(nifti.read_volume(tmp_path / "a.nii")[0], volume())


def test_scaled_integers_are_read_as_their_values(tmp_path):
    image = nib.Nifti1Image(volume(dtype=np.int16), AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    assert np.ptp(nifti.read_volume(tmp_path / "a.nii")[0]) == 0.5 * (volume().size - 1)


def test_trailing_axes_of_one_are_dropped(tmp_path):
    path = save(tmp_path / "a.nii.gz", volume((5, 4, 3, 1, 1)))
    assert nifti.read_volume(path)[0].shape == nifti.read_grid(path)[0] == (5, 4, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    values = volume()
    values[1, 2, 0] = value
    assert "1 of 60 voxels are NaN or infinite" in refusal(save(tmp_path / "a.nii", values))


def test_zero_spacing(tmp_path):
    path = save(tmp_path / "a.nii", volume())
    header = bytearray(path.read_bytes())
    header[80:92] = np.array([2, 0, 3], "<f4").tobytes()  # pixdim[1:4]
    path.write_bytes(header)
    assert "spacing is 2 x 0 x 3 mm" in refusal(path)


def test_voxels_may_be_arbitrarily_small(tmp_path):
    path = save(tmp_path / "a.nii", volume(), np.diag([0.02, 0.3, 0.9, 1]))
    np.testing.assert_allclose(nifti.read_volume(path)[2], [0.02, 0.3, 0.9], rtol=1e-6)


def test_forms_that_agree_at_the_first_voxel_alone(tmp_path):
    """Rotated by a hundredth about voxel 0: a millimetre at the far end."""
    image = nib.Nifti1Image(volume((100, 4, 3)), np.eye(4))
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.01), -np.sin(0.01)], [np.sin(0.01), np.cos(0.01)]]
    image.set_sform(np.eye(4), code=1)
    image.set_qform(turned, code=1)
    nib.save(image, tmp_path / "a.nii")
    with pytest.warns(UserWarning, match="sform and qform disagree by up to 0.99 mm"):
        nifti.read_volume(tmp_path / "a.nii")


def test_files_that_expand_too_far_are_refused_by_size_and_ratio(tmp_path, monkeypatch):
    path = save(tmp_path / "a.nii.gz", np.zeros((60, 50, 40), np.float32))
    assert nifti.read_volume(path)[0].shape == (60, 50, 40)  # hundredfold and more, but small
    monkeypatch.setattr(nifti, "LARGEST_EXPANDED", 1000)
    assert "expands from" in refusal(path)
    values = np.random.default_rng(0).standard_normal((60, 50, 40)).astype(np.float32)
    assert nifti.read_volume(save(tmp_path / "b.nii.gz", values))[0].shape == (60, 50, 40)


def test_affine_without_size(tmp_path):
    affine = AFFINE.copy()
    path = save(tmp_path / "a.nii", volume(), affine)
    header = bytearray(path.read_bytes())
    header[280:296] = bytes(16)  # srow_x
    header[280 + 16 : 280 + 32] = bytes(16)  # srow_y
    path.write_bytes(header)
    assert "affine has a spacing" in refusal(path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 4, 3, 2), "expected one 3-D volume"),
        ((5, 4, 1), "at least 2 voxels"),
        ((5, 4), "at least 2 voxels"),
    ],
)
def test_shapes_that_are_not_a_volume(tmp_path, shape, message):
    path = save(tmp_path / "a.nii", volume(shape))
    assert message in refusal(path)
    assert message in refusal(path, nifti.read_grid)


def test_colour_is_refused(tmp_path):
    colours = np.zeros((5, 4, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "expected one real number" in refusal(save(tmp_path / "a.nii", colours))


def test_surfaces_and_networks_are_refused(tmp_path):
    axes = [nib.cifti2.ScalarAxis(["a", "b"]), nib.cifti2.ScalarAxis(["c", "d", "e"])]
    nib.save(nib.Cifti2Image(np.zeros((2, 3), np.float32), axes), tmp_path / "a.dconn.nii")
    with pytest.raises(UserError, match="holds Cifti2 data; expected a 3-D image"):
        nifti.read_volume(tmp_path / "a.dconn.nii")


def test_not_a_nifti(tmp_path):
    for name in ("a.nii", "a.nii.gz", "a.png"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 50)
        refusal(tmp_path / name)
    (tmp_path / "empty.nii").write_bytes(b"")
    assert "not a NIfTI" in refusal(tmp_path / "empty.nii")
    assert "no such file" in refusal(tmp_path / "none.nii")
    refusal(tmp_path)


@pytest.mark.parametrize("keep", [30, 0.5, 0.95])
def test_truncated_gzip(tmp_path, keep):
    path = tmp_path / "a.nii.gz"
    nifti.write_volume(path, np.random.default_rng(0).normal(size=(20, 20, 20)), AFFINE)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep > 1 else int(keep * len(whole))])
    refusal(path)


def test_truncated_and_damaged(tmp_path):
    path = save(tmp_path / "a.nii", volume())
    path.write_bytes(path.read_bytes()[:-8])
    assert "cut off" in refusal(path)
    path = tmp_path / "b.nii.gz"
    whole = bytearray(gzip.compress((tmp_path / "a.nii").read_bytes()))
    whole[200:230] = bytes(30)
    path.write_bytes(whole)
    refusal(path)


def test_labels(tmp_path):
    labels, affine, _ = nifti.read_labels(save(tmp_path / "a.nii", volume()))
    np.testing.assert_array_equal(labels, volume())
    assert labels.dtype == np.int32
    np.testing.assert_allclose(affine, AFFINE)
    message = refusal(save(tmp_path / "b.nii", volume() + 0.25), nifti.read_labels)
    assert "whole numbers, found 0.25" in message
    assert "found nan" in refusal(save(tmp_path / "c.nii", volume() * np.float32(np.nan)), nifti.read_labels)


def test_whole_numbers_beyond_float32(tmp_path):
    ids = np.full((3, 4, 5), 614454277, np.int32)
    ids[0] = 2**24 + 1
    for dtype, more in [(np.int32, 0), (np.uint32, 2**31), (np.int64, 2**40), (np.uint64, 2**40)]:
        stored = ids.astype(dtype) + dtype(more)
        path = tmp_path / f"{np.dtype(dtype)}.nii"
        nib.save(nib.Nifti1Image(stored, AFFINE, dtype=dtype), path)
        for values in (nifti.read_labels(path)[0], nifti.read_volume(path, exact=True)[0]):
            assert [int(value) for value in values[:2, 0, 0]] == [int(value) for value in stored[:2, 0, 0]]
        assert nifti.read_volume(path)[0].dtype == np.float32
        nifti.write_volume(tmp_path / "again.nii", nifti.read_labels(path)[0], AFFINE)
        np.testing.assert_array_equal(nifti.read_labels(tmp_path / "again.nii")[0], stored)
    doubles = save(tmp_path / "doubles.nii", ids.astype(np.float64))
    np.testing.assert_array_equal(nifti.read_volume(doubles, exact=True)[0], ids)
    np.testing.assert_array_equal(nifti.read_labels(doubles)[0], ids)
    assert nifti.read_volume(doubles)[0].dtype == np.float32
    assert nifti.read_volume(save(tmp_path / "fractions.nii", ids / 3), exact=True)[0].dtype == np.float32


def scaled_labels(path, stored, slope, inter=0.0):
    """A file whose values are `slope * stored + inter`."""
    nib.save(nib.Nifti1Image(stored, AFFINE), path)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, inter], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(content)
    return path


def test_labels_that_are_scaled_or_rounded(tmp_path):
    stored = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 12
    path = scaled_labels(tmp_path / "a.nii", stored, 1.0010718)  # 11 reads 11.0118
    assert abs(nifti.read_volume(path)[0].max() - 11.01179) < 1e-5
    np.testing.assert_array_equal(nifti.read_labels(path)[0], stored)
    near = (stored + 1e-6).astype(np.float32)
    np.testing.assert_array_equal(nifti.read_labels(save(tmp_path / "b.nii", near))[0], stored)
    assert "found 1.01" in refusal(save(tmp_path / "c.nii", stored * np.float32(1.01)), nifti.read_labels)
    halves = scaled_labels(tmp_path / "d.nii", stored, 0.5)
    assert "found 0.5 (its voxels are scaled by 0.5)" in refusal(halves, nifti.read_labels)
    packed = scaled_labels(tmp_path / "e.nii", np.round(stored * (255 / 12)).astype(np.uint8), 12 / 255)
    np.testing.assert_array_equal(nifti.read_labels(packed)[0], stored)


def test_writing_to_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match="can't be written"):
        nifti.write_volume(tmp_path / "none" / "a.nii", volume(), AFFINE)
    with pytest.raises(UserError, match="can't be written"):
        nifti.write_volume(tmp_path / "a.png", volume(), AFFINE)
