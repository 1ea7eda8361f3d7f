"""Structures carried from one DICOM series to another, compared with labels that SimpleITK warps."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK
from scipy import ndimage

from adregnet_jax.data.dicom.series import read_series
from adregnet_jax.data.dicom.structures import Structure, read_structures, shares_of
from adregnet_jax.data.io.transforms import write_field
from adregnet_jax.errors import UserError
from adregnet_jax.registration.carried_structures import write_carried_structures
from adregnet_jax.registration.series_field import read_series_field
from tests.data.dicom import studies

FIXED_LPS = nib.affines.from_matvec(np.diag([2.0, 2.0, 3.0]), [-50, -46, 10])
MOVING_LPS = nib.affines.from_matvec(np.diag([1.8, 2.1, 2.5]), [-52, -49, 6])
FIXED_SHAPE, MOVING_SHAPE = (50, 46, 20), (60, 48, 28)
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


def ring(radius, centre, z, count=120):
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    x, y = centre[0] + radius[0] * np.cos(angle), centre[1] + radius[1] * np.sin(angle)
    return np.stack([x, y, np.full(count, z)], axis=-1)


def drawn():
    """A body with a hole for a cavity, two lungs as one structure, and an isocentre."""
    heights = 6 + 2.5 * np.arange(28)
    body, lungs = [], []
    for z in heights[3:25]:
        body.append(ring((38, 32), (1, 0), z))
        if 28 < z < 50:
            body.append(ring((7, 5), (2, -18), z))
        if 20 < z < 58:
            size = np.sqrt(1 - ((z - 39) / 20) ** 2)
            lungs += [ring((9 * size, 13 * size), (side, 4), z) for side in (-17, 18)]
    isocentre = np.array([[3.0, -2.0, 37.0]])
    return [
        ("Körper", [0, 255, 0], body, "EXTERNAL"),
        ("Lungs", [10, 20, 250], lungs, "ORGAN"),
        ("Iso Rosenkrantz", [255, 0, 0], [isocentre], "ISOCENTER"),
        ("Empty", [1, 2, 3], [], "ORGAN"),
    ]


def write_carried_study(folder, moving_frame=studies.OTHER_FRAME):
    """Two empty series, structures on one, a field between them."""
    for name, lps, shape in (("fixed", FIXED_LPS, FIXED_SHAPE), ("moving", MOVING_LPS, MOVING_SHAPE)):
        frame = studies.FRAME if name == "fixed" else moving_frame
        studies.write_ct(folder / name, np.zeros(shape, int), lps, frame=frame)
    slices = studies.headers_of(folder / "moving")
    studies.write_rtstruct(folder / "structures.dcm", drawn(), slices, frame=moving_frame)
    noise = ndimage.gaussian_filter(np.random.default_rng(4).normal(size=(*FIXED_SHAPE, 3)), [8, 8, 4, 0])
    displacement = (noise / noise.std() * 1.2 + [1, -1.5, 0.8]).astype(np.float32)
    write_field(folder / "field.nii.gz", displacement, LPS_TO_RAS @ FIXED_LPS)
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_carried_study(tmp_path_factory.mktemp("study"))


def between(study, **options):
    return read_series_field(
        study / "field.nii.gz", fixed=study / "fixed", moving=study / "moving", **options
    )


@pytest.fixture(scope="module")
def carried(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "carried"
    rows = write_carried_structures(study / "structures.dcm", between(study), folder)
    return folder, rows


def itk_labels(study, structure):
    """A structure as labels on the moving grid, warped by SimpleITK as a linear image, and cut at a half."""
    moving = read_series(study / "moving")
    shares = shares_of(structure, moving)
    labels = np.zeros(moving.shape, np.float32)
    box = tuple(slice(c, c + n) for c, n in zip(shares.corner, shares.values.shape, strict=True))
    labels[box] = shares.values > 0.5
    image = SimpleITK.GetImageFromArray(labels.transpose(2, 1, 0))
    image.SetSpacing(np.diag(MOVING_LPS)[:3].tolist())
    image.SetOrigin(MOVING_LPS[:3, 3].tolist())
    vectors = SimpleITK.ReadImage(str(study / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    grid = SimpleITK.Image(*FIXED_SHAPE, SimpleITK.sitkFloat32)
    grid.CopyInformation(vectors)
    warped = SimpleITK.Resample(image, grid, SimpleITK.DisplacementFieldTransform(vectors))
    return SimpleITK.GetArrayFromImage(warped).transpose(2, 1, 0) > 0.5


def border(inside):
    """Voxels next to the surface, on its inner side, slice by slice."""
    return inside & ~ndimage.binary_erosion(inside, np.ones((3, 3, 1)))


def surface_distance(study, one, other):
    """The mean distance in mm between two regions' borders, both ways."""
    spacing = np.diag(FIXED_LPS)[:3]
    ways = []
    for a, b in ((one, other), (other, one)):
        away = ndimage.distance_transform_edt(~border(b), sampling=spacing)
        ways.append(away[border(a)])
    return np.concatenate(ways).mean()


