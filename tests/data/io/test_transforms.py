"""Reading and writing fields and matrices, and refusing bad files."""

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.transforms import (
    Format,
    read_field,
    read_fsl_warp,
    read_matrix,
    read_transform,
    write_field,
    write_matrix,
)
from adregnet_jax.errors import UserError
from adregnet_jax.registration.chains import chain_points
from adregnet_jax.registration.field_files import TransformFile, apply_to_image, load_links

AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xyz", [20, -15, 40], degrees=True).as_matrix() * [-1.5, 2.0, 3.0]
AFFINE[:3, 3] = [30, -40, 25]
MATRIX = np.eye(4)
MATRIX[:3, :3] = Rotation.from_euler("xyz", [5, 10, -20], degrees=True).as_matrix() * [1.1, 0.9, 1.05]
MATRIX[:3, 3] = [4, -7, 2]
DISPLACEMENT = np.random.default_rng(0).normal(size=(5, 4, 3, 3)).astype(np.float32)

FILES = [
    ("a.nii", "itk"),
    ("a.nii.gz", "itk"),
    ("a.nii.gz", "nifti"),
    ("a.nii.gz", "learn2reg"),
    ("a.nii.gz", "spm"),
    ("a.nii.gz", "niftyreg"),
    ("a.npz", "itk"),
    ("a.h5", "itk"),
]


def refusal(call, path):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def save(path, values, intent=0):
    image = nib.Nifti1Image(values, AFFINE)
    image.header.set_intent(intent)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(("name", "format"), FILES)
def test_round_trip(tmp_path, name, format):
    if name.endswith(".h5"):
        pytest.importorskip("SimpleITK")
    path = tmp_path / name
    write_field(path, DISPLACEMENT, AFFINE, format=format)
    displacement, affine = read_field(path)
    np.testing.assert_allclose(displacement, DISPLACEMENT, atol=2e-6)
    assert displacement.dtype == np.float32
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert "exists already" in refusal(lambda: write_field(path, DISPLACEMENT, AFFINE, format=format), path)
    write_field(path, 2 * DISPLACEMENT, AFFINE, format=format, overwrite=True)
    np.testing.assert_allclose(read_field(path)[0], 2 * DISPLACEMENT, atol=4e-6)


def test_contents_of_a_nifti_file(tmp_path):
    # A field of one voxel along the first axis: 1.5 mm, whichever way this axis points.
    along = np.zeros((4, 4, 4, 3), np.float32)
    along[..., 0] = 1
    mm = AFFINE[:3, 0]
    cases: list[tuple[Format, tuple[int, ...], int, np.ndarray]] = [
        ("itk", (4, 4, 4, 1, 3), 1007, mm * [-1, -1, 1]),
        ("nifti", (4, 4, 4, 1, 3), 1006, mm),
        ("learn2reg", (4, 4, 4, 3), 0, np.array([1, 0, 0])),
    ]
    for format, shape, intent, vector in cases:
        write_field(tmp_path / f"{format}.nii", along, AFFINE, format=format)
        image = nib.Nifti1Image.from_filename(tmp_path / f"{format}.nii")
        assert image.shape == shape
        assert image.header["intent_code"] == intent
        assert image.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(np.squeeze(image.get_fdata())[1, 2, 3], vector, atol=1e-6)


def test_a_matrix_becomes_part_of_the_field(tmp_path):
    pytest.importorskip("SimpleITK")
    write_field(tmp_path / "a.h5", DISPLACEMENT, AFFINE, matrix=MATRIX)
    displacement, affine = read_field(tmp_path / "a.h5")
    for voxel in [(0, 0, 0), (4, 1, 2)]:
        through_field = nib.affines.apply_affine(AFFINE, voxel + DISPLACEMENT[voxel])
        there = nib.affines.apply_affine(affine, voxel + displacement[voxel])
        np.testing.assert_allclose(there, nib.affines.apply_affine(MATRIX, through_field), atol=1e-4)
    with pytest.raises(ValueError, match=r"only \.h5 can hold a matrix"):
        write_field(tmp_path / "a.nii", DISPLACEMENT, AFFINE, matrix=MATRIX)


