"""The ladder of sizes: its cost, arrays padded to it, and scans of another size that compile nothing."""

import dataclasses
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax import metrics
from adregnet_jax.config import AffineConfig, InstanceConfig
from adregnet_jax.data.io.images import Image
from adregnet_jax.registration import field as fields
from adregnet_jax.registration import ladder
from adregnet_jax.registration.affine import align_affine, align_affine_on_rungs
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.instance import MovingGrid, align, align_on_rungs
from adregnet_jax.registration.measure import ScanPair
from adregnet_jax.registration.scans import register_scans
from adregnet_jax.registration.warmup import count_compilations, describe_rungs
from tests.registration import test_field
from tests.registration.test_field import AFFINE, MATRIX, MOVING_AFFINE

INSTANCE = InstanceConfig(search_range_mm=8.0, factors=(2, 1), steps=(10, 5), strides=(2, 2))
LINEAR = AffineConfig(kind="rigid", voxels=(16,), steps=(10,), rotation_starts_deg=0.0)
# Sizes between the rungs.
DISPLACEMENT = test_field.DISPLACEMENT[:19, :23, :15]
MOVING = test_field.MOVING[:25, :17, :21]
SHAPE = DISPLACEMENT.shape[:3]
FIELD = DisplacementField(DISPLACEMENT, AFFINE)


def test_rungs_are_near_and_few():
    sizes = np.arange(1, 513)
    rungs = np.array([ladder.rung(n) for n in sizes.tolist()])
    assert (rungs >= sizes).all()
    assert (np.diff(rungs) >= 0).all()
    assert [ladder.rung(n) for n in rungs.tolist()] == rungs.tolist()
    assert (rungs < sizes * 9 / 8)[sizes >= 16].all()
    assert len(set(rungs[sizes > 256])) == 8
    # The mean volume of scans whose three sizes are any from 64 to 512.
    assert np.mean((rungs / sizes)[sizes >= 64]) ** 3 < 1.15
    assert describe_rungs((160, 161, 9)) == "145-160 x 161-176 x 9-10"


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("mode", ["linear", "nearest", "label"])
def test_warping_is_that_of_the_unpadded_scan(mode, padding):
    values, classes, far = MOVING, None, MATRIX.copy()
    far[:3, 3] += 6  # so that the field leaves the moving scan
    if mode == "label":
        values = np.digitize(MOVING, [-0.5, 0.0, 0.5]).astype(np.int16)
        classes = np.arange(4)
    out = jax.jit(fields.after_field)(FIELD, far)
    options: dict[str, Any] = {"mode": mode, "padding": padding, "classes": classes}
    expected = np.asarray(fields.warp_image(out, values, MOVING_AFFINE, **options))
    found = ladder.warp_image(out, values, MOVING_AFFINE, **options)
    assert found.dtype == expected.dtype
    if mode == "linear":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:  # rounding decides ties
        assert np.mean(found != expected) < 1e-3


def test_functions_on_fields_are_those_of_unpadded_fields():
    on_moving: dict[str, Any] = {"shape": MOVING.shape, "affine": MOVING_AFFINE}
    pairs = [
        (fields.after_field(FIELD, MATRIX), ladder.after_field(FIELD, MATRIX)),
        (fields.invert_field(FIELD), ladder.invert_field(FIELD)),
        (fields.reverse_field(FIELD, MATRIX, **on_moving), ladder.reverse_field(FIELD, MATRIX, **on_moving)),
        (fields.resample_field(FIELD, **on_moving), ladder.resample_field(FIELD, **on_moving)),
    ]
    for expected, found in pairs:
        np.testing.assert_allclose(found.displacement, expected.displacement, atol=1e-4)
        np.testing.assert_allclose(found.affine, expected.affine, rtol=1e-6)


def test_jacobians_of_continued_displacements_are_the_same():
    continued = ladder.pad(DISPLACEMENT, outside="linear")
    inside = ladder.pad(np.ones(SHAPE, bool), outside="zeros")
    jacobian = ladder.crop(metrics.jacobian(continued), SHAPE)
    np.testing.assert_allclose(jacobian, metrics.jacobian(DISPLACEMENT), atol=1e-5)
    folded = metrics.folded_volume_percent(continued, mask=inside)
    np.testing.assert_allclose(folded, metrics.folded_volume_percent(DISPLACEMENT), rtol=1e-5)


def scan_pair(shape, spacing_mm):
    """A textured ball and the same ball shifted by some millimetres, on a grid of four more voxels."""
    moving_shape = tuple(n + 4 for n in shape)
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(2).normal(size=moving_shape), 1.5)
    radius = np.linalg.norm(
        np.moveaxis(np.indices(moving_shape), 0, -1) - np.array(moving_shape) / 2, axis=-1
    )
    values = np.where(radius < 0.4 * min(shape), 1 + 3 * texture, 0).astype(np.float32)
    affine = np.diag([*spacing_mm, 1.0])
    fixed = Image(values[1 : 1 + shape[0], 2 : 2 + shape[1], 1 : 1 + shape[2]], affine, "fixed")
    return fixed, Image(values, affine, "moving")


SIZES: dict[str, Any] = {
    "first": ((26, 24, 22), (2.0, 2.0, 2.5)),
    "second": ((25, 23, 21), (2.05, 2.05, 2.6)),
}


