"""DICOM whose slices differ in scaling, and multi-frame files, written by pydicom."""

import numpy as np
import pytest
import scipy.spatial

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


def enhanced(path, *, depths_mm, turns=None, slopes=None, segments=None, groups=True):
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
        if segments:
            frame.SegmentIdentificationSequence = items(ReferencedSegmentNumber=segments[number])
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


def classic(
    folder, *, each=None, syntax=None, step=(0, 0, 3), turn=(1, 0, 0, 0, 1, 0), planes=STORED, **changes
):
    """One file per slice, with attributes of all slices, and of each by its number; None removes one."""
    folder.mkdir()
    for number, pixels in enumerate(planes):
        data = dataset(pixels, CT)
        if syntax:
            data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
            if "Big" in syntax:
                data.PixelData = pixels.byteswap().tobytes()
        data["PixelData"].VR = "OW"
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.ImagePositionPatient = (ORIGIN + np.multiply(step, number)).tolist()
        data.ImageOrientationPatient = [f"{cosine:.12g}" for cosine in turn]
        data.PixelSpacing, data.InstanceNumber = SPACING, number + 1
        for keyword, value in (changes | (each(number) if each else {})).items():
            if value is None:
                del data[keyword]
            else:
                setattr(data, keyword, value)
        data.save_as(folder / f"{7 * number % 5}.dcm", enforce_file_format=True)
    return folder


def test_every_slice_has_its_own_slope(tmp_path):
    slopes = np.array([1, 0.25, 0.125, 2])
    image = read_image(classic(tmp_path / "scan", each=lambda k: {"RescaleSlope": slopes[k]}))
    np.testing.assert_array_equal(image.values, (STORED * slopes[:, None, None]).transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine, AFFINE)


@pytest.mark.parametrize(
    "syntax", ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian"]
)
def test_transfer_syntaxes(tmp_path, syntax):
    image = read_image(classic(tmp_path / "scan", syntax=syntax))
    np.testing.assert_array_equal(image.values, STORED.transpose(2, 1, 0))
    np.testing.assert_allclose(image.affine, AFFINE)


OBLIQUE = scipy.spatial.transform.Rotation.from_euler("xyz", [20, -15, 30], degrees=True).as_matrix()


@pytest.mark.parametrize(
    "turn",
    [
        (0, 1, 0, -1, 0, 0),
        (0, -1, 0, 1, 0, 0),
        (-1, 0, 0, 0, 1, 0),
        (1, 0, 0, 0, 0, -1),
        OBLIQUE[:, :2].T.ravel(),
    ],
    ids=["left side", "right side", "feet first", "coronal", "oblique"],
)
def test_positions_of_the_patient(tmp_path, turn):
    normal = np.cross(turn[:3], turn[3:])
    image = read_image(classic(tmp_path / "scan", turn=turn, step=3 * normal))
    lps = np.eye(4)
    lps[:3, :3] = np.stack([1.5 * np.array(turn[:3]), 2.0 * np.array(turn[3:]), 3 * normal], axis=-1)
    lps[:3, 3] = ORIGIN
    np.testing.assert_allclose(image.affine, np.diag([-1, -1, 1, 1]) @ lps, atol=1e-9)
    np.testing.assert_array_equal(image.values, STORED.transpose(2, 1, 0))


def table():
    item = items(LUTDescriptor=[STORED.size, 0, 16], ModalityLUTType="US")
    item[0].LUTData = (3 * np.arange(STORED.size, dtype=np.uint16)).tobytes()
    item[0]["LUTData"].VR = "OW"
    return item


def test_stored_numbers_mean_what_the_header_says(tmp_path):
    tabled: dict = {"RescaleSlope": None, "RescaleIntercept": None, "ModalityLUTSequence": table()}
    signed = STORED.astype(np.int16) - 60
    bits = {"BitsStored": 12, "HighBit": 11}
    cases: list[tuple[dict, np.ndarray]] = [
        ({"PhotometricInterpretation": "MONOCHROME1"}, STORED),  # how it is shown, not what it is
        (tabled, 3 * STORED),
        ({**bits, "planes": STORED | 0xA000}, STORED),  # an overlay in the unused bits
        ({**bits, "planes": (signed & 0xFFF).astype(np.uint16), "PixelRepresentation": 1}, signed),
    ]
    for number, (changes, expected) in enumerate(cases):
        image = read_image(classic(tmp_path / str(number), **changes))
        np.testing.assert_array_equal(image.values, expected.transpose(2, 1, 0))
        np.testing.assert_allclose(image.affine, AFFINE)


def test_run_lengths_are_decoded(tmp_path):
    folder = classic(tmp_path / "scan")
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        data.save_as(path)
    np.testing.assert_array_equal(read_image(folder).values, STORED.transpose(2, 1, 0))


def test_enhanced_files_of_one_frame_each(tmp_path):
    for number, depth_mm in enumerate([0, 6, 3, 9]):
        path = tmp_path / "scan" / f"{number}.dcm"
        enhanced(path, depths_mm=[depth_mm])
        data = pydicom.dcmread(path)
        data.NumberOfFrames, data.PixelData = 1, STORED[number].tobytes()
        data["PixelData"].VR = "OW"
        data.save_as(path)
    image = read_image(tmp_path / "scan")
    np.testing.assert_array_equal(image.values, STORED[[0, 2, 1, 3]].transpose(2, 1, 0) - 1000.0)