def test_a_format_can_be_given_if_the_file_does_not_record_it(tmp_path):
    path = save(tmp_path / "a.nii", DISPLACEMENT[:, :, :, None])
    assert "is not a displacement field" in refusal(lambda: read_field(path), path)
    write_field(tmp_path / "b.nii", DISPLACEMENT, AFFINE)
    mm = nib.Nifti1Image.from_filename(tmp_path / "b.nii").get_fdata().astype(np.float32)
    save(path, mm)
    np.testing.assert_allclose(read_field(path, format="itk")[0], DISPLACEMENT, atol=2e-6)
    assert "is not a displacement field" in refusal(lambda: read_field(path, format="learn2reg"), path)


def named(path, vectors_mm, name, parameter=0.0):
    image = nib.Nifti1Image(vectors_mm[:, :, :, None].astype(np.float32), AFFINE)
    image.header.set_intent(1007, name=name)
    image.header["intent_p1"] = parameter
    nib.save(image, path)
    return path


def test_fields_of_spm_and_niftyreg(tmp_path):
    still_mm = nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices((5, 4, 3)), 0, -1))
    shift_mm = np.array([2.0, -1, 3])
    voxels = np.linalg.solve(AFFINE[:3, :3], shift_mm)
    cases: list[tuple[str, float, np.ndarray]] = [
        ("Mapping", 0, still_mm + shift_mm),
        ("NREG_TRANS", 0, still_mm + shift_mm),
        ("NREG_TRANS", 1, np.broadcast_to(shift_mm, still_mm.shape)),
    ]
    for name, parameter, vectors_mm in cases:
        path = named(tmp_path / "a.nii", vectors_mm, name, parameter)
        np.testing.assert_allclose(
            read_field(path)[0], np.broadcast_to(voxels, still_mm.shape), atol=2e-5
        )  # float32 mm
    for parameter, kind in [(2.0, "spline control points"), (3.0, "velocities"), (np.nan, "NREG_TRANS")]:
        path = named(tmp_path / "a.nii", still_mm, "NREG_TRANS", parameter)
        assert kind in refusal(lambda path=path: read_field(path), path)


def test_images_and_points_through_spm_and_niftyreg(tmp_path):
    """By the definition of their files: voxel by voxel, the place in the moving world, RAS mm."""
    shape, moving_shape = (5, 4, 3), (9, 8, 7)
    rng = np.random.default_rng(0)
    moving_affine = np.diag([2.0, 2.5, 1.5, 1.0])
    moving_affine[:3, 3] = [-8, -6, -5]
    still_mm = nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices(shape), 0, -1))
    middle_mm = nib.affines.apply_affine(moving_affine, (np.array(moving_shape) - 1) / 2)
    there_mm = (
        middle_mm + 0.3 * (still_mm - still_mm.mean(axis=(0, 1, 2))) + rng.normal(0, 0.3, still_mm.shape)
    )
    values = rng.normal(size=moving_shape).astype(np.float32)
    write_image(tmp_path / "moving.nii.gz", Image(values, moving_affine))
    voxels = nib.affines.apply_affine(np.linalg.inv(moving_affine), there_mm)
    assert ((voxels > 0) & (voxels < np.array(moving_shape) - 1)).all()
    expected = scipy.ndimage.map_coordinates(values, np.moveaxis(voxels, -1, 0), order=1)
    for name, kind, vectors_mm in (
        ("Mapping", 0, there_mm),
        ("NREG_TRANS", 0, there_mm),
        ("NREG_TRANS", 1, there_mm - still_mm),
    ):
        transform = [TransformFile(named(tmp_path / "a.nii", vectors_mm, name, kind))]
        apply_to_image(
            transform, tmp_path / "moving.nii.gz", tmp_path / "o.nii", mode="linear", overwrite=True
        )
        np.testing.assert_allclose(read_image(tmp_path / "o.nii").values, expected, atol=2e-5)
        mapped, outside = chain_points(load_links(transform), still_mm.reshape(-1, 3))
        np.testing.assert_allclose(mapped, there_mm.reshape(-1, 3), atol=2e-5)
        assert outside == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.m3z", "", "mri_warp_convert"),
        ("a.mgz", "", "mri_warp_convert"),
        ("a.lta", "", "lta_convert"),
        ("a.txt", '(Transform "BSplineTransform")\n(NumberOfParameters 12)\n', "transformix -def all"),
        ("a.txt", 4 * "1 0 0 2.5\n", "c3d_affine_tool"),
        ("a.mat", 4 * "1 0 0 2.5  \n", "c3d_affine_tool"),
    ],
)
def test_transforms_of_other_programs_name_their_converter(tmp_path, name, text, message):
    pytest.importorskip("SimpleITK")
    path = tmp_path / name
    path.write_text(text, encoding="ascii")
    assert message in refusal(lambda: read_transform(path), path)


