"""A dose on one DICOM series carried to the anatomy of another one, with dose-volume histograms."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from adregnet_jax.atomic import new_folder
from adregnet_jax.data.dicom import dose as dose_files
from adregnet_jax.data.dicom import structures
from adregnet_jax.data.dicom.files import write_object
from adregnet_jax.data.dicom.series import Series
from adregnet_jax.data.dicom.structures import Shares, Structure
from adregnet_jax.registration.carried_structures import (
    CarriedStructure,
    carry_structures,
    read_structures_of,
)
from adregnet_jax.registration.series_field import SeriesField, grid_coordinates
from adregnet_jax.report import tables
from adregnet_jax.report.doses import BINS, Histogram, cumulative, histogram_figure, mean_dose, rows
from adregnet_jax.report.figures import png

FILES = ("dose.dcm", "dvh.csv", "dvh.png", "means.csv")  # every file that a result can hold
MEANS = (
    tables.Column("structure", "{name}"),
    tables.Column("mean before", "{mean_before:.3f}"),
    tables.Column("mean after", "{mean_after:.3f}"),
)


def carry_dose(dose: dose_files.Dose, field: SeriesField) -> tuple[np.ndarray, np.ndarray]:
    """A dose pulled back to the anatomy of the fixed series.

    Each point gets the dose of the point of the moving series that it corresponds to: neither energy nor mass
    is conserved where tissue is compressed or stretched. Beyond its grid, the dose is 0.

    Args:
      dose: on the moving series.
      field: from the fixed to the moving series.

    Returns:
      [x, y, z] doses, and [4, 4] the affine of their grid: that of the dose, if both series have one frame
      of reference; otherwise shifted so that its centre keeps its anatomical place.
    """
    affine = dose.affine.copy()
    if field.fixed.frame_of_reference != field.moving.frame_of_reference:
        centre_mm = nib.affines.apply_affine(affine, [(np.array(dose.values.shape) - 1) / 2])
        affine[:3, 3] += (field.fixed_points(centre_mm) - centre_mm)[0]
    voxels = field.map_grid(dose.values.shape, affine, target=dose.affine)
    return _sampled(dose.values, voxels), affine


def _sampled(values: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Values of a grid at voxels [3, ...], trilinear; 0 outside of its voxels."""
    inside = np.ones(voxels.shape[1:], bool)
    for along, size in zip(voxels, values.shape, strict=True):
        inside &= (along >= -0.5) & (along <= size - 0.5)
    return np.where(inside, ndimage.map_coordinates(values, voxels, order=1, mode="nearest"), np.float32(0))


def _doses_in(shares: Shares, series: Series, values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Doses at the voxels of a structure's box."""
    corner = nib.affines.from_matvec(np.eye(3), shares.corner)
    to_dose = np.linalg.inv(affine) @ series.affine @ corner
    return _sampled(values, grid_coordinates(shares.values.shape, to_dose))


def histogram(
    carried: CarriedStructure,
    field: SeriesField,
    dose: dose_files.Dose,
    after: tuple[np.ndarray, np.ndarray],
) -> tuple[Histogram, tables.Row]:
    """Dose-volume histograms and mean doses of a structure before and after.

    Args:
      carried: the structure.
      field: between the series.
      dose: before.
      after: doses and affine of their grid.
    """
    shares = carried.shares_before.values, carried.shares_after.values
    before_doses = _doses_in(carried.shares_before, field.moving, dose.values, dose.affine)
    after_doses = _doses_in(carried.shares_after, field.fixed, *after)
    at = np.linspace(0, max(float(dose.values.max()), 1e-6), BINS + 1)
    name = carried.before.name
    curves = cumulative(before_doses, shares[0], at), cumulative(after_doses, shares[1], at)
    means = {
        "name": name,
        "mean_before": mean_dose(before_doses, shares[0]),
        "mean_after": mean_dose(after_doses, shares[1]),
    }
    return Histogram(name, at, *curves, carried.before.colour), means


def write_carried_dose(
    path: Path,
    field: SeriesField,
    output: Path,
    *,
    drawn: Path | None = None,
    only: Sequence[str] = (),
    anonymize: bool = False,
    overwrite: bool = False,
) -> list[tables.Row]:
    """Carries a dose over, and compares the doses of structures before and after, in a new folder.

    Args:
      path: RTDOSE on the moving series.
      field: from the fixed to the moving series.
      output: the folder: `dose.dcm`, and with structures `dvh.csv`, `dvh.png` and `means.csv`.
      drawn: RTSTRUCT on the moving series, or None.
      only: names of the structures; all by default.
      anonymize: keep nothing that identifies.
      overwrite: replace an earlier result.

    Returns:
      Name and mean doses of each structure.

    Raises:
      UserError: a dose or structures that can't be used, or of another frame of reference.
    """
    with new_folder(output, own=FILES, overwrite=overwrite) as temporary:
        dose = dose_files.read_dose(path)
        dose_files.check_frame(path, dose, field.moving)
        found: list[Structure] = []
        if drawn:
            dataset, found = read_structures_of(drawn, field, only=only)
            names = structures.anonymous_names(dataset) if anonymize else {}
            found = [dataclasses.replace(one, name=names.get(one.number, one.name)) for one in found]
        values, affine = carry_dose(dose, field)
        made = dose_files.dose_object(values, affine, source=dose, fixed=field.fixed)
        write_object(temporary / "dose.dcm", made, anonymize=anonymize)
        if not found:
            return []
        compared = [
            histogram(carried, field, dose, (values, affine))
            for carried in carry_structures([each for each in found if each.contours], field)
        ]
        histograms = [one for one, _ in compared]
        means = [row for _, row in compared]
        (temporary / "dvh.csv").write_text(tables.to_csv(rows(histograms)), encoding="utf-8")
        (temporary / "dvh.png").write_bytes(png(histogram_figure(histograms, unit=dose.unit)))
        (temporary / "means.csv").write_text(tables.to_csv(means), encoding="utf-8")
    return means
