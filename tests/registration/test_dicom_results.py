"""A registration of two DICOM series as DICOM objects, read back by other programs."""

from typing import Any

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from scipy import ndimage

from adregnet_jax.data.dicom.files import write_object
from adregnet_jax.data.dicom.registration import deformable_registration, spatial_registration
from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.transforms import write_field, write_matrix
from adregnet_jax.errors import UserError
from adregnet_jax.registration.dicom import (
    read_dicom_landmarks,
    read_dicom_pair,
    read_structure_labels,
    write_dicom,
)
from adregnet_jax.registration.field import (
    DisplacementField,
    after_field,
    invert_field,
    reverse_field,
    warp_image,
    warp_points,
)
from adregnet_jax.registration.files import read_scans
from adregnet_jax.registration.measure import ScanPair
from adregnet_jax.registration.options import ScanFiles
from adregnet_jax.registration.results import RegisteredScans
from tests.data.dicom import studies

# Slices that are stacked towards the feet, and rows that run obliquely.
FIXED_LPS = nib.affines.from_matvec(
    [[2.0 * np.cos(0.3), -2.5 * np.sin(0.3), 0], [2.0 * np.sin(0.3), 2.5 * np.cos(0.3), 0], [0, 0, 3.0]],
    [-20, -17, 40],
)
MOVING_LPS = nib.affines.from_matvec(np.diag([1.8, 2.2, 2.5]), [-22, -19, 37])
FIXED_SHAPE, MOVING_SHAPE = (20, 16, 12), (24, 20, 16)
MATRIX = nib.affines.from_matvec(  # fixed RAS mm -> moving RAS mm
    [[0.99, 0.06, 0.01], [-0.05, 1.02, 0.02], [0.01, -0.03, 0.98]], [1.5, -2.0, 0.7]
)
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


def smooth(shape, seed, scale):
    noise = np.random.default_rng(seed).normal(size=shape)
    wide = ndimage.gaussian_filter(noise, [3, 3, 3, 0][: len(shape)])
    return (scale * wide / wide.std()).astype(np.float32)


def write_study(folder):
    """Two series with frames of reference of their own, in `fixed` and `moving`."""
    series = (("fixed", FIXED_LPS, FIXED_SHAPE, 1), ("moving", MOVING_LPS, MOVING_SHAPE, 2))
    for name, lps, shape, seed in series:
        values = np.clip(np.round(300 * smooth(shape, seed, 1)), -1000, 3000).astype(int)
        frame = studies.FRAME if name == "fixed" else studies.OTHER_FRAME
        studies.write_ct(folder / name, values, lps, frame=frame)
    return folder


