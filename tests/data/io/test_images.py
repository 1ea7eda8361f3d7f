"""Reading and writing images in all formats, and refusing bad ones."""

import builtins
import locale

import nibabel as nib
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.itk import from_itk
from adregnet_jax.errors import UserError

# Oblique, anisotropic, with a flipped axis.
AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xyz", [20, -15, 40], degrees=True).as_matrix() * [-1.5, 2.0, 3.0]
AFFINE[:3, 3] = [30, -40, 25]


def volume(shape=(5, 4, 3)):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def refusal(call, path):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def save_with_forms(path, change):
    image = nib.Nifti1Image(volume(), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    change(image)
    nib.save(image, path)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("labels", [False, True])
def test_round_trip(tmp_path, suffix, labels):
    if suffix in (".mha", ".nrrd"):
        pytest.importorskip("SimpleITK")
    path = tmp_path / f"a{suffix}"
    write_image(path, Image(volume().astype(int) if labels else volume(), AFFINE))
    image = read_image(path, labels=labels)
    np.testing.assert_array_equal(image.values, volume())
    assert image.values.dtype == (np.int32 if labels else np.float32)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(image.spacing_mm, [1.5, 2, 3], rtol=1e-6)
    assert image.shape == (5, 4, 3)
    assert image.name == str(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_itk_places_every_voxel_where_we_do(tmp_path, suffix):
    itk = pytest.importorskip("SimpleITK")
    write_image(tmp_path / f"a{suffix}", Image(volume(), AFFINE))
    image = itk.ReadImage(str(tmp_path / f"a{suffix}"))
    for voxel in [(0, 0, 0), (4, 0, 0), (0, 3, 1), (3, 2, 2)]:
        assert image[voxel] == volume()[voxel]
        there = np.array(image.TransformIndexToPhysicalPoint(voxel)) * [-1, -1, 1]
        np.testing.assert_allclose(there, nib.affines.apply_affine(AFFINE, voxel), atol=1e-4)


def test_nrrd_in_another_space_is_turned(tmp_path):
    pytest.importorskip("SimpleITK")
    header = (
        "NRRD0004\ntype: short\ndimension: 3\nspace: right-anterior-superior\nsizes: 3 2 2\n"
        "space directions: (0,2,0) (1.5,0,0) (0,0,-3)\nspace origin: (10,20,30)\nendian: little\n"
        "encoding: raw\nkinds: domain domain domain\n\n"
    )
    (tmp_path / "a.nrrd").write_bytes(header.encode() + np.arange(12, dtype="<i2").tobytes())
    image = read_image(tmp_path / "a.nrrd")
    expected = np.array([[0, 1.5, 0, 10], [2, 0, 0, 20], [0, 0, -3, 30], [0, 0, 0, 1]])
    np.testing.assert_allclose(image.affine, expected, atol=1e-12)
    np.testing.assert_array_equal(image.values.ravel(order="F"), np.arange(12))


def nrrd(path, *fields):
    """A NRRD file of 2 x 2 x 2 voxels with these lines in its header."""
    lines = ["NRRD0005", "type: float", "dimension: 3", "sizes: 2 2 2", "encoding: raw", "endian: little"]
    path.write_bytes("\n".join([*lines, *fields, "", ""]).encode() + np.arange(8, dtype="<f4").tobytes())
    return path


DIRECTIONS = ("space directions: (1,0,0) (0,2,0) (0,0,3)", "space origin: (5,6,7)")


def test_a_nrrd_that_does_not_say_where_it_lies(tmp_path):
    for fields in (
        ["spacings: 1 2 3"],
        ["space: scanner-xyz", *DIRECTIONS],
        ["space dimension: 3", *DIRECTIONS],
    ):
        with pytest.warns(UserWarning, match="doesn't say where it lies"):
            image = read_image(nrrd(tmp_path / "a.nrrd", *fields))
        np.testing.assert_allclose(image.spacing_mm, [1, 2, 3])


def test_units_of_nrrd_and_metaimage(tmp_path):
    space = "space: left-posterior-superior"
    read_image(nrrd(tmp_path / "a.nrrd", space, *DIRECTIONS, 'space units: "mm" "mm" "mm"'))
    path = nrrd(tmp_path / "b.nrrd", space, *DIRECTIONS, 'space units: "um" "um" "um"')
    with pytest.raises(UserError, match=r"b\.nrrd: units are um; expected mm"):
        read_image(path)
    write_image(tmp_path / "a.mha", Image(np.zeros((2, 2, 2), np.float32), np.eye(4)))
    old = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "b.mha").write_bytes(old.replace(b"ElementType", b"DistanceUnits = um\nElementType"))
    with pytest.raises(UserError, match=r"b\.mha: units are um; expected mm"):
        read_image(tmp_path / "b.mha")


def test_trailing_axis_of_one_in_a_metaimage(tmp_path):
    itk = pytest.importorskip("SimpleITK")
    itk.WriteImage(itk.GetImageFromArray(volume((1, 3, 4, 5)), isVector=False), str(tmp_path / "a.mha"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.mha").values, volume((3, 4, 5)).transpose())


def write_slices(folder, positions_mm, series="1.2.3"):
    itk = pytest.importorskip("SimpleITK")
    folder.mkdir(exist_ok=True)
    writer = itk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    before = locale.setlocale(locale.LC_ALL)
    tags = {
        "0008|0060": "CT",
        "0020|000d": "1.2",
        "0020|000e": series,
        "0020|0037": "1\\0\\0\\0\\1\\0",
        "0028|1052": "-1000",
        "0028|1053": "1",
    }
    for number, z in enumerate(positions_mm):
        plane = itk.GetImageFromArray(np.full((4, 5), 100 * number, np.int16))
        plane.SetSpacing([0.5, 0.75])
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        plane.SetMetaData("0020|0032", f"-10\\-20\\{z}")
        plane.SetMetaData("0008|0018", f"{series}.{number + 1}")
        # The order of file names is opposite to that of positions: the header must determine the order.
        writer.SetFileName(str(folder / f"{series}_{len(positions_mm) - number}.dcm"))
        writer.Execute(plane)
    locale.setlocale(locale.LC_ALL, before)  # which ITK's writer of DICOM leaves at "C"
    return folder


def test_dicom_series(tmp_path):
    image = read_image(write_slices(tmp_path / "scan", [5, 7.5, 10]))
    np.testing.assert_array_equal(image.values, np.tile([0, 100, 200], (5, 4, 1)))
    expected = np.array([[-0.5, 0, 0, 10], [0, -0.75, 0, 20], [0, 0, 2.5, 5], [0, 0, 0, 1]])
    np.testing.assert_allclose(image.affine, expected, atol=1e-9)


def test_dicom_folders_that_are_not_a_scan(tmp_path):
    itk = pytest.importorskip("SimpleITK")
    itk.ProcessObject.GlobalWarningDisplayOff()
    uneven = write_slices(tmp_path / "uneven", [0, 2, 6, 8])
    assert "slices lie 2 to 4 mm apart" in refusal(lambda: read_image(uneven), uneven)
    write_slices(tmp_path / "two", [0, 1, 2])
    two = write_slices(tmp_path / "two", [0, 1, 2], series="1.2.4")
    assert "holds 2 DICOM series" in refusal(lambda: read_image(two), two)
    assert "holds 0 DICOM series" in refusal(lambda: read_image(tmp_path), tmp_path)


def test_files_that_itk_cannot_read_as_a_volume(tmp_path):
    itk = pytest.importorskip("SimpleITK")
    for name, array, vector in [("flat", volume((4, 5)), False), ("vector", volume((3, 4, 5, 2)), True)]:
        itk.WriteImage(itk.GetImageFromArray(array, isVector=vector), str(tmp_path / f"{name}.mha"))
    assert "expected a 3-D volume" in refusal(lambda: read_image(tmp_path / "flat.mha"), tmp_path)
    assert "one real number each" in refusal(lambda: read_image(tmp_path / "vector.mha"), tmp_path)
    (tmp_path / "none.nrrd").write_bytes(b"nothing of the kind")
    refusal(lambda: read_image(tmp_path / "none.nrrd"), tmp_path / "none.nrrd")
    refusal(lambda: read_image(tmp_path / "absent.mha"), tmp_path / "absent.mha")
    image = itk.GetImageFromArray(np.full((3, 4, 5), np.nan))
    itk.WriteImage(image, str(tmp_path / "nan.mha"))
    assert "NaN" in refusal(lambda: read_image(tmp_path / "nan.mha"), tmp_path)
    assert "whole numbers" in refusal(lambda: read_image(tmp_path / "nan.mha", labels=True), tmp_path)


def test_missing_simpleitk_is_reported_with_the_command_to_install_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name == "SimpleITK":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    path = tmp_path / "a.mha"
    assert "pip install 'adregnet-jax[itk]'" in refusal(lambda: read_image(path), path)
    assert "pip install" in refusal(lambda: write_image(path, Image(volume(), AFFINE)), path)
    assert not list(tmp_path.iterdir())


def placed_by_itk(path):
    itk = pytest.importorskip("SimpleITK")
    itk.ProcessObject.GlobalWarningDisplayOff()
    return from_itk(path, itk.ReadImage(str(path)))[1]


def test_a_gantry_tilt_in_the_sform(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] += 0.8

    def change(image):
        image.set_sform(sheared, 1)
        image.set_qform(AFFINE, 1)

    path = save_with_forms(tmp_path / "a.nii", change)
    with pytest.warns(UserWarning, match="the qform is taken"):
        read = read_image(path)
    np.testing.assert_allclose(read.affine, placed_by_itk(path), atol=1e-5)
    tilted = read_image(path, prefer="sform")
    np.testing.assert_allclose(tilted.affine, sheared, atol=1e-5)
    with pytest.warns(UserWarning, match="ITK, ANTs and 3D Slicer can't read it as NIfTI"):
        write_image(tmp_path / "b.nii.gz", tilted)
    np.testing.assert_allclose(read_image(tmp_path / "b.nii.gz").affine, sheared, atol=1e-5)
    write_image(tmp_path / "b.mha", tilted)
    np.testing.assert_allclose(placed_by_itk(tmp_path / "b.mha"), sheared, atol=1e-5)


@pytest.mark.parametrize("spacing_mm", [(2.0, 3.0, 4.0), (3e-5, 3e-5, 3e-5)])
def test_a_file_that_does_not_say_where_it_lies(tmp_path, spacing_mm):
    image = nib.Nifti1Image(volume(), np.diag([*spacing_mm, 1.0]))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    image.header["sform_code"] = image.header["qform_code"] = 0
    path = tmp_path / "a.nii"
    nib.save(image, path)
    with pytest.warns(UserWarning, match="doesn't say where it lies"):
        read = read_image(path)
    np.testing.assert_allclose(read.affine, placed_by_itk(path), rtol=1e-6)
    write_image(tmp_path / "b.nii", read)
    np.testing.assert_allclose(placed_by_itk(tmp_path / "b.nii"), placed_by_itk(path), rtol=1e-6)


@pytest.mark.parametrize("suffix", [".mgz", ".mgh"])
def test_files_of_freesurfer(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    affine = np.array([[-1.0, 0, 0, 60], [0, 0, 1, -70], [0, -1, 0, 50], [0, 0, 0, 1]])
    nib.save(nib.MGHImage(volume().astype(np.float32), affine), path)
    read = read_image(path)
    np.testing.assert_array_equal(read.values, volume())
    np.testing.assert_allclose(read.affine, affine, atol=1e-5)
    labels = Image(volume().astype(np.int32) + 2**24, AFFINE)
    write_image(tmp_path / f"b{suffix}", labels)
    again = read_image(tmp_path / f"b{suffix}", labels=True)
    np.testing.assert_array_equal(again.values, labels.values)
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-4)
    big = tmp_path / f"c{suffix}"
    large = Image(labels.values.astype(np.int64) * 2**20, AFFINE)
    assert "up to 2^31" in refusal(lambda: write_image(big, large), big)
    path.write_bytes(path.read_bytes()[:-60])
    refusal(lambda: read_image(path), path)
    gone = tmp_path / f"none{suffix}"
    assert "no such file" in refusal(lambda: read_image(gone), gone)


def test_forms_that_disagree(tmp_path):
    moved = AFFINE.copy()
    moved[2, 3] += 4
    for code, taken, place in [(1, "sform", AFFINE), (2, "qform", moved)]:

        def change(image, code=code):
            image.set_sform(AFFINE, code)
            image.set_qform(moved, 1)

        path = save_with_forms(tmp_path / f"{taken}.nii", change)
        with pytest.warns(UserWarning, match=f"disagree by up to 4 mm: the {taken} is taken"):
            read = read_image(path)
        np.testing.assert_allclose(read.affine, place, atol=1e-5)
        np.testing.assert_allclose(read.affine, placed_by_itk(path), atol=1e-5)
        np.testing.assert_allclose(read_image(path, prefer="sform").affine, AFFINE, atol=1e-5)
        np.testing.assert_allclose(read_image(path, prefer="qform").affine, moved, atol=1e-5)
    turned = AFFINE @ np.diag([-1.0, 1, 1, 1])
    path = save_with_forms(tmp_path / "turned.nii", lambda image: image.set_qform(turned, 1))
    message = refusal(lambda: read_image(path), path)
    assert "different orientations" in message
    assert 'prefer="sform"' in message
    np.testing.assert_allclose(read_image(path, prefer="qform").affine, turned, atol=1e-5)
    # Only if both are in force, and differ by more than rounding.
    for name, agree in [
        ("b.nii", lambda image: image.set_qform(moved, 0)),
        ("c.nii", lambda image: image.set_qform(AFFINE + 0.01 * np.eye(4, k=1), 1)),
    ]:
        read = read_image(save_with_forms(tmp_path / name, agree))
        np.testing.assert_allclose(read.affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize(("unit", "message"), [("meter", "metres"), ("micron", "micrometres")])
def test_units_other_than_mm(tmp_path, unit, message):
    path = save_with_forms(tmp_path / "a.nii", lambda image: image.header.set_xyzt_units(unit, "sec"))
    assert f"units are {message}; expected mm" in refusal(lambda: read_image(path), path)


def test_time_units_do_not_matter(tmp_path):
    path = save_with_forms(tmp_path / "a.nii", lambda image: image.header.set_xyzt_units("mm", "msec"))
    np.testing.assert_array_equal(read_image(path).values, volume())


def test_parallel_axes(tmp_path):
    path = save_with_forms(tmp_path / "a.nii", lambda image: None)
    header = bytearray(path.read_bytes())
    header[280:328] = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]], "<f4").tobytes()  # srow_x, _y, _z
    path.write_bytes(header)
    assert "two axes of the affine are parallel" in refusal(lambda: read_image(path), path)


def test_existing_files_are_kept(tmp_path):
    path = tmp_path / "a.nii.gz"
    write_image(path, Image(volume(), AFFINE))
    other = Image(volume() + 1, AFFINE)
    assert "exists already" in refusal(lambda: write_image(path, other), path)
    np.testing.assert_array_equal(read_image(path).values, volume())
    write_image(path, other, overwrite=True)
    np.testing.assert_array_equal(read_image(path).values, volume() + 1)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_names_that_cannot_be_written(tmp_path, suffix):
    if suffix == ".mha":
        pytest.importorskip("SimpleITK")
    path = tmp_path / "none" / f"a{suffix}"
    assert "can't be written" in refusal(lambda: write_image(path, Image(volume(), AFFINE)), path)
    path = tmp_path / "a.png"
    assert "expected one of .nii" in refusal(lambda: write_image(path, Image(volume(), AFFINE)), path)


@pytest.mark.usefixtures("unchecked_types")
def test_shapes_that_are_not_an_image():
    with pytest.raises(ValueError, match="expected values"):
        Image(volume((4, 4)), AFFINE)
    with pytest.raises(ValueError, match="affine"):
        Image(volume(), np.eye(3))


def compressed_metaimage(tmp_path):
    path = tmp_path / "a.mha"
    write_image(path, Image(np.zeros((40, 30, 20), np.float32) + np.arange(20), np.eye(4)))
    content = path.read_bytes()
    assert b"CompressedData = True" in content
    return path, content, content.index(b"LOCAL") + len("LOCAL") + 1


def test_a_compressed_metaimage_whose_voxels_are_damaged(tmp_path):
    """ITK would read forever if the bytes aren't a compressed stream."""
    path, content, start = compressed_metaimage(tmp_path)
    assert read_image(path).shape == (40, 30, 20)
    for damaged in (content[: start + 1] + b"\0" + content[start + 2 :], content[:-20], content[:start]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="voxels can't be expanded") as error:
            read_image(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("axes", [b"-3", b"0", b"", b"three", b"30"])
def test_a_metaimage_of_impossible_axes(tmp_path, axes):
    path, content, _ = compressed_metaimage(tmp_path)
    path.write_bytes(content.replace(b"NDims = 3", b"NDims = " + axes))
    with pytest.raises(UserError, match="NDims is"):
        read_image(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"DimSize = 40 30 20", b"DimSize = 40 30 21", "declares 100800 bytes, its voxels are 96000"),
        (b"DimSize = 40 30 20", b"DimSize = 40 30", "DimSize is 40 30"),
        (b"MET_FLOAT", b"MET_SHORT", "declares 48000 bytes"),
        (b"= LOCAL", b"= LOCA", "voxels are in 'LOCA', which doesn't exist"),
    ],
)
def test_a_metaimage_whose_header_declares_other_voxels(tmp_path, old, new, message):
    path, content, _ = compressed_metaimage(tmp_path)
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_image(path)