def test_warps_of_voxelmorph(tmp_path):
    np.savez(tmp_path / "a.npz", vol=DISPLACEMENT)
    assert "VoxelMorph" in refusal(lambda: read_field(tmp_path / "a.npz"), tmp_path / "a.npz")
    with pytest.warns(UserWarning, match="read as voxels"):
        displacement, affine = read_field(save(tmp_path / "a.nii", DISPLACEMENT))
    np.testing.assert_array_equal(displacement, DISPLACEMENT)
    np.testing.assert_allclose(affine, AFFINE)


def reversed_first(points, shape, affine):
    """FSL's mm of points given by voxel times spacing, or the other way around."""
    if np.linalg.det(affine[:3, :3]) < 0:
        return points
    far_mm = (shape[0] - 1) * nib.affines.voxel_sizes(affine)[0]
    return points * [-1, 1, 1] + [far_mm, 0, 0]


@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("absolute", [False, True])
def test_warps_of_fsl(tmp_path, mirrored, absolute):
    """FSL's mm are voxel times spacing, the first axis reversed where the affine doesn't mirror."""
    flips = [np.diag([-1.0 if flip else 1.0, 1, 1, 1]) for flip in mirrored]
    affine, moving_affine = AFFINE @ flips[0], np.diag([2.0, 2.5, 1.5, 1.0]) @ flips[1]
    moving_affine[:3, 3] = [-9, 4, 2]
    shape, moving_shape = (5, 4, 3), (8, 7, 6)
    moving = tmp_path / "moving.nii"
    nib.save(nib.Nifti1Image(np.zeros(moving_shape, np.float32), moving_affine), moving)

    grid = np.moveaxis(np.indices(shape), 0, -1)
    fixed_mm = reversed_first(grid * nib.affines.voxel_sizes(affine), shape, affine)
    shift_mm = np.random.default_rng(0).normal([1.0, -2, 3], 0.3, fixed_mm.shape)
    image = nib.Nifti1Image((absolute * fixed_mm + shift_mm).astype(np.float32), affine)
    image.header.set_intent(2006)
    path = tmp_path / "warp.nii.gz"
    nib.save(image, path)

    sizes = nib.affines.voxel_sizes(moving_affine)
    voxels = reversed_first(fixed_mm + shift_mm, moving_shape, moving_affine) / sizes
    field = read_fsl_warp(path, moving=moving)
    there = nib.affines.apply_affine(field.affine, grid + field.displacement)
    np.testing.assert_allclose(there, nib.affines.apply_affine(moving_affine, voxels), atol=1e-4)
    assert "depends on the moving image" in refusal(lambda: read_field(path), path)