def made_up_registration(fixed, moving, **_):
    """What is written doesn't depend on how it was found."""
    before = DisplacementField(jnp.asarray(smooth((*fixed.shape, 3), 3, 0.4)), jnp.asarray(fixed.affine))
    field = after_field(before, jnp.asarray(MATRIX))
    warped = np.asarray(warp_image(field, jnp.asarray(moving.values), moving.affine, padding="border"))
    inverse = reverse_field(invert_field(before), MATRIX, shape=moving.shape, affine=moving.affine)
    return RegisteredScans(
        ScanPair(fixed, moving), field, inverse, MATRIX, Image(warped, fixed.affine), "mono", {}
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def registered(study):
    return made_up_registration(read_image(study / "fixed"), read_image(study / "moving"))


@pytest.fixture(scope="module")
def written(study, registered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "dicom"
    pair = read_dicom_pair(ScanFiles(study / "fixed", study / "moving"), anonymize=False)
    write_dicom(folder, registered, pair)
    return folder


def mapped_by_the_standard(path, points_lps):
    """Points of the registered frame in the source frame, by the text of PS3.3 C.20.3.1.1 alone."""
    (item,) = pydicom.dcmread(path).DeformableRegistrationSequence
    (grid,) = item.DeformableRegistrationGridSequence

    def matrix(sequence):
        return np.array(sequence[0].FrameOfReferenceTransformationMatrix, float).reshape(4, 4)

    pre = matrix(item.PreDeformationMatrixRegistrationSequence)
    post = matrix(item.PostDeformationMatrixRegistrationSequence)
    nx, ny, nz = grid.GridDimensions
    offsets = np.frombuffer(grid.VectorGridData, "<f4").reshape(nz, ny, nx, 3)
    row, column = np.array(grid.ImageOrientationPatient, float).reshape(2, 3)
    depth = np.cross(row, column)
    start = np.array(grid.ImagePositionPatient, float)
    mapped = []
    for point in points_lps:
        i, j, k = (
            axis @ (point - start) / size
            for axis, size in zip((row, column, depth), grid.GridResolution, strict=True)
        )
        offset = [
            ndimage.map_coordinates(offsets[..., c], [[k], [j], [i]], order=1, mode="nearest")[0]
            for c in range(3)
        ]
        before = pre @ [*point, 1] + [*offset, 0]
        mapped.append((post @ before)[:3])
    return np.array(mapped)


@pytest.mark.parametrize("name", ["registration.dcm", "inverse.dcm"])
def test_the_standard_maps_points_as_the_field_does(written, registered, name):
    field = registered.field if name == "registration.dcm" else registered.inverse
    voxels = np.random.default_rng(5).uniform(0, np.array(field.shape) - 1, (50, 3))
    points = nib.affines.apply_affine(np.asarray(field.affine), voxels)
    ours = np.asarray(warp_points(field, points))
    standard = mapped_by_the_standard(written / name, points * [-1, -1, 1]) * [-1, -1, 1]
    assert np.linalg.norm(ours - points, axis=1).min() > 0.5
    np.testing.assert_allclose(standard, ours, atol=0.01)


def test_both_objects_lead_there_and_back(written, registered):
    """The registered frame of the one is the source frame of the other."""
    there, back = (pydicom.dcmread(written / name) for name in ("registration.dcm", "inverse.dcm"))
    assert there.FrameOfReferenceUID == studies.FRAME
    assert there.DeformableRegistrationSequence[0].SourceFrameOfReferenceUID == studies.OTHER_FRAME
    assert back.FrameOfReferenceUID == studies.OTHER_FRAME
    assert back.DeformableRegistrationSequence[0].SourceFrameOfReferenceUID == studies.FRAME
    centre = nib.affines.apply_affine(FIXED_LPS, [[9.2, 8.1, 5.7]])
    through = mapped_by_the_standard(
        written / "inverse.dcm", mapped_by_the_standard(written / "registration.dcm", centre)
    )
    np.testing.assert_allclose(
        through, centre, atol=0.2
    )  # the inverse is interpolated between its own voxels


def test_the_matrix_of_the_affine_object_leads_from_the_moving_to_the_fixed_frame(written):
    """PS3.3 C.20.2.1.1: it takes points of the item's frame to the registered one."""
    found = pydicom.dcmread(written / "affine.dcm")
    assert found.FrameOfReferenceUID == studies.FRAME
    for item in found.RegistrationSequence:
        (matrix,) = item.MatrixRegistrationSequence[0].MatrixSequence
        values = np.array(matrix.FrameOfReferenceTransformationMatrix, float).reshape(4, 4)
        if item.FrameOfReferenceUID == studies.FRAME:
            np.testing.assert_array_equal(values, np.eye(4))
            assert matrix.FrameOfReferenceTransformationMatrixType == "RIGID"
        else:
            assert item.FrameOfReferenceUID == studies.OTHER_FRAME
            assert matrix.FrameOfReferenceTransformationMatrixType == "AFFINE"
            fixed_ras = np.array([5.0, -7, 30, 1])
            moving_lps = LPS_TO_RAS @ MATRIX @ fixed_ras
            np.testing.assert_allclose(values @ moving_lps, LPS_TO_RAS @ fixed_ras, atol=1e-6)


def test_a_rigid_matrix_and_a_left_handed_grid(study, registered, tmp_path):
    """The grid of the object is right-handed, as the standard has it, whatever the field's is."""
    pair = read_dicom_pair(ScanFiles(study / "fixed", study / "moving"), anonymize=False)
    series: dict[str, Any] = {"fixed": pair.fixed, "moving": pair.moving}
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.02, -0.05), [1, 2, 3])
    made = spatial_registration(turn, **series)
    sequence = made.RegistrationSequence[1].MatrixRegistrationSequence[0].MatrixSequence
    assert sequence[0].FrameOfReferenceTransformationMatrixType == "RIGID"
    field = registered.field
    affine = np.asarray(field.affine, float)
    flipped = affine.copy()
    flipped[:3, 2], flipped[:3, 3] = -affine[:3, 2], affine[:3, 3] + affine[:3, 2] * (field.shape[2] - 1)
    displacement = np.asarray(field.displacement)[:, :, ::-1] * np.array([1, 1, -1], np.float32)
    for name, arguments in (("a", (np.asarray(field.displacement), affine)), ("b", (displacement, flipped))):
        made = deformable_registration(*arguments, matrix=np.eye(4), **series)
        write_object(tmp_path / f"{name}.dcm", made, anonymize=False)
    points = nib.affines.apply_affine(FIXED_LPS, np.random.default_rng(3).uniform(2, 9, (10, 3)))
    one, other = (mapped_by_the_standard(tmp_path / f"{name}.dcm", points) for name in "ab")
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_itk_reads_the_warped_series(written, registered):
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(written / "warped"))
    image = SimpleITK.ReadImage(names)
    values = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    assert np.abs(values - registered.warped.values).max() <= 0.51  # whole HU
    corner = image.TransformIndexToPhysicalPoint((19, 0, 11))
    np.testing.assert_allclose(corner, nib.affines.apply_affine(FIXED_LPS, [19, 0, 11]), atol=1e-4)


