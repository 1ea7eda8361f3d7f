"""Folders of DICOM files that are not one series of slices."""

import nibabel as nib
import numpy as np
import pydicom
import pytest

from adregnet_jax.data.dicom.derived import check_can_be_derived, derived_series
from adregnet_jax.data.dicom.files import write_object
from adregnet_jax.data.dicom.series import read_series
from adregnet_jax.data.io.images import read_image
from adregnet_jax.errors import UserError
from tests.data.dicom import studies

LPS = nib.affines.from_matvec(np.diag([2.0, 3, 4]), [-10, -20, 30])
VALUES = np.arange(5 * 4 * 6).reshape(5, 4, 6)


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        read_series(folder, **options)
    return str(caught.value)


def change(folder, only=None, **values):
    for path in list(folder.iterdir())[slice(only)]:
        made = pydicom.dcmread(path)
        for keyword, value in values.items():
            setattr(made, keyword, value)
        made.save_as(path)


def test_the_headers_describe_the_grid_of_the_image(tmp_path):
    turned = LPS.copy()
    turned[:3, :3] = turned[:3, [2, 0, 1]]  # sagittal slices
    for name, lps in (("axial", LPS), ("sagittal", turned)):
        folder = studies.write_ct(tmp_path / name, VALUES, lps)
        series = read_series(folder)
        image = read_image(folder)
        series.check_grid(image)
        np.testing.assert_allclose(series.lps, lps, atol=1e-6)
        np.testing.assert_array_equal(image.values, VALUES)


def test_mixed_series_are_listed_and_chosen_by_uid(tmp_path):
    studies.write_ct(tmp_path / "a", VALUES, LPS, series="1.2.77")
    studies.write_ct(tmp_path / "b", VALUES[..., :4], LPS, series="1.2.88")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / f"b{path.name}")
    message = refusal(tmp_path / "a")
    assert "2 DICOM series: 1.2.77 (CT, 6 files), 1.2.88 (CT, 4 files)" in message
    assert "choose one by its UID" in message and "Rosenkrantz" not in message
    assert read_series(tmp_path / "a", series="1.2.88").shape == (5, 4, 4)
    assert "1.2.77 (CT, 6 files)" in refusal(tmp_path / "a", series="1.2.99")


def test_folders_without_a_series(tmp_path):
    (tmp_path / "notes.txt").write_text("no scan")
    assert "holds 0 DICOM series" in refusal(tmp_path)
    assert "expected a folder" in refusal(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, r"colour images \(RGB\)"),
        ({"FrameOfReferenceUID": None}, "without FrameOfReferenceUID"),
        ({"ImagePositionPatient": None}, "without ImagePositionPatient"),
        ({"only": 2, "PixelSpacing": [5, 5]}, "differ in PixelSpacing"),
    ],
)
def test_slices_of_another_kind(tmp_path, values, message):
    change(studies.write_ct(tmp_path / "a", VALUES, LPS), **values)
    with pytest.raises(UserError, match=message):
        read_series(tmp_path / "a")


def test_a_compressed_series_names_its_decoder(tmp_path):
    for path in studies.write_ct(tmp_path / "a", VALUES, LPS).iterdir():
        made = pydicom.dcmread(path)
        made.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2K
        made.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51"])
        made.save_as(path)
    assert "pip install pylibjpeg" in refusal(tmp_path / "a")
    with pytest.raises(UserError, match=r"compressed as .*JPEG 2000.*pip install pylibjpeg"):
        read_image(tmp_path / "a")


def test_a_time_series_and_a_missing_slice(tmp_path):
    twice = studies.write_ct(tmp_path / "twice", VALUES, LPS, series="1.2.77")
    studies.write_ct(tmp_path / "again", VALUES, LPS, series="1.2.77")
    for path in (tmp_path / "again").iterdir():
        path.rename(twice / f"b{path.name}")
    assert "2 slices at a position: a time series?" in refusal(twice)
    gap = studies.write_ct(tmp_path / "gap", VALUES, LPS)
    (gap / "im003.dcm").unlink()
    assert "is a slice missing?" in refusal(gap)