@pytest.mark.parametrize(
    ("shape", "intent"),
    [
        ((5, 4, 3), 0),
        ((5, 4, 3, 2), 0),
        ((5, 4, 3, 3), 1007),
        ((5, 4, 3, 3), 2006),  # a warp of FSL
        ((5, 4, 3, 1, 3), 0),
        ((5, 4, 3, 1, 2), 1007),
        ((5, 4, 3, 2, 3), 1007),
    ],
)
def test_images_that_are_not_a_field(tmp_path, shape, intent):
    path = save(tmp_path / "a.nii.gz", np.ones(shape, np.float32), intent)
    assert "is not a displacement field" in refusal(lambda: read_field(path), path)


def test_npz_files_that_are_not_a_field(tmp_path):
    path = tmp_path / "a.npz"
    for arrays, message in [
        ({"displacement": DISPLACEMENT}, "affine"),
        ({"displacement": DISPLACEMENT[0], "affine": AFFINE}, "expected floats"),
        ({"displacement": DISPLACEMENT, "affine": AFFINE[:3]}, "expected floats"),
        ({"displacement": DISPLACEMENT.astype(str), "affine": AFFINE}, "expected floats"),
        ({"displacement": DISPLACEMENT, "affine": np.diag([1.0, 0, 1, 1])}, "spacing"),
        ({"displacement": DISPLACEMENT[:1], "affine": AFFINE}, "at least 2 voxels"),
        ({"displacement": np.array([{}], object), "affine": AFFINE}, "not a field"),
    ]:
        np.savez(path, **arrays)
        assert message in refusal(lambda: read_field(path), path)
    for content in (b"", b"nothing of the kind", b"\x93NUMPY"):
        path.write_bytes(content)
        assert "not a field" in refusal(lambda: read_field(path), path)
    np.save(tmp_path / "b.npy", DISPLACEMENT)
    path.write_bytes((tmp_path / "b.npy").read_bytes())
    assert "not a field" in refusal(lambda: read_field(path), path)


@pytest.mark.parametrize(("place", "value"), [(10, 99), (8, 1)], ids=["compression", "encryption"])
def test_npz_files_that_python_can_not_open(tmp_path, place, value):
    """Both headers of each array are changed; that of the central directory starts with two more bytes."""
    path = tmp_path / "a.npz"
    write_field(path, DISPLACEMENT, AFFINE)
    content = bytearray(path.read_bytes())
    for signature, shift in ((b"PK\x01\x02", 0), (b"PK\x03\x04", -2)):
        start = content.find(signature)
        while start >= 0:
            content[start + place + shift] = value
            start = content.find(signature, start + 4)
    path.write_bytes(content)
    assert "not a field" in refusal(lambda: read_field(path), path)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.npz"])
def test_cut_off_and_not_finite(tmp_path, name):
    path = tmp_path / name
    displacement = np.random.default_rng(0).normal(size=(12, 12, 12, 3))
    write_field(path, displacement, AFFINE)
    path.write_bytes(path.read_bytes()[:-2000])
    refusal(lambda: read_field(path), path)
    displacement[1, 2, 0, 1] = np.nan
    write_field(path, displacement, AFFINE, overwrite=True)
    assert "NaN" in refusal(lambda: read_field(path), path)


def test_h5_files_that_are_not_a_field(tmp_path):
    itk = pytest.importorskip("SimpleITK")
    path = tmp_path / "a.h5"
    itk.WriteTransform(itk.CompositeTransform([itk.AffineTransform(3)]), str(path))
    assert "holds AffineTransform; expected a 3-D displacement field" in refusal(
        lambda: read_field(path), path
    )
    # The affine first, then the field: no field on this grid is equivalent.
    field = itk.DisplacementFieldTransform(itk.Image([4, 4, 4], itk.sitkVectorFloat64))
    itk.WriteTransform(itk.CompositeTransform([field, itk.AffineTransform(3)]), str(path))
    assert "expected a 3-D displacement field" in refusal(lambda: read_field(path), path)
    path.write_bytes(b"nothing of the kind")
    assert "not an ITK transform" in refusal(lambda: read_field(path), path)


