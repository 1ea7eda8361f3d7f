"""Chains of transforms next to SimpleITK, which passes points through its own files."""

import shutil
import subprocess

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from typer.testing import CliRunner

from adregnet_jax.cli.app import app
from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.points import read_points, write_points
from adregnet_jax.data.io.transforms import read_field, read_matrix, write_field, write_matrix
from adregnet_jax.errors import UserError
from adregnet_jax.registration.chains import chain_field, chain_points, inverted
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.field_files import TransformFile, load_links

itk = pytest.importorskip("SimpleITK")

SHAPE, OTHER_SHAPE = (20, 18, 16), (14, 16, 15)
LPS = np.array([-1.0, -1, 1])


def oblique(spacing_mm, shape, centre_mm, turn_deg):
    axes = scipy.spatial.transform.Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix() * spacing_mm
    affine = np.eye(4)
    affine[:3, :3] = axes
    affine[:3, 3] = centre_mm - axes @ ((np.array(shape) - 1) / 2)
    return affine


CENTRE = np.array([120.0, -60, 30])
AFFINE = oblique([-2.0, 2, 2.5], SHAPE, CENTRE, [10, -5, 20])
OTHER_AFFINE = oblique([2.5, -2.5, 3], OTHER_SHAPE, CENTRE + 1, [0, 15, 5])
MATRIX = oblique([1.05, 0.95, 1.0], (1, 1, 1), np.array([12.0, -7, 4]), [5, 3, -8])
MATRIX[:3, 3] += CENTRE - MATRIX[:3, :3] @ CENTRE  # turned about the scans, not about the origin


def smooth(shape, seed, size=1.5):
    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    field = scipy.ndimage.gaussian_filter(noise, (3, 3, 3, 0))
    return (size * field / np.abs(field).max()).astype(np.float32)


def inner_points(count=40):
    """Around the centre, so that no transform leads out of a grid."""
    return CENTRE + np.random.default_rng(1).uniform(-5, 5, (count, 3))


@pytest.fixture
def files(tmp_path):
    """A field, another one on another grid, a matrix, and the image that they lead into."""
    write_field(tmp_path / "warp.nii.gz", smooth(SHAPE, 0), AFFINE)
    write_field(tmp_path / "other.nii.gz", smooth(OTHER_SHAPE, 1), OTHER_AFFINE)
    write_matrix(tmp_path / "affine.mat", MATRIX)
    shape = (40, 42, 38)
    values = scipy.ndimage.gaussian_filter(np.random.default_rng(2).normal(size=shape), 2).astype(np.float32)
    write_image(
        tmp_path / "moving.nii.gz", Image(100 * values, oblique([2.0, 2, 2], shape, CENTRE + 10, [0, 0, 30]))
    )
    return tmp_path


def as_itk(path):
    if path.name.endswith((".mat", ".txt", ".tfm", ".h5")):
        return itk.ReadTransform(str(path))
    return itk.DisplacementFieldTransform(itk.ReadImage(str(path), itk.sitkVectorFloat64))


def through_itk(transforms, points_mm):
    """Points [n, 3] RAS mm through transforms of SimpleITK, in their order."""
    points = points_mm * LPS
    for transform in transforms:
        points = np.array([transform.TransformPoint(point.tolist()) for point in points])
    return points * LPS


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def links(*paths):
    return load_links([TransformFile(path) for path in paths])


def test_points_pass_through_the_transforms_in_their_order(files):
    paths = [files / name for name in ("warp.nii.gz", "affine.mat", "other.nii.gz")]
    write_matrix(files / "back.txt", np.linalg.inv(MATRIX))
    paths.append(files / "back.txt")
    points = inner_points()
    found, _ = chain_points(links(*paths), points)
    np.testing.assert_allclose(found, through_itk(map(as_itk, paths), points), atol=2e-4)  # float32
    there = np.linalg.norm(found - points, axis=1)
    assert there.max() > 0.3


@pytest.mark.parametrize("order", [["warp", "affine"], ["affine", "warp"]])
@pytest.mark.parametrize("suffix", [".h5", ".tfm"])
def test_composites_of_itk_in_either_order(files, order, suffix):
    known = {"warp": as_itk(files / "warp.nii.gz"), "affine": as_itk(files / "affine.mat")}
    composite = itk.CompositeTransform([known[name] for name in reversed(order)])  # the last is applied first
    path = files / f"composite{suffix}"
    itk.WriteTransform(composite, str(path))
    points = inner_points()
    if order[0] == "affine":
        points = through_itk([known["affine"].GetInverse()], points)
    found, _ = chain_points(links(path), points)
    np.testing.assert_allclose(found, through_itk([composite], points), atol=2e-4)
    back, _ = chain_points(inverted(links(path)), found)
    np.testing.assert_allclose(back, points, atol=2e-3)


