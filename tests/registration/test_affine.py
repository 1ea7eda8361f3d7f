"""Affine registration: known maps between scans generated from a formula on different grids."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from scipy.spatial.transform import Rotation

from adregnet_jax import AffineConfig, align_affine
from adregnet_jax.errors import UserError

# Few starts and coarse grids: tests run code that is quick to compile and slow to run.
CONFIG = AffineConfig(voxels=(20,), steps=(60,), rotation_starts_deg=0.0)
NMI = dataclasses.replace(CONFIG, similarity="nmi", voxels=(16,), steps=(40,))
FIXED_SHAPE, MOVING_SHAPE = (24, 22, 20), (24, 18, 28)


def grid(linear, shape, centre_mm=(0.0, 0.0, 0.0)):
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = np.asarray(centre_mm) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


FIXED_AFFINE = grid(np.diag([-5.0, -5.0, 5.5]), FIXED_SHAPE)
# Axes in another order and direction, voxels of another size.
MOVING_CENTRE_MM = (7.0, -12.0, 4.0)
MOVING_AFFINE = grid([[0, 6.5, 0], [0, 0, -4.5], [5, 0, 0]], MOVING_SHAPE, MOVING_CENTRE_MM)


def blobs():
    """Positions, widths and brightness of bright and dark spots in a body of about 70 mm."""
    rng = np.random.default_rng(4)
    centres_mm = rng.uniform(-24, 24, (14, 3))
    return centres_mm, rng.uniform(6, 12, 14), rng.uniform(0.2, 0.6, 14)


def world_mm(affine, shape):
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def scan(affine, shape, matrix=None):
    """The body moved by `matrix` (fixed -> moving mm), computed from its formula without interpolation."""
    points_mm = world_mm(affine, shape)
    if matrix is not None:
        back = np.linalg.inv(matrix)
        points_mm = points_mm @ back[:3, :3].T + back[:3, 3]
    values = np.zeros(shape)
    for centre_mm, width_mm, height in zip(*blobs(), strict=True):
        values += height * np.exp(-np.sum((points_mm - centre_mm) ** 2, axis=-1) / (2 * width_mm**2))
    return np.clip(values, 0, 1).astype(np.float32)


def world_map(rotation_deg=(0, 0, 0), scales=(1, 1, 1), shift_mm=(0, 0, 0)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", rotation_deg, degrees=True).as_matrix() * scales
    matrix[:3, 3] = shift_mm
    return matrix


FIXED = scan(FIXED_AFFINE, FIXED_SHAPE)
BODY_MM = world_mm(FIXED_AFFINE, FIXED_SHAPE)[FIXED > 0.2]
RIGID = world_map((8, -12, 15), shift_mm=(9, -16, 6))
AFFINE = world_map((8, -12, 15), (1.15, 0.88, 1.05), (9, -16, 6))


def mean_error_mm(found, true):
    difference = np.asarray(found, float) - true
    return np.linalg.norm(BODY_MM @ difference[:3, :3].T + difference[:3, 3], axis=-1).mean()


def aligned(moving, config=CONFIG, **masks):
    return align_affine(FIXED, moving, FIXED_AFFINE, MOVING_AFFINE, config=config, **masks)


def settings(**changes):
    return dataclasses.replace(CONFIG, **changes)


@functools.cache
def moving_scan(which="affine"):
    return scan(MOVING_AFFINE, MOVING_SHAPE, {"affine": AFFINE, "rigid": RIGID}[which])


@pytest.mark.parametrize(("kind", "true"), [("rigid", RIGID), ("affine", AFFINE)])
def test_a_known_map_is_found_between_other_grids(kind, true):
    found = aligned(moving_scan(kind), settings(kind=kind))
    assert found.shape == (4, 4) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found[3], [0, 0, 0, 1])
    assert mean_error_mm(np.eye(4), true) > 15
    assert mean_error_mm(found, true) < 1


def test_rotation_starts_and_levels_find_what_one_start_does_not():
    true = world_map((-10, 110, 10), (1.2, 0.9, 1.0), (20, -16, 10))
    moving = scan(MOVING_AFFINE, MOVING_SHAPE, true)
    assert mean_error_mm(aligned(moving), true) > 10
    config = AffineConfig(voxels=(10, 20), steps=(10, 60), rotation_starts_deg=100.0)
    # Half a voxel of the level: without noise, the local NCC also matches the phantom's faint rim, which is
    # alike at any scale. Real scans are found to a fraction of a millimetre (benchmarks/affine.py).
    assert mean_error_mm(aligned(moving, config), true) < 3


@pytest.mark.parametrize("seed", range(2))
def test_noise_alone_moves_nothing(seed):
    """Interpolation smooths noise, so that scans seem more alike wherever their voxels don't meet."""
    rng = np.random.default_rng(seed)
    texture = scipy.ndimage.gaussian_filter(rng.normal(size=FIXED_SHAPE), 1.5)
    texture = (texture - texture.min()) / np.ptp(texture)
    config = AffineConfig(voxels=(10, 20), steps=(10, 30), rotation_starts_deg=0.0)

    def found(moved, noise):
        fixed, moving = (
            (values + rng.normal(scale=noise, size=FIXED_SHAPE)).astype(np.float32)
            for values in (texture, moved)
        )
        return align_affine(fixed, moving, FIXED_AFFINE, FIXED_AFFINE, config=config)

    np.testing.assert_array_equal(found(texture, noise=0.05), np.eye(4))
    # Half a voxel of motion is more than chance.
    moved = scipy.ndimage.shift(texture, (0.5, 0, 0), order=3, mode="nearest")
    assert mean_error_mm(found(moved, noise=0.02), world_map(shift_mm=(-2.5, 0, 0))) < 0.5


