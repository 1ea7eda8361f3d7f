"""DICOM whose slices differ in scaling, and multi-frame files, written by pydicom."""

import numpy as np
import pytest

from adregnet_jax.data.io.images import read_image
from adregnet_jax.errors import UserError

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("SimpleITK")

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
STORED = np.arange(4 * 5 * 6, dtype=np.uint16).reshape(4, 5, 6)  # [slice, row, column]
ORIGIN, SPACING = np.array([-23.0, -19, -30]), [2.0, 1.5]  # of rows, of columns
AFFINE = np.array([[-1.5, 0, 0, 23], [0, -2.0, 0, 19], [0, 0, 3.0, -30], [0, 0, 0, 1]])  # 3 mm between slices


def items(**values):
    """A sequence of one item."""
    item = pydicom.Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


def dataset(pixels, kind):
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = kind
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    data.Modality = "CT"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.Rows, data.Columns = pixels.shape[-2:]
    data.PixelData = pixels.tobytes()
    return data


def enhanced(path, *, depths_mm, turns=None, slopes=None, groups=True):
    """A multi-frame file with its frames at these depths."""
    data = dataset(STORED, ENHANCED_CT)
    data.NumberOfFrames = len(STORED)
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence = items(PixelSpacing=SPACING)
    shared.PlaneOrientationSequence = items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelValueTransformationSequence = items(RescaleSlope=1, RescaleIntercept=-1000)
    data.SharedFunctionalGroupsSequence = pydicom.Sequence([shared])
    frames = []
    for number, depth_mm in enumerate(depths_mm):
        frame = pydicom.Dataset()
        frame.PlanePositionSequence = items(ImagePositionPatient=[*ORIGIN[:2], float(depth_mm)])
        if turns:
            frame.PlaneOrientationSequence = items(ImageOrientationPatient=turns[number])
        if slopes:
            frame.PixelValueTransformationSequence = items(RescaleSlope=slopes[number], RescaleIntercept=0)
        frames.append(frame)
    if groups:
        data.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    path.parent.mkdir(exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path.parent


def refusal(path):
    with pytest.raises(UserError) as error:
        read_image(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_every_slice_has_its_own_slope(tmp_path):
    slopes = np.array([1, 0.25, 0.125, 2])
    for number, (pixels, slope) in enumerate(zip(STORED, slopes, strict=True)):
        data = dataset(pixels, CT)
        data.RescaleSlope, data.RescaleIntercept = slope, 0
        data.ImagePositionPatient = [*ORIGIN[:2], float(ORIGIN[2] + 3 * number)]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.InstanceNumber = SPACING, number + 1
        data.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    image = read_image(tmp_path)
    np.testing.assert_array_equal(image.values, (STORED * slopes[:, None, None]).transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine, AFFINE)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]])
def test_frames_lie_where_the_file_puts_them(tmp_path, order):
    folder = enhanced(tmp_path / "scan" / "a.dcm", depths_mm=ORIGIN[2] + 3 * np.array(order))
    for path in (folder, folder / "a.dcm"):
        image = read_image(path)
        expected = STORED[np.argsort(order)].transpose(2, 1, 0) - 1000.0
        np.testing.assert_array_equal(image.values, expected)
        np.testing.assert_allclose(image.affine, AFFINE)


def test_every_frame_has_its_own_slope(tmp_path):
    slopes = [1, 0.5, 0.25, 2]
    folder = enhanced(tmp_path / "scan" / "a.dcm", depths_mm=[0, 3, 6, 9], slopes=slopes)
    expected = (STORED * np.reshape(slopes, (4, 1, 1))).transpose(2, 1, 0)
    np.testing.assert_array_equal(read_image(folder).values, expected)


def test_frames_that_are_not_one_volume(tmp_path):
    path = tmp_path / "scan" / "a.dcm"
    cases: list[tuple[dict, str]] = [
        ({"depths_mm": [0, 3, 9, 12]}, "slices lie 3 to 6 mm apart"),
        ({"depths_mm": [0, 3, 0, 3]}, "several time points"),
        ({"depths_mm": [0, 3, 6, 9], "turns": 3 * [[1, 0, 0, 0, 1, 0]] + [[0, 1, 0, 0, 0, 1]]}, "differ in"),
        ({"depths_mm": [0, 3, 6, 9], "groups": False}, "doesn't say where its 4 frames lie"),
    ]
    for keywords, message in cases:
        enhanced(path, **keywords)
        assert message in refusal(path)
    enhanced(path, depths_mm=[0, 3, 6, 9])
    path.write_bytes(path.read_bytes()[:-40])
    refusal(path)
    (tmp_path / "b.dcm").write_bytes(b"nothing of the kind")
    refusal(tmp_path / "b.dcm")


def test_frames_compressed_by_a_method_without_decoder(tmp_path):
    path = tmp_path / "scan" / "a.dcm"
    enhanced(path, depths_mm=[0, 3, 6, 9])
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f" for _ in STORED])
    data.save_as(path, enforce_file_format=True)
    assert "pylibjpeg" in refusal(path)