@pytest.mark.usefixtures("unchecked_types")
def test_other_files(tmp_path):
    for name in ("a.mat", "a"):
        path = tmp_path / name
        assert "expected one of .nii" in refusal(lambda: read_field(path), path)  # noqa: B023
        assert "expected one of .nii" in refusal(lambda: write_field(path, DISPLACEMENT, AFFINE), path)  # noqa: B023
    for name in ("a.nii", "a.npz"):
        path = tmp_path / name
        assert "no such file" in refusal(lambda: read_field(path), path)  # noqa: B023
    path = tmp_path / "none" / "a.npz"
    assert "can't be written" in refusal(lambda: write_field(path, DISPLACEMENT, AFFINE), path)
    with pytest.raises(ValueError, match="expected a displacement"):
        write_field(tmp_path / "a.npz", DISPLACEMENT[0], AFFINE)
    with pytest.raises(ValueError, match="format must be"):
        write_field(tmp_path / "a.nii", DISPLACEMENT, AFFINE, format="fsl")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".txt", ".tfm", ".mat"])
def test_matrices_are_what_itk_reads_and_writes(tmp_path, suffix):
    itk = pytest.importorskip("SimpleITK")
    ours = tmp_path / f"ours{suffix}"
    write_matrix(ours, MATRIX)
    np.testing.assert_allclose(read_matrix(ours), MATRIX, atol=1e-12)
    point = np.array([12.0, -34.0, 56.0])
    expected = nib.affines.apply_affine(MATRIX, point)
    lps = itk.ReadTransform(str(ours)).TransformPoint((point * [-1, -1, 1]).tolist())
    np.testing.assert_allclose(lps * np.array([-1, -1, 1]), expected, atol=1e-9)

    # Files written by ITK may have a centre, or be of another kind.
    affine = itk.AffineTransform(3)
    affine.SetCenter((10, 20, 30))
    affine.SetMatrix(MATRIX[:3, :3].ravel().tolist())
    euler = itk.Euler3DTransform((5, 6, 7), 0.1, 0.2, 0.3, (1, 2, 3))
    for theirs in (affine, euler):
        path = tmp_path / f"theirs{suffix}"
        itk.WriteTransform(theirs, str(path))
        expected = theirs.TransformPoint(point.tolist()) * np.array([-1, -1, 1])
        there = nib.affines.apply_affine(read_matrix(path), point * [-1, -1, 1])
        np.testing.assert_allclose(there, expected, atol=1e-9)


@pytest.mark.usefixtures("unchecked_types")
def test_files_that_are_not_a_matrix(tmp_path):
    pytest.importorskip("SimpleITK")
    path = tmp_path / "a.txt"
    top = "#Insight Transform File V1.0\nTransform: "
    for text, message in [
        ("1 0 0 0\n0 1 0 0\n", "not an ITK transform"),
        (top + "AffineTransform_double_3_3\nParameters: 1 2 3\nFixedParameters: 0 0 0\n", "12 Parameters"),
        (top + "AffineTransform_double_3_3\n", "12 Parameters"),
        (top + "NoTransform_double_3_3\nParameters: 1\nFixedParameters: 0\n", "not an ITK transform"),
        (top + f"AffineTransform_double_3_3\nParameters:{' nan' * 12}\nFixedParameters: 0 0 0\n", "NaN"),
        (
            top + "AffineTransform_double_2_2\nParameters: 1 0 0 1 5 5\nFixedParameters: 0 0\n",
            "12 Parameters",
        ),
    ]:
        path.write_text(text)
        assert message in refusal(lambda: read_matrix(path), path)
    assert "no such file" in refusal(lambda: read_matrix(tmp_path / "none.txt"), tmp_path)
    assert "no such file" in refusal(lambda: read_matrix(tmp_path / "none.mat"), tmp_path)
    assert "expected one of .txt" in refusal(lambda: write_matrix(tmp_path / "a.csv", MATRIX), tmp_path)
    with pytest.raises(ValueError, match="matrix must be"):
        write_matrix(path, MATRIX[:3])