COLOURS: dict = {"SamplesPerPixel": 3, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
COLOURS |= {"PlanarConfiguration": 0, "PixelData": bytes(STORED[0].size * 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"each": lambda k: {"PixelSpacing": [2.0, 1.5 if k else 1.0]}}, "differ in PixelSpacing"),
        (
            {"each": lambda k: {"ImageOrientationPatient": [1 if k else -1, 0, 0, 0, 1, 0]}},
            "differ in ImageOrientationPatient",
        ),
        ({"each": lambda k: {"PixelSpacing": None} if k == 2 else {}}, "lacks PixelSpacing"),
        ({"ImageOrientationPatient": None}, "lacks ImageOrientationPatient"),
        ({"ImagePositionPatient": None}, "doesn't say where its frames lie"),
        ({"BitsStored": 12}, "retired encoding"),
        ({"step": (0, 0.1, 3)}, "tilted gantry"),  # a voxel in 20 slices
        ({"step": (0, 1, 3), "planes": STORED[:2]}, "tilted gantry"),
        ({"step": (0, 0, 0), "planes": STORED[:2]}, "several time points"),
        ({"each": lambda k: {"ImagePositionPatient": [0, 0, [0, 3, 9, 12][k]]}}, "is a slice missing"),
        ({"planes": [STORED[0], STORED[1][:4]]}, "2 sizes"),
        ({"PhotometricInterpretation": "RGB", **COLOURS}, "expected one real number each"),
    ],
)
def test_slices_that_are_not_one_volume(tmp_path, changes, message):
    assert message in refusal(classic(tmp_path / "scan", **changes))


def frames(path, **changes):
    """A multi-frame file without functional groups."""
    data = dataset(STORED, CT)
    data["PixelData"].VR = "OW"
    data.NumberOfFrames = len(STORED)
    data.PixelSpacing, data.ImagePositionPatient = SPACING, ORIGIN.tolist()
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    for keyword, value in changes.items():
        setattr(data, keyword, value)
    data.save_as(path, enforce_file_format=True)
    return read_image(path)


def test_offsets_of_a_dose(tmp_path):
    """Distances from the first frame along the normal, or heights in the patient: PS3.3 C.8.8.3.2."""
    for offsets in ([0, 3, 6, 9], [-30, -27, -24, -21]):
        image = frames(tmp_path / "dose.dcm", GridFrameOffsetVector=offsets, DoseGridScaling=0.5)
        np.testing.assert_allclose(image.affine, AFFINE)
        np.testing.assert_allclose(image.values, 0.5 * STORED.transpose(2, 1, 0))
    feet_first = [-1, 0, 0, 0, 1, 0]
    along = frames(tmp_path / "a.dcm", GridFrameOffsetVector=[0, 3, 6, 9], ImageOrientationPatient=feet_first)
    assert along.affine[2, 2] == -3
    heights = [-30, -33, -36, -39]
    high = frames(tmp_path / "h.dcm", GridFrameOffsetVector=heights, ImageOrientationPatient=feet_first)
    np.testing.assert_allclose(high.affine, along.affine)


def test_nuclear_medicine_describes_its_detector(tmp_path):
    detector = items(ImagePositionPatient=ORIGIN.tolist(), ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    data = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "SpacingBetweenSlices": 3}
    image = frames(tmp_path / "nm.dcm", DetectorInformationSequence=detector, **data)
    np.testing.assert_allclose(image.affine, AFFINE)


def test_objects_without_pixels_are_named(tmp_path):
    data = dataset(STORED, "1.2.840.10008.5.1.4.1.1.481.3")
    for keyword in ("PixelData", "Rows", "Columns"):
        del data[keyword]
    data.Modality = "RTSTRUCT"
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert "modality RTSTRUCT; expected an image" in refusal(tmp_path / "a.dcm")


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
        ({"depths_mm": [0, 3, 6, 9], "segments": [1, 1, 2, 2]}, "holds 2 segments"),
        ({"depths_mm": [0, 3, 6, 9], "groups": False}, "doesn't say where its frames lie"),
    ]
    for keywords, message in cases:
        enhanced(path, **keywords)
        assert message in refusal(path)
    enhanced(path, depths_mm=[0, 3, 6, 9])
    path.write_bytes(path.read_bytes()[:-40])
    refusal(path)
    (tmp_path / "b.dcm").write_bytes(b"nothing of the kind")
    refusal(tmp_path / "b.dcm")


def test_slices_compressed_by_a_method_without_decoder(tmp_path):
    folder = classic(tmp_path / "scan")
    for path in folder.iterdir():
        data = pydicom.dcmread(path)
        data.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        data.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f"])
        data.save_as(path)
    message = refusal(folder)
    assert "compressed as High-Throughput JPEG 2000" in message and "pip install pylibjpeg[all]" in message


def test_frames_compressed_by_a_method_without_decoder(tmp_path):
    path = tmp_path / "scan" / "a.dcm"
    enhanced(path, depths_mm=[0, 3, 6, 9])
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f" for _ in STORED])
    data.save_as(path, enforce_file_format=True)
    assert "pylibjpeg" in refusal(path)