@pytest.mark.parametrize("name", ["Körper", "Lungs"])
def test_contours_surround_the_labels_that_itk_warps(study, carried, name):
    _, (before,) = read_structures(study / "structures.dcm", only=[name])
    _, (after,) = read_structures(carried[0] / "structures.dcm", only=[name])
    fixed = read_series(study / "fixed")
    shares = shares_of(after, fixed)
    inside = np.zeros(FIXED_SHAPE, bool)
    box = tuple(slice(c, c + n) for c, n in zip(shares.corner, shares.values.shape, strict=True))
    inside[box] = shares.values > 0.5
    assert inside.sum() > 500
    assert surface_distance(study, inside, itk_labels(study, before)) < 0.5 * 2.0  # half a voxel


def test_names_colours_and_references_are_kept(study, carried):
    source = pydicom.dcmread(study / "structures.dcm")
    made = pydicom.dcmread(carried[0] / "structures.dcm")
    assert [item.ROIName for item in made.StructureSetROISequence] == [name for name, *_ in drawn()]
    assert {item.ReferencedFrameOfReferenceUID for item in made.StructureSetROISequence} == {studies.FRAME}
    colours = [item.ROIDisplayColor for item in made.ROIContourSequence]
    assert colours == [colour for _, colour, *_ in drawn()]
    types = [item.RTROIInterpretedType for item in made.RTROIObservationsSequence]
    assert types == ["EXTERNAL", "ORGAN", "ISOCENTER", "ORGAN"]
    assert made.SOPInstanceUID != source.SOPInstanceUID
    assert made.PatientName == studies.PATIENT and made.StructureSetLabel == "Plan R"
    slices = {image.SOPInstanceUID: image for image in studies.headers_of(study / "fixed")}
    for drawing in made.ROIContourSequence[:2]:
        for contour in drawing.ContourSequence:
            image = slices[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            heights = np.array(contour.ContourData, float).reshape(-1, 3)[:, 2]
            np.testing.assert_allclose(heights, image.ImagePositionPatient[2], atol=1e-3)


def test_volumes_before_and_after(study, carried):
    folder, rows = carried
    body, lungs, point, empty = rows
    exact = 22 * 2.5 * np.pi * 38 * 32 - 8 * 2.5 * np.pi * 7 * 5
    assert body["volume_before_cm3"] == pytest.approx(exact / 1000, rel=2e-3)
    _, (before, _, _, _) = read_structures(study / "structures.dcm")
    assert body["volume_after_cm3"] == pytest.approx(itk_labels(study, before).sum() * 12 / 1000, rel=0.01)
    assert lungs["volume_after_cm3"] > 0
    assert point["volume_after_cm3"] == 0 and empty["change_percent"] is None
    assert (folder / "volumes.csv").read_text(encoding="utf-8").startswith("name,volume_before_cm3,")


def test_holes_are_cut_open_and_pieces_stay_apart(carried):
    _, (body, lungs, _, _) = read_structures(carried[0] / "structures.dcm")
    heights = [contour[0, 2] for contour in body.contours if 31 < contour[0, 2] < 45]
    assert len(set(heights)) == len(heights) == 4  # one contour a slice, although there is a hole
    heights = [contour[0, 2] for contour in lungs.contours if 31 < contour[0, 2] < 45]
    assert len(heights) == 2 * 4


def test_a_point_leads_back_to_where_it_was_drawn(study, carried):
    _, (point,) = read_structures(carried[0] / "structures.dcm", only=["Iso Rosenkrantz"])
    field = SimpleITK.DisplacementFieldTransform(
        SimpleITK.ReadImage(str(study / "field.nii.gz"), SimpleITK.sitkVectorFloat64)
    )
    back = field.TransformPoint(point.points[0].tolist())
    np.testing.assert_allclose(back, [3, -2, 37], atol=0.01)


def test_other_programs_read_the_structures(study, carried, tmp_path):
    path = carried[0] / "structures.dcm"
    if studies.shutil.which("dciodvfy"):
        assert studies.problems(path) == []
    studies.needs("plastimatch")
    command = ["plastimatch", "convert", "--input", str(path), "--output-prefix", str(tmp_path)]
    command += ["--output-ss-list", str(tmp_path / "list.txt"), "--referenced-ct", str(study / "fixed")]
    studies.subprocess.run(
        [*command, "--prefix-format", "nrrd"], check=True, capture_output=True, encoding="utf-8"
    )
    lungs = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "Lungs.nrrd"))).transpose(2, 1, 0)
    _, (before,) = read_structures(study / "structures.dcm", only=["Lungs"])
    assert surface_distance(study, lungs > 0, itk_labels(study, before)) < 0.5 * 2.0


