"""Two scans on different grids: one field in the world, its inverse, and refused input."""

import dataclasses

import jax
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.config import AffineConfig, InstanceConfig
from adregnet_jax.data.io.images import Image
from adregnet_jax.errors import UserError
from adregnet_jax.registration.field import warp_image, warp_points
from adregnet_jax.registration.scans import preset_scale, register_scans, scale_lengths

INSTANCE = InstanceConfig(search_range_mm=0.0, factors=(2, 1), steps=(20, 20), strides=(2, 2))
AFFINE = AffineConfig(kind="rigid", voxels=(12, 16), steps=(20, 10), rotation_starts_deg=0.0)
FIXED_SHAPE = (26, 24, 22)
# Oblique, 2 mm, far from the origin.
TURN = scipy.spatial.transform.Rotation.from_euler("xyz", (10, -8, 15), degrees=True).as_matrix()
FIXED_AFFINE = np.block([[2 * TURN, np.array([[300.0], [-80.0], [40.0]])], [np.zeros(3), np.ones(1)]])
# Flipped and exchanged axes, anisotropic.
MOVING_SHAPE = (24, 30, 28)


def moving_affine():
    axes = TURN @ np.array([[0, -1.8, 0], [-2.2, 0, 0], [0, 0, -1.9]])
    affine = np.eye(4)
    affine[:3, :3] = axes
    centre = nib.affines.apply_affine(FIXED_AFFINE, (np.array(FIXED_SHAPE) - 1) / 2)
    affine[:3, 3] = centre - axes @ ((np.array(MOVING_SHAPE) - 1) / 2)
    return affine


def truth_mm(points_mm):
    """Fixed world -> moving world: a bulge of some millimetres."""
    centre = nib.affines.apply_affine(FIXED_AFFINE, (np.array(FIXED_SHAPE) - 1) / 2)
    near = np.exp(-np.sum((points_mm - centre) ** 2, axis=-1, keepdims=True) / (2 * 12.0**2))
    return points_mm + near * np.array([4.0, -3.0, 2.0])


@pytest.fixture(scope="module")
def scans():
    """A textured moving scan on a grid of its own, and the fixed scan that the truth makes of it."""
    random = np.random.default_rng(0)
    texture = scipy.ndimage.gaussian_filter(random.normal(size=MOVING_SHAPE), 1.5)
    ball = np.linalg.norm((np.indices(MOVING_SHAPE).T - np.array(MOVING_SHAPE) / 2) / 11, axis=-1).T < 1
    moving = Image((100 * ball + 300 * ball * texture).astype(np.float32), moving_affine(), "moving scan")
    grid = np.moveaxis(np.indices(FIXED_SHAPE), 0, -1)
    target_mm = truth_mm(nib.affines.apply_affine(FIXED_AFFINE, grid))
    voxels = nib.affines.apply_affine(np.linalg.inv(moving.affine), target_mm)
    values = scipy.ndimage.map_coordinates(moving.values, np.moveaxis(voxels, -1, 0), order=1)
    return Image(values, FIXED_AFFINE, "fixed scan"), moving


def inner_points_mm():
    grid = np.stack(np.meshgrid(*[np.arange(8, n - 8) for n in FIXED_SHAPE], indexing="ij"), axis=-1)
    return nib.affines.apply_affine(FIXED_AFFINE, grid.reshape(-1, 3))


@pytest.fixture(scope="module")
def registered(scans):
    return register_scans(*scans, affine=AFFINE, instance=INSTANCE)


def test_the_motion_between_two_grids_is_found(registered):
    points = inner_points_mm()
    before = np.linalg.norm(truth_mm(points) - points, axis=-1).mean()
    after = np.linalg.norm(truth_mm(points) - np.asarray(warp_points(registered.field, points)), axis=-1)
    assert before > 2
    assert after.mean() < 0.35 * before


def test_the_inverse_leads_back(registered):
    points = inner_points_mm()
    back = warp_points(registered.inverse, warp_points(registered.field, points))
    assert np.median(np.linalg.norm(back - points, axis=-1)) < 0.1


def test_the_warped_scan_is_one_interpolation_through_the_field(scans, registered):
    fixed, moving = scans
    expected = warp_image(registered.field, moving.values, moving.affine)
    np.testing.assert_allclose(registered.warped.values, expected, atol=1e-2)
    before = warp_image(
        dataclasses.replace(registered.field, displacement=0 * registered.field.displacement),
        moving.values,
        moving.affine,
    )
    inside = (slice(4, -4),) * 3
    errors = [np.mean((image - fixed.values)[inside] ** 2) for image in (registered.warped.values, before)]
    assert errors[0] < errors[1] / 3
    assert registered.warped.affine is fixed.affine


