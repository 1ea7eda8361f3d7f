"""DICOM around a registration: its results as objects; structures and fiducials that score it."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adregnet_jax.data.dicom.derived import check_can_be_derived, derived_series, reached_slices
from adregnet_jax.data.dicom.fiducials import SUFFIX, read_fiducials
from adregnet_jax.data.dicom.files import write_object
from adregnet_jax.data.dicom.registration import LPS, deformable_registration, spatial_registration
from adregnet_jax.data.dicom.series import Series, read_series
from adregnet_jax.data.dicom.structures import check_frame, is_structure_set, label_map, read_structures
from adregnet_jax.data.io.images import Image
from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__
from adregnet_jax.registration.ladder import after_field
from adregnet_jax.registration.options import ScanFiles
from adregnet_jax.registration.results import RegisteredScans

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


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
            f"{fixed.name} and {moving.name} have different patient IDs: do they belong together?",
            stacklevel=2,
        )


def read_structure_labels(files: ScanFiles) -> tuple[dict[str, Image], dict[int, str]]:
    """The labels of two scans from RT Structure Sets that were drawn on them.

    Structures with contours and the same name in both sets are numbered in alphabetical order.

    Returns:
      Label maps by the names of their files, "fixed_labels" and "moving_labels", and the names of structures
      by label; both empty where the labels are files of another kind.

    Raises:
      UserError: one structure set and one file of another kind, scans that aren't DICOM folders, another
        frame of reference, or no structure in common.
    """
    paths = {"fixed": files.fixed_labels, "moving": files.moving_labels}
    sets = {scan: path for scan, path in paths.items() if path is not None and is_structure_set(path)}
    if not sets:
        return {}, {}
    if len(sets) == 1:
        raise UserError(
            f"{next(iter(sets.values()))} is an RTSTRUCT: give one for each scan, or two label maps"
        )
    series, found = {}, {}
    for scan, path in sets.items():
        series[scan] = read_series(files.given()[scan], series=files.series(scan))
        dataset, structures = read_structures(path)
        check_frame(path, dataset, series[scan])
        found[scan] = [one for one in structures if one.contours]
    fixed, moving = ({one.name for one in structures} for structures in found.values())
    if not fixed & moving:
        raise UserError(
            f"{files.fixed_labels} and {files.moving_labels} have no structure in common: "
            f"{', '.join(sorted(fixed))}; {', '.join(sorted(moving))}"
        )
    names = sorted(fixed & moving)
    numbers = {name: label for label, name in enumerate(names, 1)}
    maps = {
        f"{scan}_labels": Image(
            label_map(found[scan], series[scan], numbers=numbers), series[scan].affine, str(sets[scan])
        )
        for scan in sets
    }
    return maps, dict(enumerate(names, 1))


def read_dicom_landmarks(files: ScanFiles) -> dict[str, np.ndarray]:
    """Landmarks from DICOM objects with marked points on two series, matched by name.

    Returns:
      [n, 3] RAS mm in the order of the names, by the names of their files, "fixed_landmarks" and
      "moving_landmarks"; empty where the landmarks are files of another kind.

    Raises:
      UserError: one DICOM object and one file of another kind, scans that aren't DICOM folders, another frame
        of reference, or no name in common.
    """
    paths = {"fixed": files.fixed_landmarks, "moving": files.moving_landmarks}
    objects = {
        scan: path for scan, path in paths.items() if path is not None and path.name.lower().endswith(SUFFIX)
    }
    if not objects:
        return {}
    if len(objects) == 1:
        (path,) = objects.values()
        raise UserError(f"{path} is a DICOM object: give one for each scan, or two lists of points")
    found = {
        scan: read_fiducials(path, read_series(files.given()[scan], series=files.series(scan)))
        for scan, path in objects.items()
    }
    fixed, moving = (set(points) for points in found.values())
    if not fixed & moving:
        raise UserError(
            f"{files.fixed_landmarks} and {files.moving_landmarks} have no marked point in common: "
            f"{', '.join(sorted(fixed)) or 'none'}; {', '.join(sorted(moving)) or 'none'}"
        )
    return {
        f"{scan}_landmarks": np.array([points[name] for name in sorted(fixed & moving)]) * LPS
        for scan, points in found.items()
    }


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
        write_object(folder / "warped" / f"{number:04d}.dcm", made, anonymize=pair.anonymize)
    matrix = np.asarray(registered.matrix, np.float64)

    def write(name: str, made: Dataset) -> None:
        write_object(folder / name, made, anonymize=pair.anonymize)

    # Each is written before the next is made: a grid of offsets can have hundreds of MB.
    if np.allclose(matrix, np.eye(4)):
        matrix, before_matrix = np.eye(4), registered.field
    else:
        write("affine.dcm", spatial_registration(matrix, fixed=fixed, moving=moving))
        before_matrix = after_field(registered.field, np.linalg.inv(matrix))
    displacement = np.asarray(before_matrix.displacement)
    made = deformable_registration(displacement, fixed.affine, matrix=matrix, fixed=fixed, moving=moving)
    write("registration.dcm", made)
    del made, before_matrix
    displacement = np.asarray(registered.inverse.displacement)
    made = deformable_registration(displacement, moving.affine, matrix=np.eye(4), fixed=moving, moving=fixed)
    write("inverse.dcm", made)