@pytest.mark.parametrize("place", [b"slice%02d.raw 1 2 1", b"LIST\nslice01.raw\nslice02.raw"])
def test_a_metaimage_with_one_file_per_slice(tmp_path, place):
    head = b"ObjectType : Image\nNDims : 3\nDimSize : 4 3 2\nElementType : MET_SHORT\n"
    (tmp_path / "a.mhd").write_bytes(head + b"ElementDataFile : " + place + b"\n")
    values = np.arange(24, dtype="<i2").reshape(2, 3, 4)  # [z, y, x]
    for number in (1, 2):
        (tmp_path / f"slice{number:02}.raw").write_bytes(values[number - 1].tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "a.mhd").values, values.transpose())


def test_a_metaimage_with_compressed_voxels_in_another_file(tmp_path):
    path, content, start = compressed_metaimage(tmp_path)
    header = tmp_path / "b.mhd"
    (tmp_path / "b.zraw").write_bytes(content[start:])
    header.write_bytes(content[:start].replace(b"LOCAL", b"b.zraw"))
    np.testing.assert_array_equal(read_image(header).values, read_image(path).values)
    (tmp_path / "b.zraw").write_bytes(content[start:-30])
    with pytest.raises(UserError, match="voxels can't be expanded"):
        read_image(header)