def test_no_steps_leave_the_best_start():
    """The centres of mass: a shift is found by them alone."""
    true = world_map(shift_mm=(9, -16, 6))
    found = aligned(scan(MOVING_AFFINE, MOVING_SHAPE, true), settings(steps=(0,)))
    np.testing.assert_array_equal(found[:3, :3], np.eye(3))
    np.testing.assert_allclose(found, true, atol=0.5)
    # The geometric centres, where these fit: something in a corner has moved the centre of mass.
    fixed, true = FIXED.copy(), world_map(shift_mm=MOVING_CENTRE_MM)
    fixed[:5, :5, :5] = 0.7
    moving = scan(MOVING_AFFINE, MOVING_SHAPE, true)
    found = align_affine(fixed, moving, FIXED_AFFINE, MOVING_AFFINE, config=settings(steps=(0,)))
    np.testing.assert_allclose(found, true, atol=1e-5)


def correlation(matrix, moving):
    """NCC by SciPy on the fixed voxels that meet the moving grid, and the share of them."""
    points = world_mm(np.linalg.inv(MOVING_AFFINE) @ np.asarray(matrix, float) @ FIXED_AFFINE, FIXED_SHAPE)
    inside = np.all((points >= 0) & (points <= np.array(MOVING_SHAPE) - 1), axis=-1)
    warped = scipy.ndimage.map_coordinates(moving, points[inside].T, order=1)
    return np.corrcoef(FIXED[inside], warped)[0, 1], inside.mean()


def test_scans_of_different_things_become_no_less_similar_and_keep_their_overlap():
    for seed in range(3):
        moving = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=MOVING_SHAPE), 3)
        moving = ((moving - moving.min()) / np.ptp(moving)).astype(np.float32)
        before, _ = correlation(aligned(moving, settings(steps=(0,))), moving)
        after, overlap = correlation(aligned(moving), moving)
        assert after > before + 0.05
        assert overlap > 0.4


