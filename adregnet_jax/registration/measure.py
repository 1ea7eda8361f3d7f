"""All that is measured on a registered pair, before and after: landmarks, labels, similarity, deformation.

`adregnet register` measures two scans with grids of their own in the world (`measure_scans`), `eval.py` pairs
on one grid (`measure_pair`, `label_scores`). Every quantity is defined once, in `adregnet_jax.metrics` or
here; the two differ in how they bring images, labels and points to the fixed grid.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from jaxtyping import Float, Integer, Shaped
from scipy import ndimage

from adregnet_jax import metrics
from adregnet_jax.data.io.images import Image
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.preprocessing import counted_voxels, percentile_window, rescale_window
from adregnet_jax.errors import UserError
from adregnet_jax.ops.sampling import warp, warp_labels
from adregnet_jax.registration import ladder
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.registration.options import Modality
from adregnet_jax.report import tables

STAGES = ("affine", "network")  # of a registration, after which the similarity is measured
PERCENTILES = (0.5, 99.5)  # of the intensities, between which two scans are compared

_warp_nearest = jax.jit(functools.partial(warp, mode="nearest"))
_warp_labels = jax.jit(warp_labels)


class ScanPair(NamedTuple):
    """Two scans with grids of their own, their masks, and the labels and landmarks they are scored by."""

    fixed: Image
    moving: Image
    fixed_mask: Image | None = None
    moving_mask: Image | None = None
    fixed_labels: Image | None = None
    moving_labels: Image | None = None
    fixed_landmarks: Float[np.ndarray, "n 3"] | None = None  # RAS mm
    moving_landmarks: Float[np.ndarray, "n 3"] | None = None  # RAS mm


class Measurement(NamedTuple):
    """The numbers of two registered scans, and the images on the fixed grid that they were computed from."""

    row: tables.Row
    fixed: Float[np.ndarray, "x y z"]  # in [0, 1]
    moving: Float[np.ndarray, "x y z"]  # in [0, 1], where its header puts it
    warped: Float[np.ndarray, "x y z"]  # in [0, 1]
    displacement: Float[np.ndarray, "x y z 3"]  # voxels
    jacobian: Float[np.ndarray, "x y z"]
    warped_labels: Integer[np.ndarray, "x y z"] | None
    moving_labels: Integer[np.ndarray, "x y z"] | None = None  # where the header puts them
    mapped_landmarks: Float[np.ndarray, "n 3"] | None = None  # the fixed ones in the moving scan, RAS mm
    fixed_window: tuple[float, float] = (0.0, 1.0)  # the intensities that became 0 and 1
    moving_window: tuple[float, float] = (0.0, 1.0)


def measure_pair(
    pair: Pair, displacement: Float[np.ndarray, "x y z 3"], warped: Float[np.ndarray, "x y z"]
) -> tables.Row:
    """Everything measured on a registered pair on one grid except Dice; None where it can't be measured.

    TRE is `|p + u(p) - q|` of fixed landmarks p and moving landmarks q, in mm: mean and sample SD over the
    landmarks; snapped: with the mapped point rounded to a voxel of the native scan first. NCC, MSE, global
    SSIM and the Jacobian leave out padding.

    Args:
        pair: the scans with their landmarks.
        displacement: [x, y, z, 3] in voxels.
        warped: [x, y, z], the moving scan pulled back by it.
    """
    row: tables.Row = {"name": pair.name}
    before_mm, after_mm = landmark_errors_mm(pair, displacement)
    row |= landmark_row(before_mm, after_mm) | {"tre_snapped_mm": None}
    if pair.fixed_landmarks is not None and pair.moving_landmarks is not None:
        native_spacing_mm = pair.spacing_mm if pair.native_spacing_mm is None else pair.native_spacing_mm
        snapped_mm = metrics.tre_snapped_mm(
            displacement,
            pair.fixed_landmarks,
            pair.moving_landmarks,
            to_native=pair.to_native,
            native_spacing_mm=native_spacing_mm,
        )
        row["tre_snapped_mm"], _ = tables.mean_and_sd(snapped_mm)
    for name, similarity in (("ncc", metrics.ncc), ("mse", metrics.mse), ("ssim", metrics.ssim)):
        row[f"{name}_before"] = tables.finite(similarity(pair.fixed, pair.moving, mask=pair.mask))
        row[name] = tables.finite(similarity(pair.fixed, warped, mask=pair.mask))
    jacobian = metrics.jacobian_statistics(displacement, mask=pair.mask)
    row |= {
        "jacobian_mean": tables.finite(jacobian["mean"]),
        "jacobian_sd": tables.finite(jacobian["sd"]),
        "jacobian_min": tables.finite(jacobian["minimum"]),
        "folded_percent": tables.finite(jacobian["folded_percent"]),
        "folded_volume_percent": tables.finite(metrics.folded_volume_percent(displacement, mask=pair.mask)),
        "sd_log_jacobian": None,
    }
    with contextlib.suppress(ValueError):  # too few voxels
        row["sd_log_jacobian"] = tables.finite(metrics.sd_log_jacobian(displacement, mask=pair.mask))
    return row


def landmark_errors_mm(
    pair: Pair, displacement: Float[np.ndarray, "x y z 3"]
) -> tuple[Float[np.ndarray, " n"] | None, Float[np.ndarray, " n"] | None]:
    """Distances of a pair's landmarks in mm, before and after; None without landmarks."""
    if pair.fixed_landmarks is None or pair.moving_landmarks is None:
        return None, None
    points = (pair.fixed_landmarks, pair.moving_landmarks)
    before_mm = metrics.distances_mm(*points, spacing_mm=pair.spacing_mm)
    return before_mm, metrics.tre_mm(displacement, *points, pair.spacing_mm)