def test_b_splines_of_itk(files):
    image = itk.ReadImage(str(files / "moving.nii.gz"))
    spline = itk.BSplineTransformInitializer(image, [6, 6, 6], order=3)
    spline.SetParameters(np.random.default_rng(0).normal(0, 1.5, len(spline.GetParameters())).tolist())
    itk.WriteTransform(spline, str(files / "spline.tfm"))
    points = inner_points()
    found, _ = chain_points(links(files / "spline.tfm"), points)
    # Sampled eight times between control points, and linear between the samples.
    np.testing.assert_allclose(found, through_itk([spline], points), atol=0.02)


@pytest.mark.parametrize("suffix", [".mha", ".mhd", ".nrrd", ".nhdr", ".tfm", ".h5"])
def test_images_of_vectors_and_grids_of_other_programs(files, suffix):
    path = files / f"field{suffix}"
    vectors = itk.ReadImage(str(files / "warp.nii.gz"), itk.sitkVectorFloat64)
    if suffix in (".tfm", ".h5"):
        itk.WriteTransform(itk.DisplacementFieldTransform(vectors), str(path))
    else:
        itk.WriteImage(vectors, str(path))
    displacement, affine = read_field(path)
    np.testing.assert_allclose(displacement, smooth(SHAPE, 0), atol=1e-5)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    if suffix in (".mha", ".nrrd", ".tfm", ".h5"):
        write_field(files / f"ours{suffix}", displacement, affine)
        points = inner_points()
        expected = through_itk([as_itk(path)], points)
        np.testing.assert_allclose(
            through_itk([as_itk(files / f"ours{suffix}")], points), expected, atol=1e-4
        )


