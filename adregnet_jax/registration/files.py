"""Registration of two scans from files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from adregnet_jax.data.io.images import Image, read_image
from adregnet_jax.data.io.nifti import Prefer, corners_apart_mm
from adregnet_jax.data.io.points import read_points
from adregnet_jax.errors import UserError
from adregnet_jax.registration.assessment.assess import assess_measured
from adregnet_jax.registration.dicom import read_dicom_landmarks, read_structure_labels
from adregnet_jax.registration.measure import ScanPair
from adregnet_jax.registration.options import RegistrationOptions, ScanFiles
from adregnet_jax.registration.results import RegisteredScans
from adregnet_jax.registration.scans import register_scans
from adregnet_jax.weights.packed import load_pretrained
from adregnet_jax.weights.trained_network import TrainedNetwork

GRID_TOLERANCE = 0.01  # voxels: affines are stored as float32
STAGES = ("reading", "affine", "deformable", "inverse", "scoring", "assessing")


def register_files(
    fixed: str | Path,
    moving: str | Path,
    *,
    options: RegistrationOptions = RegistrationOptions(),  # noqa: B008 -- frozen
    fixed_mask: str | Path | None = None,
    moving_mask: str | Path | None = None,
    fixed_labels: str | Path | None = None,
    moving_labels: str | Path | None = None,
    fixed_landmarks: str | Path | None = None,
    moving_landmarks: str | Path | None = None,
    fixed_series: str | None = None,
    moving_series: str | None = None,
    network: TrainedNetwork | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> RegisteredScans:
    """Reads two scans, registers and measures them. The scans may differ in grid, spacing and orientation.

    Labels and landmarks score the result and take no part in the registration.

    Args:
      fixed: the scan whose grid the result has: NIfTI, MetaImage, NRRD or a DICOM folder.
      moving: the scan that is warped.
      options: how they are registered.
      fixed_mask: image on the grid of the fixed scan, 0 where the scan doesn't count.
      moving_mask: image on the grid of the moving scan, likewise.
      fixed_labels: label map on the grid of the fixed scan, for Dice; with `moving_labels`. For two DICOM
        series also their structure sets, whose structures are matched by name.
      moving_labels: label map of the moving scan, on any grid.
      fixed_landmarks: points in RAS mm (.csv, .fcsv or .mrk.json), for the target registration error; with
        `moving_landmarks`. For two DICOM series also Spatial Fiducials or structure sets, whose points are
        matched by name.
      moving_landmarks: the same anatomical points, in the same order.
      fixed_series: UID of the fixed series, in a DICOM folder that holds several.
      moving_series: likewise.
      network: a trained network; None: the packed weights of `options.weights`, where the method uses one.
      on_stage: called with the name of each of `STAGES` when it begins.

    Returns:
      The registered scans with their measurements: `.write(folder)` writes what `adregnet register` writes.

    Raises:
      UserError: files that can't be used, labels on another grid than their fixed scan, landmarks that aren't
        pairs or lie outside of their scan, scans or options that `register_scans` refuses.

    Examples:
      >>> found = register_files("fixed.nii.gz", "moving.nii.gz", options=RegistrationOptions(effort="fast"))
      >>> found.write("out")
    """
    files = ScanFiles(
        Path(fixed),
        Path(moving),
        fixed_mask=_path(fixed_mask),
        moving_mask=_path(moving_mask),
        fixed_labels=_path(fixed_labels),
        moving_labels=_path(moving_labels),
        fixed_landmarks=_path(fixed_landmarks),
        moving_landmarks=_path(moving_landmarks),
        fixed_series=fixed_series,
        moving_series=moving_series,
    )
    if options.method == "network" and not options.affine and (files.fixed_mask or files.moving_mask):
        raise UserError(
            'masks have no effect with method="network" and affine=False: drop them, or use method="both"'
        )
    if network is None and options.by_network:
        network = load_pretrained(options.weights)
    say = on_stage or (lambda stage: None)

    say("reading")
    began = time.perf_counter()
    scans, names = _read_scans(files, prefer=options.prefer)
    seconds = {"reading": time.perf_counter() - began}
    registered = register_scans(
        scans.fixed,
        scans.moving,
        affine=options.affine_config,
        instance=options.instance_config,
        network=network if options.by_network else None,
        tile=options.tile,
        modality=options.modality,
        adaptive=options.adaptive,
        fixed_mask=scans.fixed_mask,
        moving_mask=scans.moving_mask,
        apart=options.apart,
        keep=options.keep,
        on_stage=on_stage,
    )
    record = {
        "sources": files.record(),
        "options": options.record(),
        "network": network.name if network and options.by_network else None,
        **({"label_names": names} if names else {}),
    }
    seconds |= registered.seconds
    registered = dataclasses.replace(registered, scans=scans, seconds=seconds, record=record)

    say("scoring")
    began = time.perf_counter()
    registered = dataclasses.replace(registered, measured=registered.measurement, stages={})
    seconds["scoring"] = time.perf_counter() - began
    if options.assess == "off":
        return registered

    say("assessing")
    began = time.perf_counter()
    assessment = assess_measured(
        scans,
        registered.field,
        registered.measurement,
        modality=registered.modality,
        effort=options.assess,
    )
    seconds["assessing"] = time.perf_counter() - began
    return dataclasses.replace(registered, assessment=assessment)


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


def read_scans(files: ScanFiles, *, prefer: Prefer | None = None) -> ScanPair:
    """Reads the files of two scans.

    Args:
      files: their paths.
      prefer: the form that places NIfTI images whose sform and qform disagree.

    Raises:
      UserError: a file that can't be used, labels on another grid than their fixed scan, landmarks that
        aren't pairs or lie outside of their scan.
    """
    return _read_scans(files, prefer=prefer)[0]


def _read_scans(files: ScanFiles, *, prefer: Prefer | None) -> tuple[ScanPair, dict[int, str]]:
    """The scans, and the names of labels that come from structure sets."""
    images: dict[str, Any] = {}
    points: dict[str, Any] = {}
    structures, names = read_structure_labels(files)
    fiducials = read_dicom_landmarks(files)
    for name, path in files.given().items():
        if "landmarks" in name:
            points[name] = fiducials[name] if name in fiducials else read_points(path)
        elif name in structures:
            images[name] = structures[name]
        else:
            images[name] = read_image(path, labels="labels" in name, prefer=prefer, series=files.series(name))
    if "fixed_labels" in images:
        _check_same_grid(images["fixed_labels"], images["fixed"])
    if points:
        fixed, moving = points["fixed_landmarks"], points["moving_landmarks"]
        if len(fixed) != len(moving):
            raise UserError(
                f"{files.fixed_landmarks} has {len(fixed)} landmarks, {files.moving_landmarks} "
                f"{len(moving)}: expected pairs, line by line"
            )
        for scan in ("fixed", "moving"):
            name = f"{scan}_landmarks"
            _check_inside(str(files.given()[name]), points[name], images[scan])
    return ScanPair(**images, **points), names


def _check_same_grid(labels: Image, scan: Image) -> None:
    if labels.shape != scan.shape:
        raise UserError(
            f"{labels.name}: labels are {labels.shape} voxels, their scan {scan.name} is {scan.shape}: "
            "expected one grid"
        )
    apart_mm = corners_apart_mm(scan.shape, labels.affine, scan.affine)
    if apart_mm > GRID_TOLERANCE * scan.spacing_mm.min():
        raise UserError(
            f"{labels.name}: the corners of the labels lie up to {apart_mm:.4g} mm from those of their scan"
            f" {scan.name}, by the headers: expected one grid"
        )


def _check_inside(name: str, points_mm: np.ndarray, scan: Image) -> None:
    voxels = nib.affines.apply_affine(np.linalg.inv(scan.affine), points_mm)
    outside = ((voxels < -0.5) | (voxels > np.array(scan.shape) - 0.5)).any(axis=1)
    if outside.any():
        raise UserError(
            f"{name}: {outside.sum()} of {len(voxels)} landmarks lie outside of {scan.name}, the first at "
            f"{points_mm[outside][0].round(2).tolist()}: expected RAS mm, not voxels or LPS"
        )