def test_other_programs_warp_to_the_same_image(study, registered, written, tmp_path):
    """SimpleITK and plastimatch, by the same field, within 0.5 % of the range; one voxel from its border."""
    displacement = np.asarray(registered.field.displacement)
    write_field(tmp_path / "field.nii.gz", displacement, np.asarray(registered.field.affine))
    field = SimpleITK.ReadImage(str(tmp_path / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(study / "moving"))
    moving = SimpleITK.Cast(SimpleITK.ReadImage(names), SimpleITK.sitkFloat32)
    reach = SimpleITK.Image(moving.GetSize(), SimpleITK.sitkUInt8) + 1
    reach.CopyInformation(moving)
    transform = SimpleITK.DisplacementFieldTransform(SimpleITK.Image(field))
    by_itk = SimpleITK.Resample(moving, field, transform, SimpleITK.sitkLinear, -1000.0)
    inside = SimpleITK.GetArrayFromImage(SimpleITK.Resample(reach, field, transform, SimpleITK.sitkLinear))
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(written / "warped"))
    ours = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(names))
    assert inside.mean() > 0.5
    limit = 0.005 * np.ptp(ours)
    assert np.abs(ours - SimpleITK.GetArrayFromImage(by_itk))[inside == 1].max() < limit
    studies.needs("plastimatch")
    SimpleITK.WriteImage(SimpleITK.Cast(field, SimpleITK.sitkVectorFloat32), str(tmp_path / "field.mha"))
    command = ["plastimatch", "warp", "--input", str(study / "moving"), "--xf", str(tmp_path / "field.mha")]
    command += ["--output-img", str(tmp_path / "warped.nrrd"), "--output-type", "float"]
    studies.subprocess.run(command, check=True, capture_output=True)
    theirs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "warped.nrrd")))
    assert np.abs(ours - theirs)[inside == 1].max() < limit