def test_the_affine_step_is_that_of_unpadded_scans():
    fixed, moving = scan_pair(*SIZES["second"])
    mask = (np.arange(fixed.shape[0]) > 3)[:, None, None] & np.ones(fixed.shape, bool)
    scans = (fixed.values, moving.values, fixed.affine, moving.affine)
    masks: dict[str, Any] = {"fixed_mask": mask, "moving_mask": np.ones(moving.shape)}
    expected = align_affine(*scans, config=LINEAR, **masks)
    found = align_affine_on_rungs(*scans, config=LINEAR, **masks)
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_the_optimisation_is_nearly_that_of_unpadded_scans(masked):
    shape = (37, 33, 17)
    assert ladder.rungs(shape) == (40, 36, 18)
    fixed, _ = scan_pair(shape, (1.0, 1.0, 2.0))
    motion = np.roll(fixed.values, 1, axis=1)
    mask = np.ones(shape, np.float32) if masked else None
    options: dict[str, Any] = {"spacing_mm": (1.0, 1.0, 2.0), "config": INSTANCE}
    if masked:  # the search of `align` sees its padding as masked, too, which changes its start
        options["config"] = dataclasses.replace(INSTANCE, search_range_mm=0.0)
    found, inverse = align_on_rungs(
        fixed.values, motion, start=None, fixed_mask=mask, moving_mask=mask, **options
    )
    batch = [a if a is None else a[None, ..., None] for a in (fixed.values, motion, mask)]
    expected = jax.jit(lambda f, m, k: align(f, m, fixed_mask=k, moving_mask=k, **options))(*batch)
    assert inverse is None
    difference = np.abs(found - expected.displacement[0])
    body = fixed.values > 0
    assert np.linalg.norm(found[body], axis=-1).mean() > 0.5
    assert difference[body].mean() < 0.02  # voxels
    assert difference.mean() < 0.1


def test_a_moving_scan_on_its_own_grid_is_interpolated_once():
    """Exchanged axes and a larger grid change nothing."""
    shape, spacing_mm = (37, 33, 17), (1.0, 1.0, 2.0)
    fixed, _ = scan_pair(shape, spacing_mm)
    motion = np.roll(fixed.values, 1, axis=1)
    config = dataclasses.replace(INSTANCE, search_range_mm=0.0)

    def found(moving, matrix, moving_spacing_mm=spacing_mm, mask=None):
        to_moving = MovingGrid(matrix, moving_spacing_mm)
        options: dict[str, Any] = {"spacing_mm": spacing_mm, "start": None, "fixed_mask": None}
        return align_on_rungs(
            fixed.values, moving, moving_mask=mask, config=config, to_moving=to_moving, **options
        )[0]

    def difference(displacement):
        """Mean in the body; at the borders, where averages have other neighbours, it is larger."""
        return np.linalg.norm(displacement - expected, axis=-1)[fixed.values > 0].mean()

    expected = found(motion, np.eye(4))
    assert difference(0) > 0.5
    # Exchanged axes. Mirrored ones would take the other one-sided gradient where a sample is on a voxel.
    matrix = np.eye(4)[[2, 0, 1, 3]]
    assert difference(found(motion.transpose(2, 0, 1), matrix, (2.0, 1.0, 1.0))) < 0.01
    assert difference(found(motion, np.eye(4), mask=np.ones(shape, np.float32))) < 0.05
    moved = np.eye(4)
    moved[1, 3] = 4
    assert difference(found(np.pad(motion, [(0, 0), (4, 0), (0, 0)], mode="edge"), moved)) < 0.01


def test_mind_needs_both_scans_on_one_grid():
    fixed, _ = scan_pair(*SIZES["first"])
    with pytest.raises(ValueError, match="need both scans on one grid"):
        align_on_rungs(
            fixed.values,
            fixed.values,
            spacing_mm=(1.0, 1.0, 1.0),
            start=None,
            fixed_mask=None,
            moving_mask=None,
            config=dataclasses.replace(INSTANCE, similarity="mind"),
            to_moving=MovingGrid(np.eye(4), (1.0, 1.0, 1.0)),
        )


@pytest.mark.parametrize(("modality", "masked"), [("mono", False), ("multi", True)])
def test_a_second_size_on_the_same_rungs_compiles_nothing(modality, masked):
    def registered(size):
        fixed, moving = scan_pair(*size)
        masks = [
            dataclasses.replace(scan, values=(np.arange(scan.shape[0]) > 2)[:, None, None] + 0 * scan.values)
            for scan in (fixed, moving)
        ]
        result = register_scans(
            fixed,
            moving,
            affine=LINEAR,
            instance=INSTANCE,
            modality=modality,
            fixed_mask=masks[0] if masked else None,
            moving_mask=masks[1] if masked else None,
        )
        labels = [
            dataclasses.replace(scan, values=(scan.values > 1).astype(np.int16)) for scan in (fixed, moving)
        ]
        points = nib.affines.apply_affine(fixed.affine, np.argwhere(labels[0].values)[::50])
        scored = ScanPair(fixed, moving, None, None, labels[0], labels[1], points, points)
        return dataclasses.replace(result, scans=scored).measurement

    with count_compilations() as first:
        registered(SIZES["first"])
    with count_compilations() as second:
        measured = registered(SIZES["second"])
    assert first.programs > 0
    assert second.programs == 0
    assert measured.row["tre_mm"] is not None
    assert measured.displacement.shape == (*SIZES["second"][0], 3)
