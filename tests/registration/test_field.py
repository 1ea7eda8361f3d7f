"""Fields in the world applied to images and points, compared with laws, slow formulas and ITK."""

import warnings

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from adregnet_jax.data.io.images import Image, to_itk, write_image
from adregnet_jax.data.io.transforms import write_field
from adregnet_jax.registration.field import (
    DisplacementField,
    after_field,
    compose_fields,
    field_from_affine,
    field_jacobian,
    invert_field,
    refine_inverse,
    resample_field,
    reverse_field,
    warp_image,
    warp_points,
)

SHAPE = (20, 24, 16)
MOVING_SHAPE = (26, 18, 22)


def oblique(angles, scales, shape, centre):
    """An affine whose grid is centred at `centre` (RAS mm)."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scales
    affine[:3, 3] = np.asarray(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


# Anisotropic, turned against each other, each with flipped axes of its own.
AFFINE = oblique([10, -20, 30], [-1.5, 2.0, 2.5], SHAPE, [15, -40, 120])
MOVING_AFFINE = oblique([-15, 5, 100], [1.8, -2.2, -1.7], MOVING_SHAPE, [18, -38, 121])
MATRIX = np.eye(4)
MATRIX[:3, :3] = Rotation.from_euler("xyz", [3, -4, 5], degrees=True).as_matrix() * [1.05, 0.95, 1.0]
MATRIX[:3, 3] = np.array([15, -40, 120]) - MATRIX[:3, :3] @ [15, -40, 120] + [2, -1, 1.5]


def smooth(shape, sigma, *, seed=0):
    noise = np.random.default_rng(seed).normal(size=shape)
    blurred = scipy.ndimage.gaussian_filter(noise, sigma)
    return (blurred / blurred.std()).astype(np.float32)


DISPLACEMENT = np.stack([smooth(SHAPE, 4, seed=k) for k in range(3)], axis=-1)
FIELD = DisplacementField(DISPLACEMENT, AFFINE)
MOVING = smooth(MOVING_SHAPE, 2, seed=7)


def moving_voxels(displacement=DISPLACEMENT):
    """Where every voxel of the field lies in the moving image: the law, in float64."""
    grid = np.moveaxis(np.indices(SHAPE), 0, -1)
    return nib.affines.apply_affine(np.linalg.inv(MOVING_AFFINE) @ AFFINE, grid + displacement)


def well_inside(voxels, margin=1.0):
    return np.all((voxels > margin) & (voxels < np.array(MOVING_SHAPE) - 1 - margin), axis=-1)


@pytest.mark.parametrize(("mode", "order", "tolerance"), [("linear", 1, 2e-4), ("cubic", 3, 1e-3)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_images_of_another_grid(mode, order, tolerance, padding):
    voxels = moving_voxels()
    expected = scipy.ndimage.map_coordinates(MOVING, np.moveaxis(voxels, -1, 0), order=order, mode="mirror")
    warped = jax.jit(warp_image, static_argnames=("mode", "padding"))(
        FIELD, MOVING, MOVING_AFFINE, mode=mode, padding=padding
    )
    inside = well_inside(voxels, 0)
    assert 0.5 < inside.mean() < 1  # both cases are there
    np.testing.assert_allclose(np.where(inside, warped, 0), np.where(inside, expected, 0), atol=tolerance)
    outside = ~np.all((voxels > -1) & (voxels < MOVING_SHAPE), axis=-1)
    assert outside.any()
    assert np.all(np.asarray(warped)[outside] == 0) == (padding == "zeros")


def test_nearest_and_label():
    voxels = moving_voxels()
    labels = (np.digitize(MOVING, [-0.5, 0.5]) * 50).astype(np.int16)
    nearest = warp_image(FIELD, labels, MOVING_AFFINE, mode="nearest")
    index = np.floor(voxels + 0.5).astype(int)
    # A thousandth of a voxel may decide on a tie.
    clear = well_inside(voxels) & (np.abs(voxels + 0.5 - np.round(voxels + 0.5)).min(axis=-1) > 1e-3)
    np.testing.assert_array_equal(np.asarray(nearest)[clear], labels[tuple(index[clear].T)])

    scores = [
        scipy.ndimage.map_coordinates((labels == n).astype(float), np.moveaxis(voxels, -1, 0), order=1)
        for n in (0, 50, 100)
    ]
    best = np.argmax(scores, axis=0) * 50
    ranked = np.sort(scores, axis=0)
    clear = well_inside(voxels) & (ranked[-1] - ranked[-2] > 1e-3)
    voted = warp_image(FIELD, labels, MOVING_AFFINE, mode="label")
    assert voted.dtype == np.int16
    np.testing.assert_array_equal(np.asarray(voted)[clear], best[clear])
    traced = jax.jit(
        lambda field, values: warp_image(field, values, MOVING_AFFINE, mode="label", classes=(0, 50, 100))
    )
    np.testing.assert_array_equal(traced(FIELD, labels), voted)

    ones = np.ones(MOVING_SHAPE, np.int32)
    outside = ~np.all((voxels > -0.51) & (voxels < np.array(MOVING_SHAPE) - 0.49), axis=-1)
    assert np.all(
        np.asarray(warp_image(FIELD, ones, MOVING_AFFINE, mode="label", classes=(0, 1)))[outside] == 0
    )
    assert np.all(warp_image(FIELD, ones, MOVING_AFFINE, mode="label", padding="border", classes=(0, 1)) == 1)


def test_a_field_at_rest_gives_the_image_itself():
    still = DisplacementField(jnp.zeros((*MOVING_SHAPE, 3)), MOVING_AFFINE)
    for mode in ("linear", "cubic"):
        warped = warp_image(still, MOVING, MOVING_AFFINE, mode=mode, padding="border")
        np.testing.assert_allclose(warped, MOVING, atol=1e-3)


def test_points_at_voxels_and_between():
    voxels = np.array([[3, 4, 5], [10, 20, 2]])
    points_mm = nib.affines.apply_affine(AFFINE, voxels)
    expected = nib.affines.apply_affine(AFFINE, voxels + DISPLACEMENT[tuple(voxels.T)])
    np.testing.assert_allclose(jax.jit(warp_points)(FIELD, points_mm), expected, atol=1e-3)
    between = nib.affines.apply_affine(AFFINE, [[3.5, 4, 5]])
    vector = (DISPLACEMENT[3, 4, 5] + DISPLACEMENT[4, 4, 5]) / 2
    expected = between + AFFINE[:3, :3] @ vector
    np.testing.assert_allclose(warp_points(FIELD, between), expected, atol=1e-3)


def test_a_matrix_as_a_field():
    points_mm = nib.affines.apply_affine(AFFINE, np.random.default_rng(0).uniform(0, 15, (30, 3)))
    field = jax.jit(field_from_affine, static_argnames="shape")(MATRIX, shape=SHAPE, affine=AFFINE)
    expected = nib.affines.apply_affine(MATRIX, points_mm)
    np.testing.assert_allclose(warp_points(field, points_mm), expected, atol=1e-3)


def test_a_matrix_after_a_field():
    points_mm = nib.affines.apply_affine(AFFINE, np.random.default_rng(0).uniform(0, 15, (30, 3)))
    both = warp_points(after_field(FIELD, MATRIX), points_mm)
    expected = nib.affines.apply_affine(MATRIX, warp_points(FIELD, points_mm))
    np.testing.assert_allclose(both, expected, atol=1e-3)


def test_composition_of_points_and_its_inverse():
    small = DisplacementField(0.5 * DISPLACEMENT, AFFINE)
    points_mm = nib.affines.apply_affine(AFFINE, np.random.default_rng(0).integers(4, 12, (40, 3)))
    composed = warp_points(compose_fields(FIELD, small), points_mm)
    np.testing.assert_allclose(composed, warp_points(FIELD, warp_points(small, points_mm)), atol=1e-3)

    back = invert_field(small)
    there_and_back = warp_points(compose_fields(small, back), points_mm)
    np.testing.assert_allclose(there_and_back, points_mm, atol=1e-3)
    assert np.linalg.norm(warp_points(small, points_mm) - points_mm, axis=1).max() > 1


@pytest.mark.parametrize("bent", [0.0, 0.3])
def test_a_refined_inverse_leads_back_from_every_voxel(bent):
    """Also from those whose place lies beyond the grid of the field."""
    small = DisplacementField(bent * DISPLACEMENT, AFFINE)
    rough = reverse_field(invert_field(small), MATRIX, shape=MOVING_SHAPE, affine=MOVING_AFFINE)
    inverse = refine_inverse(rough, small, MATRIX)
    voxels = np.moveaxis(np.indices(MOVING_SHAPE), 0, -1).reshape(-1, 3)
    points_mm = nib.affines.apply_affine(MOVING_AFFINE, voxels)
    before_mm = np.asarray(warp_points(inverse, points_mm))
    again_mm = nib.affines.apply_affine(MATRIX, warp_points(small, before_mm))
    np.testing.assert_allclose(again_mm, points_mm, atol=2e-3)
    before = nib.affines.apply_affine(np.linalg.inv(AFFINE), before_mm)
    assert np.any((before < -1) | (before > SHAPE))


def test_a_field_on_another_grid_is_the_same_map():
    moved = resample_field(FIELD, shape=MOVING_SHAPE, affine=jnp.asarray(MOVING_AFFINE))
    assert moved.displacement.shape == (*MOVING_SHAPE, 3)
    voxels = np.moveaxis(np.indices(MOVING_SHAPE), 0, -1)
    points_mm = nib.affines.apply_affine(MOVING_AFFINE, voxels)
    native = nib.affines.apply_affine(np.linalg.inv(AFFINE), points_mm)  # the law, in float64, by SciPy
    components = [
        scipy.ndimage.map_coordinates(
            DISPLACEMENT[..., k], np.moveaxis(native, -1, 0), order=1, mode="nearest"
        )
        for k in range(3)
    ]
    expected_mm = np.stack(components, axis=-1) @ AFFINE[:3, :3].T
    np.testing.assert_allclose(moved.displacement @ MOVING_AFFINE[:3, :3].T, expected_mm, atol=2e-3)
    same = resample_field(FIELD, shape=SHAPE, affine=jnp.asarray(AFFINE))
    np.testing.assert_allclose(same.displacement, DISPLACEMENT, atol=1e-3)


def test_mixing_grids_is_an_error():
    with pytest.raises(ValueError, match="different grids"):
        compose_fields(FIELD, DisplacementField(DISPLACEMENT[:-1], AFFINE))
    moved = AFFINE + 0.5 * np.eye(4, k=3)
    with pytest.raises(ValueError, match=r"affines differ by up to 0\.5"):
        compose_fields(FIELD, DisplacementField(DISPLACEMENT, moved))
    assert jax.jit(compose_fields)(FIELD, FIELD).shape == SHAPE


def test_jacobian_of_a_matrix_is_its_determinant():
    field = field_from_affine(MATRIX, shape=SHAPE, affine=AFFINE)
    np.testing.assert_allclose(field_jacobian(field), np.linalg.det(MATRIX[:3, :3]), atol=1e-3)


def test_fields_pass_through_transformations():
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), FIELD)
    points_mm = nib.affines.apply_affine(AFFINE, [[3.0, 4, 5]])
    warped = jax.vmap(warp_points, in_axes=(0, None))(batch, points_mm)
    np.testing.assert_allclose(warped[1], warp_points(FIELD, points_mm), atol=1e-4)

    def distance(matrix):
        return jnp.sum(
            (warp_points(field_from_affine(matrix, shape=(4, 4, 4), affine=AFFINE), points_mm)) ** 2
        )

    gradient = jax.grad(distance)(jnp.asarray(MATRIX, jnp.float32))
    # The point lies outside this small field, which keeps its border values there.
    edge_mm = nib.affines.apply_affine(AFFINE, np.minimum([3, 4, 5], 3))
    moved = points_mm[0] + nib.affines.apply_affine(MATRIX, edge_mm) - edge_mm
    np.testing.assert_allclose(gradient[:3, 3], 2 * moved, rtol=1e-4)


@pytest.mark.usefixtures("unchecked_types")
def test_shapes():
    with pytest.raises(ValueError, match="a field has a displacement"):
        warp_points(DisplacementField(DISPLACEMENT[0], AFFINE), np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"points must be \[n, 3\]"):
        warp_points(FIELD, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="affine must be"):
        resample_field(FIELD, shape=SHAPE, affine=jnp.eye(3))
    with pytest.raises(ValueError, match="expected values"):
        warp_image(FIELD, MOVING[0], MOVING_AFFINE)
    with pytest.raises(ValueError, match="matrix must be"):
        after_field(FIELD, np.eye(3))
    with pytest.raises(ValueError, match="mode must be"):
        warp_image(FIELD, MOVING, MOVING_AFFINE, mode="quintic")  # type: ignore[arg-type]


def itk_transform(itk, path):
    if path.suffix == ".h5":
        return itk.ReadTransform(str(path))
    return itk.DisplacementFieldTransform(itk.ReadImage(str(path), itk.sitkVectorFloat64))


@pytest.mark.parametrize(
    ("name", "format", "matrix"),
    [
        ("a.nii.gz", "itk", None),
        ("a.nii.gz", "nifti", None),
        ("a.h5", "itk", None),
        ("a.h5", "itk", MATRIX),
    ],
)
def test_itk_applies_our_files_as_we_do(tmp_path, name, format, matrix):
    itk = pytest.importorskip("SimpleITK")
    field = FIELD if matrix is None else after_field(FIELD, matrix)
    write_field(tmp_path / name, DISPLACEMENT, AFFINE, format=format, matrix=matrix)
    write_image(tmp_path / "moving.nii.gz", Image(MOVING, MOVING_AFFINE))
    transform = itk_transform(itk, tmp_path / name)
    moving = itk.ReadImage(str(tmp_path / "moving.nii.gz"))
    fixed = to_itk(tmp_path, np.zeros(SHAPE, np.float32), AFFINE)
    theirs = itk.GetArrayFromImage(itk.Resample(moving, fixed, transform, itk.sitkLinear, 0.0)).transpose()
    ours = np.asarray(warp_image(field, MOVING, MOVING_AFFINE))
    inside = well_inside(moving_voxels(np.asarray(field.displacement)))
    assert inside.mean() > 0.4
    difference = np.abs(ours - theirs)[inside].mean() / np.ptp(MOVING)
    assert difference < 1e-4  # the requirement is 5e-3; a wrong sign of one axis gives 0.1

    voxels = np.random.default_rng(0).uniform(1, np.array(SHAPE) - 2, (50, 3))
    points_mm = nib.affines.apply_affine(AFFINE, voxels)
    lps = [transform.TransformPoint(point.tolist()) for point in points_mm * [-1, -1, 1]]
    points = warp_points(FIELD, points_mm)
    if matrix is not None:
        points = nib.affines.apply_affine(matrix, points)
    np.testing.assert_allclose(points, lps * np.array([-1, -1, 1]), atol=0.01)


def test_nitransforms_reads_our_file(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        nonlinear = pytest.importorskip("nitransforms.nonlinear")
    write_field(tmp_path / "a.nii.gz", DISPLACEMENT, AFFINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transform = nonlinear.DenseFieldTransform.from_filename(tmp_path / "a.nii.gz", fmt="itk")
        # At voxels: between them it takes cubic splines.
        points_mm = nib.affines.apply_affine(AFFINE, np.random.default_rng(0).integers(0, 16, (50, 3)))
        theirs = transform.map(points_mm)
    np.testing.assert_allclose(warp_points(FIELD, points_mm), theirs, atol=0.01)
