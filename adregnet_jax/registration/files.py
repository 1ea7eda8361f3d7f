"""One pair from files to files: read, checked, registered, written."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from adregnet_jax.atomic import new_folder
from adregnet_jax.data.io.images import Image, read_image, simpleitk
from adregnet_jax.data.io.points import read_points
from adregnet_jax.errors import UserError
from adregnet_jax.registration.measure import ScanPair, measure_scans
from adregnet_jax.registration.options import Procedure
from adregnet_jax.registration.results import FILES, write_preview, write_results
from adregnet_jax.weights.trained_network import TrainedNetwork

GRID_TOLERANCE_MM = 1e-3  # affines are stored as float32
STAGES = ("reading", "affine", "deformable", "inverse", "scoring", "writing")
COUPLES = (("fixed_labels", "moving_labels"), ("fixed_landmarks", "moving_landmarks"))


@dataclasses.dataclass(frozen=True)
class Sources:
    """The files of a pair."""

    fixed: Path
    moving: Path
    fixed_mask: Path | None = None
    moving_mask: Path | None = None
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None

    def given(self) -> dict[str, Path]:
        return {name: path for name, path in vars(self).items() if path is not None}

    def check(self, told: Callable[[str], str]) -> None:
        """Refuses labels or landmarks of one scan alone; `told` makes their names those of the user."""
        for couple in COUPLES:
            absent = [name for name in couple if getattr(self, name) is None]
            if len(absent) == 1:
                one, other = map(told, couple)
                raise UserError(f"{one} and {other} belong together: give both or none")

    def record(self) -> dict[str, dict[str, str]]:
        """Path and SHA-256 of each file; of a folder, that of its files' names and sums."""
        return {name: {"path": str(path), "sha256": _sha256(path)} for name, path in self.given().items()}


def register_pair(
    sources: Sources,
    folder: Path,
    procedure: Procedure,
    *,
    network: TrainedNetwork | None,
    compute: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    preview: bool = False,
    overwrite: bool = False,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    """Registers a pair and writes the folder, whole or not at all.

    Args:
      sources: the files.
      folder: its final name.
      procedure: how.
      network: of `procedure.weights`.
      compute: calls what it is given and returns its result, for instance on a device, in a thread.
      preview: writes preview.png alone.
      overwrite: replaces a folder of an earlier registration.
      on_stage: is called with the name of each stage as it begins.

    Returns:
      What summary.json holds.

    Raises:
      UserError: whatever the user can mend.
    """
    if procedure.composite:
        simpleitk(folder / "field.h5")
    with new_folder(folder, own=FILES, overwrite=overwrite) as temporary:
        clock = _Clock()
        on_stage("reading")
        scans = read_scans(sources)
        clock.stop("reading")
        registered = compute(lambda: _registered(scans, procedure, network, on_stage))
        clock.seconds |= registered.seconds
        clock.restart()

        on_stage("scoring")
        measurement = compute(
            lambda: measure_scans(scans, registered.field, registered.warped, modality=procedure.modality)
        )
        clock.stop("scoring")
        summary = {
            "sources": sources.record(),
            "options": procedure.record(),
            "network": network.name if network else None,
            "results": measurement.row,
            "seconds": dict(clock.seconds),
        }
        on_stage("writing")
        if preview:
            write_preview(temporary, scans, measurement)
        else:

            def write() -> None:
                write_results(
                    temporary, scans, registered, measurement, summary, composite=procedure.composite
                )

            compute(write)
    return summary


def read_scans(sources: Sources) -> ScanPair:
    """Everything of a pair that has a file.

    Raises:
      UserError: a file that can't be used, labels on another grid than their fixed scan, landmarks that are
        no pairs or lie outside of their scan.
    """
    images: dict[str, Any] = {}
    points: dict[str, Any] = {}
    for name, path in sources.given().items():
        if "landmarks" in name:
            points[name] = read_points(path)
        else:
            images[name] = read_image(path, labels="labels" in name)
    if "fixed_labels" in images:
        _check_same_grid(images["fixed_labels"], images["fixed"])
    if points:
        fixed, moving = points["fixed_landmarks"], points["moving_landmarks"]
        if len(fixed) != len(moving):
            raise UserError(
                f"{sources.fixed_landmarks} has {len(fixed)} landmarks, {sources.moving_landmarks} "
                f"{len(moving)}: expected pairs, line by line"
            )
        for scan in ("fixed", "moving"):
            name = f"{scan}_landmarks"
            _check_inside(str(sources.given()[name]), points[name], images[scan])
    return ScanPair(**images, **points)


def _registered(
    scans: ScanPair, procedure: Procedure, network: TrainedNetwork | None, on_stage: Callable[[str], None]
):
    from adregnet_jax.registration.scans import register_scans

    return register_scans(
        scans.fixed,
        scans.moving,
        affine=procedure.affine,
        instance=procedure.instance,
        network=network,
        tile=procedure.tile,
        modality=procedure.modality.value,
        fixed_mask=scans.fixed_mask,
        moving_mask=scans.moving_mask,
        apart=procedure.apart,
        on_stage=on_stage,
    )


def _check_same_grid(labels: Image, scan: Image) -> None:
    same = np.allclose(labels.affine, scan.affine, atol=GRID_TOLERANCE_MM)
    if labels.shape != scan.shape or not same:
        raise UserError(
            f"{labels.name}: labels are {labels.shape} voxels, their scan {scan.name} is {scan.shape}"
            f"{'' if same else ', and the affines differ'}: expected one grid"
        )


def _check_inside(name: str, points_mm: np.ndarray, scan: Image) -> None:
    voxels = nib.affines.apply_affine(np.linalg.inv(scan.affine), points_mm)
    outside = ((voxels < -0.5) | (voxels > np.array(scan.shape) - 0.5)).any(axis=1)
    if outside.any():
        raise UserError(
            f"{name}: {outside.sum()} of {len(voxels)} landmarks lie outside of {scan.name}, the first at "
            f"{points_mm[outside][0].round(2).tolist()}: expected RAS mm, not voxels or LPS"
        )


def _sha256(path: Path) -> str:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for entry in sorted(entry for entry in path.iterdir() if entry.is_file()):
        total.update(f"{entry.name} {_sha256(entry)}\n".encode())
    return total.hexdigest()


class _Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        self._began = time.perf_counter()

    def stop(self, stage: str) -> None:
        self.seconds[stage] = time.perf_counter() - self._began
        self.restart()