def landmark_row(
    before_mm: Float[np.ndarray, " n"] | None, after_mm: Float[np.ndarray, " n"] | None
) -> tables.Row:
    """Number of landmarks, and mean and sample SD of their distances; None without landmarks."""
    row: tables.Row = {"landmarks": None if after_mm is None else len(after_mm)}
    for name, errors_mm in (("tre_before", before_mm), ("tre", after_mm)):
        mean, sd = tables.mean_and_sd([] if errors_mm is None else errors_mm)
        row |= {f"{name}_mm": mean, f"{name}_sd_mm": sd}
    return row


def warp_nearest(
    labels: Integer[np.ndarray, "x y z"], displacement: Float[np.ndarray, "x y z 3"]
) -> Integer[np.ndarray, "x y z"]:
    """Labels on one grid pulled back by a displacement in voxels, by nearest neighbour."""
    volume, field = jnp.asarray(labels)[None, ..., None], jnp.asarray(displacement)[None]
    return np.asarray(_warp_nearest(volume, field))[0, ..., 0]


def label_scores(pair: Pair, displacement: Float[np.ndarray, "x y z 3"]) -> dict[str, dict[int, float]]:
    """Dice of every label in either scan of a pair, without the background; empty without labels.

    Returns:
        `dice_before`; `dice`, the moving labels warped by nearest neighbour; `dice_onehot`, warped as one
        trilinear image a label, of which the largest wins.
    """
    fixed, moving = pair.fixed_labels, pair.moving_labels
    if fixed is None or moving is None:
        return {"dice_before": {}, "dice": {}, "dice_onehot": {}}
    volume, field = jnp.asarray(moving)[None, ..., None], jnp.asarray(displacement)[None]
    classes = np.array([0, *metrics.foreground_labels(fixed, moving)])
    warped = {
        "dice_before": moving,
        "dice": warp_nearest(moving, displacement),
        "dice_onehot": np.asarray(_warp_labels(volume, field, classes))[0, ..., 0],
    }
    return metrics.dice_by_label(fixed, moving, warped)


