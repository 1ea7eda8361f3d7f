"""The verdict on two scans and a field between them, made by this package or another."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

from adregnet_jax.data.io.images import Image
from adregnet_jax.data.preprocessing import rescale_percentiles
from adregnet_jax.errors import UserError
from adregnet_jax.registration import ladder
from adregnet_jax.registration.assessment import verdict
from adregnet_jax.registration.assessment.evidence import (
    FEWEST_VOXELS,
    VOXELS,
    Evidence,
    gather_evidence,
    mean_error_mm,
    predict_error_mm,
)
from adregnet_jax.registration.assessment.verdict import Assessment
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.measure import Measurement, ScanPair, measure_scans
from adregnet_jax.registration.modality import FOREGROUND, otsu_threshold, same_contrast
from adregnet_jax.registration.options import Modality

Effort = Literal["fast", "full"]
FULL_VOXELS = 128  # of the coarse grid, in place of `VOXELS`
GRID_TOLERANCE_MM = 0.01


def assess(
    fixed: Image,
    moving: Image,
    field: DisplacementField,
    *,
    modality: Modality = "auto",
    fixed_mask: Image | None = None,
    moving_mask: Image | None = None,
    effort: Effort = "fast",
) -> Assessment:
    """Judges a registration by its scans and its field alone: made by this package or any other.

    Evidence: whether blocks of the fixed scan fit the warped one best where they are; their correlation; the
    overlap of the foregrounds; how much of the fixed scan the moving one shows; folds and changes of volume;
    the linear part of the field. Neither shrinking nor folding improves it. The rule was fitted on synthetic
    pairs.

    Args:
      fixed: the scan on whose grid the field lies.
      moving: the scan that it leads to, on any grid.
      field: from the fixed to the moving world, the affine step included.
      modality: "mono": intensities of one kind; "multi": of different contrast; "auto": as the scans say once
        they are aligned.
      fixed_mask: on the grid of the fixed scan, 0 where it doesn't count.
      moving_mask: on the grid of the moving scan, likewise.
      effort: "full" looks at a finer grid, of 128 voxels along each axis in place of 80.

    Returns:
      Verdict, score, reasons, and a predicted error for each voxel.

    Raises:
      UserError: a field on another grid, one that doesn't lead into the moving scan, a scan of one value
        everywhere, a mask on another grid.

    Examples:
      >>> scan = Image(np.random.default_rng(0).random((16, 16, 16)), np.eye(4))
      >>> still = DisplacementField(np.zeros((16, 16, 16, 3), np.float32), np.eye(4))
      >>> assess(scan, scan, still).verdict
      'pass'
    """
    same = np.allclose(field.affine, fixed.affine, atol=GRID_TOLERANCE_MM * np.max(fixed.spacing_mm))
    if field.shape != fixed.shape or not same:
        raise UserError(
            f"the field has {field.shape} voxels, the fixed scan {fixed.name} {fixed.shape}"
            f"{'' if same else ', and their affines differ'}: expected a field on the grid of the fixed scan"
        )
    for scan in (fixed, moving):
        if np.ptp(scan.values) == 0:
            raise UserError(f"{scan.name}: every voxel has the same value: there is nothing to judge by")
    for mask, scan in ((fixed_mask, fixed), (moving_mask, moving)):
        if mask is not None and mask.shape != scan.shape:
            raise UserError(
                f"{mask.name}: the mask is {mask.shape} voxels, its scan {scan.name} {scan.shape}: "
                "expected one grid"
            )
    values = moving.values.astype(np.float32)
    low = values.min()
    field = DisplacementField(np.asarray(field.displacement, np.float32), np.asarray(field.affine))
    reached = ladder.warp_image(field, np.ones(moving.shape, np.float32), moving.affine, mode="nearest")
    if not reached.any():
        raise UserError(
            f"the field doesn't lead into {moving.name} anywhere: does it belong to another scan, or are the "
            "headers wrong?"
        )
    warped = Image(ladder.warp_image(field, values - low, moving.affine) + low, fixed.affine, moving.name)
    scans = ScanPair(fixed, moving, fixed_mask, moving_mask)
    measurement = measure_scans(scans, field, warped, modality="mono" if modality == "auto" else modality)
    return assess_measured(scans, field, measurement, modality=modality, effort=effort)


def assess_measured(
    scans: ScanPair,
    field: DisplacementField,
    measurement: Measurement,
    *,
    modality: Modality,
    effort: Effort = "fast",
) -> Assessment:
    """`assess` of scans that have been measured already."""
    if any(np.ptp(scan.values) == 0 for scan in (scans.fixed, scans.moving)):
        return verdict.too_little(0, FEWEST_VOXELS)
    evidence = gather(scans, field, measurement, modality=modality, effort=effort)
    if "held_fine" not in evidence.numbers:
        return verdict.too_little(int(evidence.numbers["textured_voxels"]), FEWEST_VOXELS)
    error_mm = predict_error_mm(evidence, scans.fixed.shape)
    evidence.numbers["predicted_error_mm"] = mean_error_mm(evidence)
    return verdict.judge(evidence.numbers, error_mm=error_mm)


def gather(
    scans: ScanPair,
    field: DisplacementField,
    measurement: Measurement,
    *,
    modality: Modality,
    effort: Effort = "fast",
) -> Evidence:
    """The evidence on two measured scans, computed on the rungs of their size."""
    fixed, moving = scans.fixed, scans.moving
    identity = ladder.zero_field(fixed.shape, fixed.affine)
    inside = _counts(fixed, scans.fixed_mask)
    mask = _counts(moving, scans.moving_mask)
    seen_before, seen = (
        (ladder.warp_image(by, mask, moving.affine) > 0.5).astype(np.float32) for by in (identity, field)
    )
    signed = modality == "mono"
    if modality == "auto":
        signed = same_contrast(
            measurement.fixed, measurement.warped, spacing_mm=fixed.spacing_mm.tolist(), mask=inside * seen
        )
    evidence = gather_evidence(
        ladder.pad(measurement.fixed),
        ladder.pad(measurement.moving),
        ladder.pad(measurement.warped),
        ladder.pad(measurement.displacement),
        ladder.pad(measurement.jacobian),
        spacing_mm=fixed.spacing_mm.tolist(),
        inside=ladder.pad(inside, outside="zeros"),
        seen_before=ladder.pad(seen_before, outside="zeros"),
        seen=ladder.pad(seen, outside="zeros"),
        threshold=FOREGROUND * otsu_threshold(rescale_percentiles(moving.values, moving.name)),
        signed=signed,
        voxels=FULL_VOXELS if effort == "full" else VOXELS,
    )
    # A wrong field can make two scans of one contrast look like two contrasts: that has to be known.
    evidence.numbers["across_contrasts"] = float(modality == "multi")
    return evidence


def _counts(scan: Image, mask: Image | None) -> Float[np.ndarray, "x y z"]:
    """[x, y, z], 1 where a scan counts."""
    if mask is None:
        return np.ones(scan.shape, np.float32)
    return (mask.values > 0).astype(np.float32)
