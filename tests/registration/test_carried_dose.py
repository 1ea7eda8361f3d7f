"""Doses carried from one DICOM series to another, compared with SimpleITK."""

import csv

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK

from adregnet_jax.data.dicom.dose import read_dose
from adregnet_jax.data.io.transforms import write_field
from adregnet_jax.errors import UserError
from adregnet_jax.registration.carried_dose import write_carried_dose
from adregnet_jax.registration.series_field import read_series_field
from adregnet_jax.report.doses import cumulative, mean_dose
from tests.data.dicom import studies
from tests.registration.test_carried_structures import (
    FIXED_LPS,
    FIXED_SHAPE,
    between,
    write_carried_study,
)

DOSE_LPS = nib.affines.from_matvec(np.diag([3.0, 2.5, 3.5]), [-42, -36, 12])
RAS = np.diag([-1.0, -1, 1, 1])
DOSE_SHAPE, SCALING = (28, 28, 16), 0.002


def doses():
    """A smooth dose with its largest value, 60 Gy, within the body."""
    points = np.moveaxis(np.indices(DOSE_SHAPE), 0, -1) @ DOSE_LPS[:3, :3].T + DOSE_LPS[:3, 3]
    away = (points - [4, 2, 38]) / [22, 20, 18]
    return 60 * np.exp(-np.sum(away**2, axis=-1))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = write_carried_study(tmp_path_factory.mktemp("study"), moving_frame=studies.FRAME)
    studies.write_rtdose(folder / "dose.dcm", doses(), DOSE_LPS, scaling=SCALING)
    return folder