def test_anonymous_structures(study, tmp_path):
    write_carried_structures(study / "structures.dcm", between(study), tmp_path / "out", anonymize=True)
    content = (tmp_path / "out" / "structures.dcm").read_bytes()
    table = (tmp_path / "out" / "volumes.csv").read_text(encoding="utf-8")
    for word in ("Rosenkrantz", "QZ77431", "Polonius", "20240519", "Plan R", studies.STUDY):
        assert word.encode() not in content and word not in table, word
    assert "ROI 13" in table
    if studies.shutil.which("dciodvfy"):
        assert studies.problems(tmp_path / "out" / "structures.dcm") == []


def test_structures_on_sagittal_slices(tmp_path):
    """Which are counted along their normal, towards the patient's right."""
    lps = nib.affines.from_matvec([[0, 0, 2.5], [1.5, 0, 0], [0, -2.0, 0]], [-20, -30, 40])
    series = read_series(studies.write_ct(tmp_path / "a", np.zeros((40, 36, 16), int), lps))
    contours = tuple(ring((20, 11), (0, 5), x)[:, [2, 0, 1]] for x in (-10, -7.5, -5))
    shares = shares_of(Structure(1, "disc", contours, np.empty((0, 3))), series)
    np.testing.assert_array_equal(shares.corner[2] + np.arange(shares.values.shape[2]), [9, 10, 11])
    assert shares.volume_mm3(series) == pytest.approx(3 * 2.5 * np.pi * 20 * 11, rel=2e-3)


def test_a_structure_out_of_reach_is_empty_and_reported(study, tmp_path):
    far = [("far", [1, 2, 3], [ring((3, 3), (300, 0), 31)], "ORGAN")]
    moving = studies.headers_of(study / "moving")
    path = studies.write_rtstruct(tmp_path / "far.dcm", far, moving, frame=studies.OTHER_FRAME)
    with pytest.warns(UserWarning, match="leads nowhere into structure 'far'"):
        (row,) = write_carried_structures(path, between(study), tmp_path / "out")
    assert row["volume_after_cm3"] == 0


def test_a_structure_drawn_on_every_second_slice_is_whole(study):
    """A ball of 15 mm on slices 2.5 mm apart; and a second piece, far above it, that stays apart."""
    heights = [6 + 2.5 * k for k in range(4, 26, 2)]
    sizes = {z: np.sqrt(max(0, 15**2 - (z - 33.5) ** 2)) for z in heights}
    contours = [ring((size, size), (1, -3), z) for z, size in sizes.items() if size > 1]
    contours.append(ring((4, 4), (1, -3), 6 + 2.5 * 26))
    ball = Structure(1, "ball", tuple(contours), np.empty((0, 3)))
    shares = shares_of(ball, read_series(study / "moving"))
    filled = np.flatnonzero(shares.values.sum(axis=(0, 1))) + shares.corner[2]
    np.testing.assert_array_equal(filled, [*range(6, 17), 26])
    volume = shares.volume_mm3(read_series(study / "moving")) - 2.5 * np.pi * 16
    assert volume == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.04)


def refusal(study, path, **options):
    with pytest.raises(UserError) as caught:
        write_carried_structures(path, between(study), path.parent / "never", **options)
    assert not (path.parent / "never").exists()
    return str(caught.value)


def test_structures_that_cannot_be_carried(study, tmp_path):
    moving, fixed = (studies.headers_of(study / name) for name in ("moving", "fixed"))
    one = [("A", [1, 2, 3], [ring((5, 5), (0, 0), 31)], "ORGAN")]
    other = {"frame": studies.OTHER_FRAME}
    path = studies.write_rtstruct(tmp_path / "open.dcm", one, moving, kind="OPEN_PLANAR", **other)
    assert "'A' has open contours (OPEN_PLANAR)" in refusal(study, path)
    path = studies.write_rtstruct(tmp_path / "frame.dcm", one, moving, frame="1.2.9")
    assert "frame of reference 1.2.9, and" in refusal(study, path)
    path = studies.write_rtstruct(tmp_path / "fixed.dcm", one, fixed, **other)
    assert "exchange --fixed and --moving" in refusal(study, path)
    off = [("A", [1, 2, 3], [ring((5, 5), (0, 0), 32)], "ORGAN")]
    path = studies.write_rtstruct(tmp_path / "off.dcm", off, moving, **other)
    assert "0.4 of a slice off the slices" in refusal(study, path)
    assert "no structure 'B'; it has A" in refusal(study, path, only=["B"])
    assert "its modality is CT; expected RTSTRUCT" in refusal(study, study / "moving" / "im001.dcm")
    broken = pydicom.dcmread(studies.write_rtstruct(tmp_path / "broken.dcm", one, moving, **other))
    broken.ROIContourSequence[0].ContourSequence[0].ContourData = [1, 2, 3, 4]
    broken.save_as(tmp_path / "broken.dcm")
    assert "'A' isn't a list of points" in refusal(study, tmp_path / "broken.dcm")
    path = studies.write_rtstruct(tmp_path / "none.dcm", [], moving, **other)
    assert "holds no structures" in refusal(study, path)
    (tmp_path / "text.dcm").write_text("nothing")
    assert "not a DICOM file" in refusal(study, tmp_path / "text.dcm")