def mean_dice(
    scores: Mapping[str, Mapping[int, float]], *, labels: Sequence[int] | None = None
) -> tables.Row:
    """Means of Dice by label, over these labels or over all; None without any."""
    return {
        name: tables.mean_and_sd(
            by_label.values() if labels is None else (by_label.get(label) for label in labels)
        )[0]
        for name, by_label in scores.items()
    }


def measure_scans(
    scans: ScanPair,
    field: DisplacementField,
    warped: Image,
    *,
    modality: Modality,
    stages: Iterable[tuple[str, DisplacementField]] = (),
) -> Measurement:
    """Everything measured on two registered scans, before and after, and their similarity in between.

    Args:
        scans: the scans, where their headers put them, and what they are scored by.
        field: on the fixed grid, from the fixed to the moving world.
        warped: the moving scan pulled back by it.
        modality: "mono" compares the scans by NCC, "multi" by mutual information.
        stages: names out of `STAGES` and the fields after them, as `field`.

    Raises:
        UserError: a field that is not finite.
    """
    if not np.isfinite(field.displacement).all():
        raise UserError("the field is not finite: the network diverged, or a setting is too large")
    displacement = np.asarray(field.displacement)
    field = DisplacementField(displacement, np.asarray(field.affine))
    identity = ladder.zero_field(field.shape, field.affine)
    fixed_window = _window(scans.fixed, scans.fixed_mask)
    fixed = rescale_window(scans.fixed.values, *fixed_window)
    low, high = _window(scans.moving, scans.moving_mask)
    window = functools.partial(rescale_window, low=low, high=high)
    moving, after = window(_on_fixed_grid(scans.moving, identity)), window(warped.values)

    def similarity(image: np.ndarray, by: DisplacementField) -> float | None:
        return _similarity(fixed, image, mask=_overlap(scans, by), modality=modality)

    between: tables.Row = {f"similarity_{stage}": None for stage in STAGES}
    for stage, by in stages:
        between[f"similarity_{stage}"] = similarity(window(_on_fixed_grid(scans.moving, by)), by)
    # The metrics are compiled once for all scans on the same rungs of the ladder.
    continued = ladder.pad(displacement, outside="linear")
    inside = ladder.pad(np.ones(displacement.shape[:3], bool), outside="zeros")
    determinant = metrics.jacobian(continued)
    jacobian = metrics.determinant_statistics(determinant, mask=inside)
    row: tables.Row = {
        "similarity_measure": "NCC" if modality == "mono" else "mutual information",
        "similarity_before": similarity(moving, identity),
        **between,
        "similarity": similarity(after, field),
        "folded_percent": jacobian["folded_percent"],
        "folded_volume_percent": metrics.folded_volume_percent(continued, mask=inside),
        "jacobian_min": jacobian["minimum"],
        "jacobian_max": jacobian["maximum"],
    }
    dice, moving_labels, warped_labels = _label_row(scans, identity, field)
    mapped = _mapped_landmarks(scans, field)
    row |= dice | _world_landmark_row(scans, mapped)
    return Measurement(
        row,
        fixed=fixed,
        moving=moving,
        warped=after,
        displacement=displacement,
        jacobian=ladder.crop(determinant, displacement.shape[:3]),
        warped_labels=warped_labels,
        moving_labels=moving_labels,
        mapped_landmarks=mapped,
        fixed_window=(float(fixed_window[0]), float(fixed_window[1])),
        moving_window=(float(low), float(high)),
    )


def _on_fixed_grid(image: Image, field: DisplacementField) -> Shaped[np.ndarray, "x y z"]:
    """The image pulled back, with its least value where it doesn't reach."""
    least = image.values.min()
    return ladder.warp_image(field, image.values - least, image.affine) + least