def test_another_program_writes_the_same_registrations(study, registered, written, tmp_path):
    """Both kinds of objects by plastimatch, from ITK's files of the matrix and of the field."""
    studies.needs("plastimatch")
    write_matrix(tmp_path / "affine.txt", MATRIX)
    displacement = np.asarray(registered.field.displacement)
    write_field(tmp_path / "field.nii.gz", displacement, np.asarray(registered.field.affine))
    field = SimpleITK.ReadImage(str(tmp_path / "field.nii.gz"), SimpleITK.sitkVectorFloat32)
    SimpleITK.WriteImage(field, str(tmp_path / "field.mha"))
    theirs = {}
    for name in ("affine.txt", "field.mha"):
        command = ["plastimatch", "xf-convert", "--input", str(tmp_path / name)]
        command += ["--output-dicom", str(tmp_path / f"of_{name}")]
        command += ["--fixed-rcs", str(study / "fixed"), "--moving-rcs", str(study / "moving")]
        studies.subprocess.run(command, check=True, capture_output=True)
        (theirs[name],) = (tmp_path / f"of_{name}").iterdir()
    found = []
    for path in (theirs["affine.txt"], written / "affine.dcm"):
        made = pydicom.dcmread(path)
        (item,) = [i for i in made.RegistrationSequence if i.FrameOfReferenceUID == studies.OTHER_FRAME]
        (matrix,) = item.MatrixRegistrationSequence[0].MatrixSequence
        found.append(np.array(matrix.FrameOfReferenceTransformationMatrix, float))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    points = nib.affines.apply_affine(FIXED_LPS, np.random.default_rng(6).uniform(1, 10, (20, 3)))
    objects = (theirs["field.mha"], written / "registration.dcm")
    other, ours = (mapped_by_the_standard(path, points) for path in objects)
    np.testing.assert_allclose(ours, other, atol=0.01)


def test_the_warped_series_is_derived(study, written):
    slices = [pydicom.dcmread(path) for path in sorted((written / "warped").iterdir())]
    originals = {header.SOPInstanceUID for header in map(pydicom.dcmread, (study / "moving").iterdir())}
    assert len({made.SOPInstanceUID for made in slices}) == FIXED_SHAPE[2]
    assert len({made.SeriesInstanceUID for made in slices}) == 1
    for made in slices:
        assert made.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
        assert made.StudyInstanceUID == studies.STUDY and made.PatientName == studies.PATIENT
        assert made.FrameOfReferenceUID == studies.FRAME
        sources = {item.ReferencedSOPInstanceUID for item in made.SourceImageSequence}
        assert sources and sources < originals  # those that it was computed from, not all
        assert not [element for element in made if element.tag.is_private]
        assert "registration" in made.DerivationDescription
        assert made.SOPInstanceUID not in originals
        assert "AcquisitionTime" not in made  # differed between the slices
        assert made.KVP == 120


def test_references_are_complete(study, written):
    for name in ("registration.dcm", "inverse.dcm", "affine.dcm"):
        found = pydicom.dcmread(written / name)
        listed = {
            item.ReferencedSOPInstanceUID
            for series in found.ReferencedSeriesSequence
            for item in series.ReferencedInstanceSequence
        }
        headers = [pydicom.dcmread(path) for path in study.rglob("*.dcm")]
        assert listed == {header.SOPInstanceUID for header in headers}
        assert found.PatientID == "QZ77431" and found.StudyID == "ST9"


def test_other_programs_find_no_error(written):
    studies.needs("dciodvfy")
    for path in studies.written(written):
        assert studies.problems(path) == [], path


def test_anonymous_objects_keep_nothing_that_identifies(study, registered, tmp_path):
    pair = read_dicom_pair(ScanFiles(study / "fixed", study / "moving"), anonymize=True)
    write_dicom(tmp_path / "dicom", registered, pair)
    (identifiers,) = {
        str(header.SeriesInstanceUID) for header in map(pydicom.dcmread, (study / "moving").iterdir())
    }
    secret = ["rosenkrantz", "wilhelmina", studies.BORN, "qz77431", "elsinore", "guildenstern", "ac998877"]
    secret += ["20240518", "sn556677", "polonius", "068y", "1.2.3.4", "1.2.3.5", "1.2.3.6", identifiers]
    files = studies.written(tmp_path)
    assert len(files) == FIXED_SHAPE[2] + 3
    for path in files:
        content = path.read_bytes().lower()
        for word in secret:
            assert word.encode() not in content, (path.name, word)
    frames = {pydicom.dcmread(path).FrameOfReferenceUID for path in files if path.name != "inverse.dcm"}
    assert len(frames) == 1  # they still belong together
    if studies.shutil.which("dciodvfy"):
        for path in (files[0], *files[-3:]):
            assert studies.problems(path) == [], path


def rectangle(low, high, z):
    corners = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
    return np.array([(x, y, z) for x, y in corners], float)


