"""Results of a registration as DICOM objects."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np

from adregnet_jax.data.dicom import headers
from adregnet_jax.data.dicom.registration import deformable_registration, spatial_registration
from adregnet_jax.data.dicom.series import (
    Series,
    check_can_be_derived,
    derived_series,
    reached_slices,
    read_series,
)
from adregnet_jax.provenance import __version__
from adregnet_jax.registration.ladder import after_field
from adregnet_jax.registration.options import ScanFiles
from adregnet_jax.registration.results import RegisteredScans


@dataclasses.dataclass(frozen=True)
class DicomPair:
    """The two series of a registration, and whether what is written about them is anonymous."""

    fixed: Series
    moving: Series
    anonymize: bool = False


def read_dicom_pair(files: ScanFiles, *, anonymize: bool) -> DicomPair:
    """Reads the headers of two series.

    Raises:
      UserError: not two folders with one series each, or a series that can't be derived from.
    """
    fixed = read_series(files.fixed, series=files.fixed_series)
    pair = DicomPair(fixed, read_series(files.moving, series=files.moving_series), anonymize)
    check_can_be_derived(pair.moving)
    warn_of_two_patients(pair.fixed, pair.moving)
    return pair


def warn_of_two_patients(fixed: Series, moving: Series) -> None:
    """Warns where two series belong to different patients, without naming them."""
    if fixed.slices[0].get("PatientID") != moving.slices[0].get("PatientID"):
        warnings.warn(
            f"{fixed.name} and {moving.name} have different patient IDs: images derived from {moving.name} "
            "keep its patient and study",
            stacklevel=2,
        )


def write_dicom(folder: Path, registered: RegisteredScans, pair: DicomPair) -> None:
    """Writes the warped series and the registration objects into a new folder.

    Args:
      folder: made here: `warped/`, `registration.dcm`, `inverse.dcm`, and `affine.dcm` unless the affine step
        is the identity.
      registered: the registered scans.
      pair: their series.

    Raises:
      UserError: an image whose grid isn't that of its series.
    """
    fixed, moving = pair.fixed, pair.moving
    fixed.check_grid(registered.scans.fixed)
    moving.check_grid(registered.scans.moving)
    (folder / "warped").mkdir(parents=True)
    displacement = np.asarray(registered.field.displacement)
    slices = derived_series(
        registered.warped.values,
        reached_slices(displacement, fixed.affine, moving),
        fixed=fixed,
        moving=moving,
        description=f"Resampled to another series by deformable registration, linear; adregnet {__version__}",
    )
    for number, made in enumerate(slices, 1):
        headers.write_object(folder / "warped" / f"{number:04d}.dcm", made, anonymize=pair.anonymize)
    matrix = np.asarray(registered.matrix, np.float64)
    before_matrix = registered.field
    if moved := not np.allclose(matrix, np.eye(4)):
        before_matrix = after_field(registered.field, np.linalg.inv(matrix))
    objects = {
        "registration.dcm": deformable_registration(
            np.asarray(before_matrix.displacement),
            fixed.affine,
            matrix=matrix if moved else np.eye(4),
            fixed=fixed,
            moving=moving,
        ),
        "inverse.dcm": deformable_registration(
            np.asarray(registered.inverse.displacement),
            moving.affine,
            matrix=np.eye(4),
            fixed=moving,
            moving=fixed,
        ),
    }
    if moved:
        objects["affine.dcm"] = spatial_registration(matrix, fixed=fixed, moving=moving)
    for name, made in objects.items():
        headers.write_object(folder / name, made, anonymize=pair.anonymize)