def _window(scan: Image, mask: Image | None) -> tuple[float, float]:
    """The intensities that are shown as black and white."""
    if np.ptp(scan.values) == 0:
        return float(scan.values.min()), float(scan.values.min()) + 1
    counted = counted_voxels(scan.values, None if mask is None else mask.values)
    return percentile_window(scan.values, scan.name, *PERCENTILES, counted=counted)


def _overlap(scans: ScanPair, field: DisplacementField) -> Shaped[np.ndarray, "x y z"]:
    """The voxels of the fixed scan, in its mask, that the field maps into the moving scan."""
    everywhere = Image(np.ones(scans.moving.shape, np.float32), scans.moving.affine)
    overlap = ladder.warp_image(field, everywhere.values, everywhere.affine, mode="nearest") > 0
    return overlap if scans.fixed_mask is None else overlap & (scans.fixed_mask.values > 0)


def _similarity(
    fixed: np.ndarray, other: np.ndarray, *, mask: np.ndarray, modality: Modality
) -> float | None:
    """NCC, or mutual information across modalities; None where the scans don't overlap."""
    if not mask.any():
        return None
    similarity = metrics.ncc if modality == "mono" else metrics.mutual_information
    on_rungs = (ladder.pad(values) for values in (fixed, other))
    return tables.finite(similarity(*on_rungs, mask=ladder.pad(mask, outside="zeros")))


def _label_row(
    scans: ScanPair, identity: DisplacementField, field: DisplacementField
) -> tuple[tables.Row, np.ndarray | None, np.ndarray | None]:
    """Dice before and after, each label's Dice, and the moving labels before and after on the fixed grid."""
    fixed, moving = scans.fixed_labels, scans.moving_labels
    if fixed is None or moving is None:
        return {"dice_before": None, "dice": None, "dice_by_label": None}, None, None
    # Ranks, because labels may exceed what int32 holds; 0 is outside of the scan.
    present, ranks = np.unique(moving.values, return_inverse=True)
    numbers = ranks.reshape(moving.shape).astype(np.int32) + 1
    labels = np.concatenate([np.zeros(1, present.dtype), present])
    classes = np.arange(1, len(labels))

    def warped(by: DisplacementField) -> np.ndarray:
        return labels[ladder.warp_image(by, numbers, moving.affine, mode="label", classes=classes)]

    after = warped(field)
    # On one grid there is nothing to warp, which saves a minute with many labels.
    on_one_grid = fixed.shape == moving.shape and np.allclose(fixed.affine, moving.affine, atol=1e-3)
    before = moving.values if on_one_grid else warped(identity)
    scores = metrics.dice_by_label(fixed.values, moving.values, {"dice_before": before, "dice": after})
    row = mean_dice(scores)
    row["dice_by_label"] = [
        {"label": label} | {name: tables.finite(by_label[label]) for name, by_label in scores.items()}
        for label in scores["dice"]
    ]
    return row, before, after


def _mapped_landmarks(scans: ScanPair, field: DisplacementField) -> np.ndarray | None:
    """Where the field leads the fixed landmarks, RAS mm."""
    fixed = scans.fixed_landmarks
    if fixed is None:
        return None
    # As `field.warp_points`, without compiling for the number of landmarks.
    voxels = nib.affines.apply_affine(np.linalg.inv(field.affine), fixed)
    displacement = [
        ndimage.map_coordinates(field.displacement[..., axis], voxels.T, order=1, mode="nearest")
        for axis in range(3)
    ]
    return fixed + np.stack(displacement, axis=-1) @ np.asarray(field.affine)[:3, :3].T


def _world_landmark_row(scans: ScanPair, mapped: np.ndarray | None) -> tables.Row:
    fixed, moving = scans.fixed_landmarks, scans.moving_landmarks
    if fixed is None or moving is None or mapped is None:
        return landmark_row(None, None)
    return landmark_row(metrics.distances_mm(fixed, moving), metrics.distances_mm(mapped, moving))