@pytest.fixture(scope="module")
def carried(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "carried"
    options = {"drawn": study / "structures.dcm"}
    means = write_carried_dose(study / "dose.dcm", between(study), folder, **options)
    return folder, means


def itk_dose(study, lps=DOSE_LPS):
    """The dose warped by SimpleITK to a grid of the same size."""
    images = []
    for affine in (DOSE_LPS, lps):
        image = SimpleITK.GetImageFromArray(doses().transpose(2, 1, 0))
        image.SetSpacing(np.diag(affine)[:3].tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        images.append(image)
    vectors = SimpleITK.ReadImage(str(study / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    warped = SimpleITK.Resample(*images, SimpleITK.DisplacementFieldTransform(vectors))
    return SimpleITK.GetArrayFromImage(warped).transpose(2, 1, 0)


INNER = (slice(3, -3),) * 3  # where both programs stay within the grids of the dose and of the field


def test_the_dose_is_that_of_itk_on_the_same_grid(study, carried):
    source, made = (read_dose(folder / "dose.dcm") for folder in (study, carried[0]))
    np.testing.assert_array_equal(made.affine, source.affine)
    np.testing.assert_allclose(made.values[INNER], itk_dose(study)[INNER], atol=0.01 * 60)
    assert np.abs(made.values - source.values).max() > 5
    assert np.abs(made.values[INNER] - itk_dose(study)[INNER]).max() < SCALING + 0.05  # far below one percent
    before, after = (pydicom.dcmread(folder / "dose.dcm") for folder in (study, carried[0]))
    for keyword in (
        "DoseGridScaling",
        "DoseSummationType",
        "BitsAllocated",
        "ReferencedRTPlanSequence",
        "PatientID",
    ):
        assert before[keyword] == after[keyword]
    assert before.SOPInstanceUID != after.SOPInstanceUID and "energy" in after.DoseComment


def test_without_motion_the_dose_stays(study, tmp_path):
    """Also at the border of its grid."""
    write_field(tmp_path / "field.npz", np.zeros((*FIXED_SHAPE, 3), np.float32), RAS @ FIXED_LPS)
    field = read_series_field(tmp_path / "field.npz", fixed=study / "fixed", moving=study / "moving")
    write_carried_dose(study / "dose.dcm", field, tmp_path / "out")
    before, after = (pydicom.dcmread(folder / "dose.dcm") for folder in (study, tmp_path / "out"))
    assert np.abs(before.pixel_array.astype(int) - after.pixel_array.astype(int)).max() <= 1


def test_the_largest_number_that_a_dose_can_store(study, tmp_path):
    made = pydicom.dcmread(study / "dose.dcm")
    made.PixelData = np.full(DOSE_SHAPE, 2**32 - 1, "<u4").tobytes()
    made.DoseGridScaling = 60 / (2**32 - 1)
    made.save_as(tmp_path / "dose.dcm")
    write_carried_dose(tmp_path / "dose.dcm", between(study), tmp_path / "out")
    assert read_dose(tmp_path / "out" / "dose.dcm").values[INNER].min() == pytest.approx(60)


def test_frames_of_their_own_shift_the_grid(tmp_path):
    """The centre of the dose stays at its place in the anatomy."""
    folder = write_carried_study(tmp_path / "study")
    path = studies.write_rtdose(
        folder / "dose.dcm", doses(), DOSE_LPS, scaling=SCALING, frame=studies.OTHER_FRAME
    )
    write_carried_dose(path, between(folder), tmp_path / "out")
    made = read_dose(tmp_path / "out" / "dose.dcm")
    lps = RAS @ made.affine
    np.testing.assert_allclose(lps[:3, :3], DOSE_LPS[:3, :3])
    field = SimpleITK.ReadImage(str(folder / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    middle = (np.array(DOSE_SHAPE) - 1) / 2
    leads_to = SimpleITK.DisplacementFieldTransform(field).TransformPoint(
        nib.affines.apply_affine(lps, middle).tolist()
    )
    np.testing.assert_allclose(leads_to, nib.affines.apply_affine(DOSE_LPS, middle), atol=0.01)
    np.testing.assert_allclose(made.values[INNER], itk_dose(folder, lps)[INNER], atol=0.05 + SCALING)
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"dose.dcm"}


def test_histograms_of_structures_before_and_after(carried):
    folder, means = carried
    assert [row["name"] for row in means] == ["Körper", "Lungs"]
    for row in means:
        assert row["mean_after"] == pytest.approx(row["mean_before"], rel=0.1)  # it moved with the anatomy
    table = list(csv.DictReader((folder / "dvh.csv").read_text(encoding="utf-8").splitlines()))
    for name in ("Körper", "Lungs"):
        for way in ("before_percent", "after_percent"):
            curve = np.array([float(row[way]) for row in table if row["name"] == name])
            assert curve[0] == pytest.approx(100) and np.all(np.diff(curve) <= 0)
            at = np.array([float(row["dose"]) for row in table if row["name"] == name])
            mean = next(row for row in means if row["name"] == name)["mean_" + way.removesuffix("_percent")]
            # The area under the curve is the mean dose; the steps are 60 Gy / 200.
            assert np.trapezoid(curve / 100, at) == pytest.approx(mean, abs=0.2)
    assert (folder / "dvh.png").read_bytes().startswith(b"\x89PNG")


def test_a_histogram_counts_shares_of_voxels():
    at = np.array([0.0, 1, 2, 3, 4])
    shares = np.array([1.0, 0.5, 0.5, 2.0])
    curve = cumulative(np.array([0.5, 2.0, 3.0, 1.0]), shares, at)
    np.testing.assert_allclose(curve, [100, 75, 25, 12.5, 0])
    assert mean_dose(np.array([0.5, 2.0, 3.0, 1.0]), shares) == pytest.approx(5 / 4)
    np.testing.assert_array_equal(cumulative(np.ones(3), np.zeros(3), at), 0)
    assert mean_dose(np.ones(3), np.zeros(3)) is None


def test_other_programs_read_the_dose(study, carried, tmp_path):
    path = carried[0] / "dose.dcm"
    if studies.shutil.which("dciodvfy"):
        assert studies.problems(path) == []
    studies.needs("plastimatch")
    command = [
        "plastimatch",
        "convert",
        "--input",
        str(path),
        "--output-dose-img",
        str(tmp_path / "dose.nrrd"),
    ]
    studies.subprocess.run(command, check=True, capture_output=True)
    image = SimpleITK.ReadImage(str(tmp_path / "dose.nrrd"))
    np.testing.assert_allclose(image.GetOrigin(), DOSE_LPS[:3, 3], atol=1e-3)
    values = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    np.testing.assert_allclose(values[INNER], itk_dose(study)[INNER], atol=0.01 * 60)


def test_anonymous_doses(study, tmp_path):
    options = {"drawn": study / "structures.dcm", "anonymize": True}
    means = write_carried_dose(study / "dose.dcm", between(study), tmp_path / "out", **options)
    assert [row["name"] for row in means] == ["Körper", "Lungs"]
    content = (tmp_path / "out" / "dose.dcm").read_bytes()
    for word in ("Rosenkrantz", "QZ77431", studies.STUDY, "1.2.3.77", "Elsinore"):
        assert word.encode() not in content
    if studies.shutil.which("dciodvfy"):
        assert studies.problems(tmp_path / "out" / "dose.dcm") == []


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("DoseGridScaling", None, "without DoseGridScaling"),
        ("PixelData", None, "without PixelData"),
        ("FrameOfReferenceUID", "1.2.9", "its frame of reference is 1.2.9, and"),
        ("GridFrameOffsetVector", [0, 1, 2], "16 frames with 3 offsets"),
        ("GridFrameOffsetVector", [*range(15), 20], "frames lie 1 to 6 mm apart"),
        ("SamplesPerPixel", 3, "a dose in colour"),
        ("Rows", 5000, "can't be read"),
        ("Modality", "CT", "its modality is CT; expected RTDOSE"),
    ],
)
def test_doses_that_cannot_be_carried(study, tmp_path, keyword, value, message):
    made = pydicom.dcmread(study / "dose.dcm")
    if value is None:
        del made[keyword]
    else:
        setattr(made, keyword, value)
    made.save_as(tmp_path / "dose.dcm")
    with pytest.raises(UserError, match=message):
        write_carried_dose(tmp_path / "dose.dcm", between(study), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_dose_names_its_decoder(study, tmp_path):
    made = pydicom.dcmread(study / "dose.dcm")
    made.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2K
    made.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51"] * DOSE_SHAPE[2])
    made.save_as(tmp_path / "dose.dcm")
    with pytest.raises(UserError, match="pip install pylibjpeg"):
        write_carried_dose(tmp_path / "dose.dcm", between(study), tmp_path / "out")