def test_structures_are_labels_by_name(study, tmp_path):
    """Corners between voxels of the moving series, so that no voxel is divided."""
    lps = nib.affines.from_matvec(np.diag([2.0, 2, 3]), [-10, -10, 0])
    files: dict[str, Any] = {}
    for name in ("fixed", "moving"):
        folder = studies.write_ct(tmp_path / name, np.zeros((12, 10, 6), int), lps)
        drawn = [
            ("Heart", [1, 2, 3], [rectangle((-3, -3), (3, 3), z) for z in (6, 9)], "ORGAN"),
            ("Body", [1, 2, 3], [rectangle((-7, -9), (9, 7), z) for z in (3, 6, 9)], "EXTERNAL"),
            (f"only {name}", [1, 2, 3], [rectangle((-3, -3), (3, 3), 6)], "ORGAN"),
        ]
        path = tmp_path / f"{name}.dcm"
        files |= {name: folder, f"{name}_labels": path}
        studies.write_rtstruct(path, drawn, studies.headers_of(folder))
    maps, names = read_structure_labels(ScanFiles(**files))
    assert names == {1: "Body", 2: "Heart"}
    expected = np.zeros((12, 10, 6), int)
    expected[2:10, 1:9, 1:4] = 1
    expected[4:7, 4:7, 2:4] = 2
    for labels in maps.values():
        np.testing.assert_array_equal(labels.values, expected)
    scans = read_scans(ScanFiles(**files))
    np.testing.assert_array_equal(scans.moving_labels.values, expected)
    write_image(tmp_path / "labels.nii.gz", Image(expected, scans.fixed.affine))
    with pytest.raises(UserError, match="give one for each scan"):
        read_structure_labels(ScanFiles(**files | {"fixed_labels": tmp_path / "labels.nii.gz"}))
    other = [("Liver", [1, 2, 3], [rectangle((-3, -3), (3, 3), 6)], "ORGAN")]
    studies.write_rtstruct(files["moving_labels"], other, studies.headers_of(files["moving"]))
    with pytest.raises(UserError, match="no structure in common: Body, Heart, only fixed; Liver"):
        read_structure_labels(ScanFiles(**files))


def test_marked_points_are_landmarks_by_name(study, tmp_path):
    there = {"carina": (3, -4, 50), "apex": (-10, 2, 60)}
    here = {"apex": (-9, 3, 61), "carina": (4, -3, 51), "only here": (0, 0, 50)}
    points = studies.write_fiducials(tmp_path / "fixed.dcm", here)
    moving = studies.headers_of(study / "moving")
    other = studies.OTHER_FRAME
    drawn = [(name, [1, 2, 3], [np.array([point], float)], "MARKER") for name, point in there.items()]
    marked = studies.write_rtstruct(tmp_path / "moving.dcm", drawn, moving, frame=other)
    scans = (study / "fixed", study / "moving")
    files = ScanFiles(*scans, fixed_landmarks=points, moving_landmarks=marked)
    found = read_dicom_landmarks(files)
    np.testing.assert_array_equal(found["fixed_landmarks"], [[9, -3, 61], [-4, 3, 51]])
    np.testing.assert_array_equal(found["moving_landmarks"], [[10, -2, 60], [-3, 4, 50]])
    assert read_scans(files).fixed_landmarks.shape == (2, 3)

    def refused(first, second=marked):
        with pytest.raises(UserError) as caught:
            read_dicom_landmarks(ScanFiles(*scans, fixed_landmarks=first, moving_landmarks=second))
        return str(caught.value)

    assert "give one for each scan" in refused(points, tmp_path / "moving.csv")
    wrong = studies.write_fiducials(tmp_path / "wrong.dcm", here, frame=other)
    assert f"in the frame of reference {other}, and" in refused(wrong)
    line = studies.write_fiducials(tmp_path / "line.dcm", here, shape="LINE")
    assert "fiducial 'apex' is a LINE; expected a point" in refused(line)
    alone = studies.write_fiducials(tmp_path / "alone.dcm", {"other": (1, 2, 50)})
    assert "no marked point in common: other; apex, carina" in refused(alone)
    assert "its modality is CT; expected FID or RTSTRUCT" in refused(study / "fixed" / "im001.dcm")