def test_the_affine_step_alone(scans):
    stages: list[str] = []
    result = register_scans(*scans, affine=AFFINE, instance=None, on_stage=stages.append)
    points = inner_points_mm()
    through_matrix = nib.affines.apply_affine(result.matrix, points)
    np.testing.assert_allclose(warp_points(result.field, points), through_matrix, atol=1e-3)
    np.testing.assert_allclose(result.matrix[:3, :3] @ result.matrix[:3, :3].T, np.eye(3), atol=1e-5)
    assert stages == list(result.seconds) == ["affine", "deformable", "inverse"]


@pytest.mark.parametrize("size_mm", [0.1, 0.002, 3e-5, 1e5])
def test_voxels_of_any_size_get_that_of_the_presets(size_mm):
    """A mouse's brain, microscopy, a planet. An eighth of a millimetre stays true if it was given."""
    scale = preset_scale([size_mm / 2, size_mm, 2 * size_mm])
    np.testing.assert_allclose(scale * size_mm, 2)
    assert scale_lengths(InstanceConfig(), scale).search_range_mm == InstanceConfig().search_range_mm
    np.testing.assert_allclose(
        scale_lengths(InstanceConfig(search_range_mm=1 / 8), scale).search_range_mm, scale / 8
    )
    assert preset_scale([0.3, 0.3, 5]) == preset_scale([8, 8, 8]) == 1


OTHER_SIZES_MM = [pytest.param(size_mm, marks=pytest.mark.program) for size_mm in (0.1, 0.025, 0.002, 1e5)]


@pytest.mark.parametrize("size_mm", [3e-5, *OTHER_SIZES_MM])
def test_the_same_arrays_give_the_same_displacement(scans, registered, size_mm):
    """A mouse, a tissue block, microscopy, a planet: what the arrays give at 2 mm, by voxels."""
    scale = np.diag([size_mm / 2] * 3 + [1.0])
    fixed, moving = (dataclasses.replace(scan, affine=scale @ scan.affine) for scan in scans)
    mask = dataclasses.replace(fixed, values=np.ones(fixed.shape, np.float32))
    found = register_scans(fixed, moving, affine=AFFINE, instance=INSTANCE)
    np.testing.assert_allclose(found.field.displacement, registered.field.displacement, atol=2e-3)
    np.testing.assert_allclose(found.inverse.displacement, registered.inverse.displacement, atol=2e-3)
    unscaled = np.linalg.inv(scale) @ found.matrix @ scale
    np.testing.assert_allclose(unscaled, registered.matrix, atol=1e-3)
    assert found.field.affine is fixed.affine
    aside = dataclasses.replace(mask, affine=mask.affine + size_mm * np.eye(4, k=3))
    with pytest.raises(UserError, match="expected one grid"):
        register_scans(fixed, moving, affine=None, instance=INSTANCE, fixed_mask=aside)


def test_padding_changes_nothing(scans):
    """Outside of a circle of view, where a scanner has no data, is as good as air."""
    fixed, moving = (
        dataclasses.replace(scan, values=np.maximum(5 * scan.values - 1000, -1000)) for scan in scans
    )
    corner = np.hypot(*np.ogrid[-1:1:24j, -1:1:30j])[..., None] > 1.2
    padded = dataclasses.replace(moving, values=np.where(corner, np.float32(-32768), moving.values))
    found = register_scans(fixed, padded, affine=None, instance=INSTANCE)
    expected = register_scans(fixed, moving, affine=None, instance=INSTANCE)
    inner = (slice(6, -6),) * 3
    difference = np.subtract(found.field.displacement, expected.field.displacement)[inner]
    assert np.abs(difference).max() < 0.2
    assert np.abs(expected.field.displacement[inner]).max() > 1
    # The pictures keep the contrast of the body, and paint what the moving scan doesn't reach as air.
    shown = found.measurement
    assert np.ptp(shown.warped[inner]) > 0.5
    far = dataclasses.replace(moving, affine=moving.affine + 20 * np.eye(4, k=3))
    assert register_scans(fixed, far, affine=None, instance=INSTANCE).measurement.moving.min() == 0


def test_scans_of_other_contrast(scans):
    fixed, moving = scans
    inverted = dataclasses.replace(
        moving, values=np.where(moving.values != 0, moving.values.max() - moving.values, 0)
    )
    result = register_scans(fixed, inverted, affine=None, instance=INSTANCE, modality="multi")
    points = inner_points_mm()
    before, after = (
        np.linalg.norm(truth_mm(points) - found, axis=-1).mean()
        for found in (points, warp_points(result.field, points))
    )
    assert after < 0.5 * before
    # Only the foreground is compared, as with masks, which choose the intensity window, too.
    masks = {
        f"{which}_mask": dataclasses.replace(
            scan, values=scipy.ndimage.binary_fill_holes(scan.values != 0).astype(np.uint8)
        )
        for which, scan in (("fixed", fixed), ("moving", inverted))
    }
    masked = register_scans(fixed, inverted, affine=None, instance=INSTANCE, **masks)
    found = [np.asarray(warp_points(one.field, points)) for one in (result, masked)]
    assert np.linalg.norm(truth_mm(points) - found[1], axis=-1).mean() < 0.5 * before
    assert np.linalg.norm(found[0] - found[1], axis=-1).mean() < 0.2 * before