@pytest.mark.skipif(shutil.which("plastimatch") is None, reason="plastimatch is not installed")
def test_fields_of_plastimatch(tmp_path):
    shift, path = "5 -6 7", tmp_path / "vf.mha"
    grid = ["--dim", "20 21 22", "--spacing", "2 2 2", "--origin", "-20 -20 -20"]
    command = ["plastimatch", "synth-vf", "--xf-trans", shift, *grid, "--output", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    found, _ = chain_points(links(path), np.array([[1.0, 2, 3]]))
    np.testing.assert_allclose(found, [[1 - 5, 2 + 6, 3 + 7]], atol=1e-4)  # RAS
    assert run("convert", path, "-o", tmp_path / "ours.nrrd").exit_code == 0
    printed = subprocess.run(
        ["plastimatch", "stats", str(tmp_path / "ours.nrrd")],
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    (mean,) = (line.split()[1:] for line in printed.stdout.splitlines() if line.startswith("Mean:"))
    np.testing.assert_allclose(np.array(mean, float), [5, -6, 7], atol=1e-3)


def test_images_come_back_as_by_itk(files):
    """Two fields and an inverted matrix, on a grid of its own."""
    chain = [files / "warp.nii.gz", files / "other.nii.gz", files / "affine.mat"]
    grid = itk.Resample(itk.ReadImage(str(files / "moving.nii.gz")), [12, 10, 9], itk.Transform())
    grid.SetOrigin((LPS * (CENTRE - [4, 4, 4])).tolist())
    grid.SetSpacing([0.8, 0.9, 1.0])
    itk.WriteImage(grid, str(files / "grid.nii.gz"))
    result = run(
        "apply", *chain, files / "moving.nii.gz", "-o", files / "o.nii.gz", "--reference",
        files / "grid.nii.gz", "--invert", files / "affine.mat",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    known = [as_itk(path) for path in chain]
    known[2] = known[2].GetInverse()
    composite = itk.CompositeTransform(known[::-1])
    expected = itk.Resample(itk.ReadImage(str(files / "moving.nii.gz")), grid, composite, itk.sitkLinear, 0.0)
    values = itk.GetArrayFromImage(expected).transpose(2, 1, 0)
    found = read_image(files / "o.nii.gz")
    assert np.ptp(values) > 1
    np.testing.assert_allclose(found.values, values, atol=2e-3 * np.ptp(values))

    brackets = [chain[0], chain[1], f"[{chain[2]},1]"]
    run("compose", *brackets, "-o", files / "all.nii.gz", "--reference", files / "grid.nii.gz")
    run("apply", files / "all.nii.gz", files / "moving.nii.gz", "-o", files / "again.nii.gz")
    np.testing.assert_allclose(read_image(files / "again.nii.gz").values, found.values, atol=2e-3)
    write_points(files / "p.csv", inner_points())
    run("apply", *chain, files / "p.csv", "-o", files / "q.csv", "--invert", "3")
    np.testing.assert_allclose(read_points(files / "q.csv"), through_itk(known, inner_points()), atol=2e-4)


def test_an_inverse_leads_back_from_wherever_the_field_leads(files):
    """With a shift of many voxels in the field, as in fields that contain the affine step."""
    far = DisplacementField(smooth(SHAPE, 0, size=2.0) + np.float32(30), AFFINE)
    points = inner_points()
    there, outside = chain_points([(far, False)], points)
    assert outside == 0
    back, outside = chain_points([(far, True)], there)
    assert outside == 0
    np.testing.assert_allclose(back, points, atol=2e-3)


def test_a_field_on_its_own_grid_stays_as_it_is():
    field = DisplacementField(smooth(SHAPE, 0), AFFINE)
    assert chain_field([(field, False)], shape=SHAPE, affine=AFFINE) is field
    with pytest.raises(ValueError, match="at least one"):
        chain_field([], shape=SHAPE, affine=AFFINE)


def test_matrices_alone_become_a_matrix(files):
    assert run("compose", files / "affine.mat", files / "affine.mat", "-o", files / "a.txt").exit_code == 0
    np.testing.assert_allclose(read_matrix(files / "a.txt"), MATRIX @ MATRIX, atol=1e-9)
    assert run("invert", files / "affine.mat", "-o", files / "b.tfm").exit_code == 0
    np.testing.assert_allclose(read_matrix(files / "b.tfm"), np.linalg.inv(MATRIX), atol=1e-9)
    grid = files / "moving.nii.gz"
    assert run("convert", files / "affine.mat", "-o", files / "c.npz", "--reference", grid).exit_code == 0
    displacement, affine = read_field(files / "c.npz")
    voxel = np.array([3, 20, 10])
    there = nib.affines.apply_affine(affine, voxel + displacement[tuple(voxel)])
    expected = nib.affines.apply_affine(MATRIX, nib.affines.apply_affine(affine, voxel))
    np.testing.assert_allclose(there, expected, atol=2e-4)


def test_what_chains_refuse(files):
    warp, matrix, moving = (files / name for name in ("warp.nii.gz", "affine.mat", "moving.nii.gz"))
    for arguments, message in [
        (("apply", matrix, moving, "-o", files / "a.nii"), "--reference GRID"),
        (("apply", f"[{warp},1]", matrix, moving, "-o", files / "a.nii"), "--reference GRID"),
        (("apply", warp, moving, "-o", files / "a.nii", "--invert", "none"), "names 0 of the transforms"),
        (("apply", warp, warp, moving, "-o", files / "a.nii", "--invert", warp), "names 2 of the transforms"),
        (("compose", warp, matrix, "-o", files / "a.mat"), "hold matrices only"),
        (("compose", warp, matrix, "-o", files / "a.jpg"), "aren't known"),
        (("apply", moving, moving, "-o", files / "a.nii"), "is not a displacement field"),
    ]:
        with pytest.raises(UserError) as error:
            CliRunner().invoke(
                app, [str(argument) for argument in arguments], catch_exceptions=False, standalone_mode=False
            )
        from adregnet_jax.cli.options import in_option_words

        assert message in in_option_words(str(error.value))


def test_the_inverse_of_a_large_turn_of_three_slices():
    shape = (250, 250, 3)
    affine = oblique([1.0, 1, 4], shape, np.zeros(3), [0, 0, 0])
    turn = oblique([1.0, 1, 1], (1, 1, 1), np.zeros(3), [0, 0, 100])
    voxels = np.moveaxis(np.indices(shape), 0, -1)
    turned = nib.affines.apply_affine(np.linalg.inv(affine) @ turn @ affine, voxels)
    field = DisplacementField((turned - voxels).astype(np.float32), affine)
    points = np.array([[20.0, -30, -4], [-40, 10, -4]])
    back, _ = chain_points([(field, True)], nib.affines.apply_affine(turn, points))
    np.testing.assert_allclose(back, points, atol=1e-3)