def test_only_ct_and_mr_are_derived_from(tmp_path):
    change(
        studies.write_ct(tmp_path / "a", VALUES, LPS),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.128",
        Modality="PT",
    )
    with pytest.raises(UserError, match="writes CT and MR series, and this is PT"):
        check_can_be_derived(read_series(tmp_path / "a"))


@pytest.mark.parametrize(("low", "high"), [(-1024, 2000), (-3000, 60000), (0.0, 0.2), (7.0, 7.0)])
def test_stored_values_are_those_of_the_volume(tmp_path, low, high):
    """Half a HU in the range of a CT, at most a thousandth of the range elsewhere."""
    series = read_series(studies.write_ct(tmp_path / "a", VALUES, LPS))
    volume = np.random.default_rng(0).uniform(low, high, VALUES.shape).astype(np.float32)
    volume[0, 0, 0], volume[-1, -1, -1] = low, high
    reached = np.stack([np.arange(6), np.arange(6)], axis=-1)
    slices = derived_series(volume, reached, fixed=series, moving=series, description="copied")
    for k, made in enumerate(slices):
        studies.save(tmp_path / "out" / f"{k}.dcm", made)
    read = read_image(tmp_path / "out").values
    assert np.abs(read - volume).max() <= max(
        0.51 if high == 2000 else 0, (high - low) / 1000, 0.5 * (high == low)
    )


def test_an_mr_series_is_derived(tmp_path):
    """With a slope of its own, since an MR has none."""
    studies.needs("dciodvfy")
    for path in studies.write_ct(tmp_path / "a", VALUES, LPS).iterdir():
        made = pydicom.dcmread(path)
        for keyword in ("KVP", "XRayTubeCurrent", "RescaleSlope", "RescaleIntercept", "RescaleType"):
            del made[keyword]
        made.SOPClassUID, made.Modality, made.Laterality = pydicom.uid.MRImageStorage, "MR", ""
        made.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
        made.ScanningSequence, made.SequenceVariant, made.ScanOptions = "GR", "NONE", ""
        made.MRAcquisitionType, made.EchoTime, made.EchoTrainLength = "3D", "3", "1"
        made.RepetitionTime = "8"
        made.save_as(path)
    series = read_series(tmp_path / "a")
    reached = np.stack([np.arange(6), np.arange(6)], axis=-1)
    for volume in (VALUES * 40.0, VALUES / 300):
        values = volume.astype(np.float32)
        slices = derived_series(values, reached, fixed=series, moving=series, description="copied")
        for k, derived in enumerate(slices):
            write_object(tmp_path / f"{k}.dcm", derived, anonymize=False)
            assert studies.problems(tmp_path / f"{k}.dcm") == []
        stored = slices[2].get("RescaleSlope", 1) * slices[2].pixel_array.T + slices[2].get(
            "RescaleIntercept", 0
        )
        np.testing.assert_allclose(stored, values[..., 2], atol=float(np.ptp(values)) / 1000)


def test_slices_that_differ_in_all_they_may(tmp_path):
    """A slope for each slice, a changing tube voltage, and a type without its third value."""
    studies.needs("dciodvfy")
    for number, path in enumerate(sorted(studies.write_ct(tmp_path / "a", VALUES, LPS).iterdir())):
        made = pydicom.dcmread(path)
        made.KVP, made.RescaleSlope, made.RescaleIntercept = 100 + number, 1 + number / 4, -1000 - number
        made.ImageType = ["ORIGINAL", "PRIMARY"]
        made.save_as(path)
    series = read_series(tmp_path / "a")
    values = read_image(tmp_path / "a").values
    reached = np.stack([np.arange(6), np.arange(6)], axis=-1)
    (tmp_path / "out").mkdir()
    slices = derived_series(values, reached, fixed=series, moving=series, description="copied")
    for k, derived in enumerate(slices):
        write_object(tmp_path / "out" / f"{k}.dcm", derived, anonymize=False)
        assert studies.problems(tmp_path / "out" / f"{k}.dcm") == []
    np.testing.assert_allclose(read_image(tmp_path / "out").values, values, atol=float(np.ptp(values)) / 1000)