def test_masked_out_regions_have_no_influence(scans):
    fixed, moving = scans
    mask = np.ones(fixed.shape, np.uint8)
    mask[:9] = 0
    spoilt = fixed.values.copy()
    spoilt[:5] = spoilt.mean()
    fields = [
        register_scans(
            dataclasses.replace(fixed, values=values),
            moving,
            affine=None,
            instance=dataclasses.replace(INSTANCE, factors=(1,), steps=(5,), strides=(2,)),
            fixed_mask=dataclasses.replace(fixed, values=mask),
        ).field.displacement
        for values in (fixed.values, spoilt)
    ]
    np.testing.assert_allclose(fields[0][9:], fields[1][9:], atol=5e-3)


def far_away(image):
    affine = image.affine.copy()
    affine[0, 3] += 500
    return dataclasses.replace(image, affine=affine)


def test_scans_apart_in_the_world_are_refused_or_start_from_their_centres(scans):
    fixed, moving = scans
    with pytest.raises(UserError, match=r"do not overlap in the world, they are [0-9.]+ mm apart"):
        register_scans(fixed, far_away(moving), affine=AFFINE, instance=None)
    result = register_scans(fixed, far_away(moving), affine=AFFINE, instance=None, apart=True)
    centre = nib.affines.apply_affine(FIXED_AFFINE, (np.array(FIXED_SHAPE) - 1) / 2)
    assert np.linalg.norm(nib.affines.apply_affine(result.matrix, centre) - centre - [500, 0, 0]) < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fixed: {"fixed_mask": dataclasses.replace(fixed, values=fixed.values[1:])}, "one grid"),
        (lambda fixed: {"fixed_mask": far_away(fixed)}, "one grid"),
        (lambda fixed: {"fixed_mask": dataclasses.replace(fixed, values=0 * fixed.values)}, "empty"),
    ],
)
def test_bad_masks_are_refused(scans, change, message):
    with pytest.raises(UserError, match=message):
        register_scans(*scans, affine=None, instance=INSTANCE, **change(scans[0]))


def test_a_constant_scan_gives_the_identity_and_a_warning(scans):
    constant = dataclasses.replace(scans[1], values=0 * scans[1].values + 7)
    with pytest.warns(UserWarning, match="moving scan: every voxel has the same value"):
        found = register_scans(scans[0], constant, affine=AFFINE, instance=INSTANCE)
    np.testing.assert_array_equal(found.field.displacement, 0)
    np.testing.assert_allclose(found.inverse.displacement, 0, atol=1e-4)
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    np.testing.assert_array_equal(found.warped.values, 7)


def test_nothing_to_register_by_is_refused(scans):
    with pytest.raises(ValueError, match="got none of them"):
        register_scans(*scans, affine=None, instance=None)


def test_the_similarity_after_each_stage(scans, registered):
    row = registered.measurement.row
    assert row["similarity_before"] < row["similarity"] and row["similarity_affine"] < row["similarity"]
    assert row["similarity_network"] is None
    assert set(registered.stages) == {"affine"}
    alone = register_scans(*scans, affine=AFFINE, instance=None)
    assert alone.measurement.row["similarity_affine"] is None  # nothing follows
    np.testing.assert_allclose(alone.measurement.row["similarity"], row["similarity_affine"], atol=1e-4)


def test_results_are_finite_arrays(registered):
    for leaf in jax.tree.leaves((registered.field, registered.inverse)):
        assert np.isfinite(leaf).all()


def test_the_contrast_and_the_smoothness_are_found(scans):
    fixed, moving = scans
    inverted = Image(np.where(moving.values != 0, 300 - moving.values, 0), moving.affine, "inverted scan")
    found = {
        name: register_scans(fixed, scan, affine=AFFINE, instance=INSTANCE)
        for name, scan in (("mono", moving), ("multi", inverted))
    }
    for modality, result in found.items():
        assert result.modality == modality
        assert result.evidence is not None
        row = result.summary()["results"]
        assert row["modality"] == modality and row["unseen_gain"] == round(result.evidence.unseen_gain, 4)


def test_scans_of_different_things_are_not_deformed(scans):
    fixed, _ = scans
    noise = scipy.ndimage.gaussian_filter(np.random.default_rng(3).normal(size=FIXED_SHAPE), 1.5)
    other = Image(noise.astype(np.float32), FIXED_AFFINE, "other scan")
    result = register_scans(fixed, other, affine=None, instance=INSTANCE, modality="mono")
    assert result.evidence is not None and not result.evidence.believable
    np.testing.assert_array_equal(result.field.displacement, 0)
    assert result.summary()["results"]["smoothness"] is None