def test_far_world_origins_cost_nothing():
    far = np.eye(4)
    far[:3, 3] = (4000, -7000, 5000)
    near = np.asarray(aligned(moving_scan()), float)
    found = align_affine(FIXED, moving_scan(), far @ FIXED_AFFINE, MOVING_AFFINE, config=CONFIG)
    # float32 keeps thousands of mm to about 0.0005; the sum of three such products.
    assert mean_error_mm(np.asarray(found, float) @ far, near) < 0.005


SCANS = {"fixed": FIXED, "moving": moving_scan()}
EVERYWHERE = np.ones(FIXED_SHAPE, bool)


@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_masked_out_regions_have_no_influence(which):
    masks: dict[str, Any] = {f"{name}_mask": np.ones(values.shape) for name, values in SCANS.items()}
    masks[f"{which}_mask"][:8] = 0
    found: dict[float, jax.Array] = {}
    for value in (1.0, np.nan):
        scans = SCANS | {which: np.where(masks[f"{which}_mask"] > 0, SCANS[which], np.float32(value))}
        found[value] = align_affine(
            scans["fixed"], scans["moving"], FIXED_AFFINE, MOVING_AFFINE, config=CONFIG, **masks
        )
    np.testing.assert_array_equal(found[1.0], found[np.nan])
    assert mean_error_mm(found[1.0], AFFINE) < 1


def test_a_slab_is_found_in_the_whole():
    """Less than half of the moving scan counts, so most fixed points have no counterpart."""
    slab = np.zeros(MOVING_SHAPE, bool)
    slab[7:18] = True
    assert mean_error_mm(aligned(moving_scan(), fixed_mask=EVERYWHERE, moving_mask=slab), AFFINE) < 1


def test_mutual_information_aligns_other_contrasts():
    moving = 1 - moving_scan() ** 0.6
    found = aligned(moving, NMI)
    # A fifth of a voxel of the level: with so much empty background, the best NMI is not at the truth.
    assert mean_error_mm(found, AFFINE) < 1.4
    assert mean_error_mm(aligned(moving), AFFINE) > 5


def test_vmap_under_jit_equals_the_loop():
    pairs = np.stack([FIXED, FIXED]), np.stack([moving_scan(), moving_scan("rigid")])
    together = jax.jit(jax.vmap(lambda f, m: align_affine(f, m, FIXED_AFFINE, MOVING_AFFINE, config=CONFIG)))
    for found, moving in zip(together(*pairs), pairs[1], strict=True):
        alone = np.asarray(aligned(moving), float)
        # 60 steps of Adam amplify the rounding of other orders of summation.
        assert mean_error_mm(found, alone) < 0.05


def test_rigid_stays_rigid_where_the_scan_is_scaled():
    linear = np.asarray(aligned(moving_scan(), settings(kind="rigid")), float)[:3, :3]
    np.testing.assert_allclose(linear.T @ linear, np.eye(3), atol=2e-6)
    assert np.linalg.det(linear) > 0
    assert np.abs(linear - np.eye(3)).max() > 0.1


@pytest.mark.parametrize(
    ("which", "similarity"), [("fixed", "ncc"), ("moving", "ncc"), ("mask", "ncc"), ("moving", "nmi")]
)
def test_scans_without_content_stay_where_the_headers_put_them(which, similarity):
    fixed = np.full_like(FIXED, 0.7) if which == "fixed" else FIXED
    moving = np.full_like(moving_scan(), 0.3) if which == "moving" else moving_scan()
    masks: dict[str, Any] = {}
    if which == "mask":
        masks = {"fixed_mask": ~EVERYWHERE, "moving_mask": np.ones(MOVING_SHAPE, bool)}
    config = {"ncc": CONFIG, "nmi": NMI}[similarity]
    found = align_affine(fixed, moving, FIXED_AFFINE, MOVING_AFFINE, config=config, **masks)
    np.testing.assert_allclose(found, np.eye(4), atol=1e-5)


def test_scans_that_lie_apart_and_have_no_content_meet_at_their_centres():
    far_mm = (500, 0, 0)
    apart = grid(FIXED_AFFINE[:3, :3], FIXED_SHAPE, far_mm)
    constant = np.full_like(FIXED, 0.7)
    found = align_affine(constant, constant, FIXED_AFFINE, apart, config=CONFIG)
    np.testing.assert_allclose(found, world_map(shift_mm=far_mm), atol=1e-4)


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"min_overlap is 0\.0"):
        aligned(moving_scan(), settings(min_overlap=0.0))


@pytest.mark.usefixtures("unchecked_types")
def test_shapes_and_affines_are_checked():
    align = functools.partial(align_affine, config=CONFIG)
    with pytest.raises(ValueError, match=r"scans must be \[x, y, z\]"):
        align(FIXED[None], FIXED, FIXED_AFFINE, FIXED_AFFINE)
    with pytest.raises(ValueError, match="not empty"):
        align(FIXED, FIXED[:0], FIXED_AFFINE, FIXED_AFFINE)
    for affine in (np.eye(3), np.diag([1.0, 0, 1, 1]), np.diag([1.0, np.nan, 1, 1])):
        with pytest.raises(ValueError, match="moving_affine must be"):
            align(FIXED, FIXED, FIXED_AFFINE, affine)
    with pytest.raises(ValueError, match="fixed_mask"):
        align(FIXED, FIXED, FIXED_AFFINE, FIXED_AFFINE, fixed_mask=FIXED[1:])
    with pytest.raises(ValueError, match="not traced"):
        jax.jit(align)(FIXED, FIXED, FIXED_AFFINE, FIXED_AFFINE)


def test_the_headers_alignment_is_kept_where_nothing_is_more_similar():
    """Scans of one thing, whose centres of mass and of geometry are misleading."""
    half = FIXED_SHAPE[0] // 2
    left = FIXED[:half], FIXED_AFFINE
    found = align_affine(left[0], FIXED, left[1], FIXED_AFFINE, config=settings(steps=(0,)))
    np.testing.assert_allclose(found, np.eye(4), atol=1e-5)


def test_shrinking_does_not_count_as_overlap():
    """Every fixed point may fall into the moving scan, which then meets little of it."""
    noise = np.random.default_rng(0).random(MOVING_SHAPE).astype(np.float32)
    for similarity in ("ncc", "nmi"):
        found = np.asarray(aligned(noise, settings(similarity=similarity, voxels=(8, 16), steps=(20, 60))))
        stretches = np.linalg.svd(found[:3, :3], compute_uv=False)
        assert stretches.min() > 0.6 and stretches.max() < 1.65


def test_the_stretch_is_bounded_where_the_truth_lies_beyond():
    true = world_map(scales=(1.4, 1.0, 1.0))
    moving = scan(MOVING_AFFINE, MOVING_SHAPE, true)
    free, bounded = (
        np.linalg.svd(np.asarray(aligned(moving, settings(max_stretch=limit)))[:3, :3], compute_uv=False)
        for limit in (1.5, 1.1)
    )
    assert 1.3 < free.max() < 1.5
    assert 1.05 < bounded.max() < 1.15


def test_a_similarity_has_one_scale():
    linear = np.asarray(aligned(moving_scan(), settings(kind="similarity")), float)[:3, :3]
    scale = np.cbrt(np.linalg.det(linear))
    np.testing.assert_allclose(linear.T @ linear, scale**2 * np.eye(3), atol=5e-6)
    assert abs(scale - 1) > 0.005


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_the_unit_of_length_does_not_matter(factor):
    scaled = np.diag([factor, factor, factor, 1])
    found = align_affine(FIXED, moving_scan(), scaled @ FIXED_AFFINE, scaled @ MOVING_AFFINE, config=CONFIG)
    again = np.linalg.inv(scaled) @ np.asarray(found, float) @ scaled
    # 60 steps of Adam amplify the rounding.
    assert mean_error_mm(again, np.asarray(aligned(moving_scan()), float)) < 0.1
