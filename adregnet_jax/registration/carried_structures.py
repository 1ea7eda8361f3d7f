"""Structures of one DICOM series carried to another one by a displacement field.

They are pulled back as images are: for each voxel of the fixed series, the field says where to look in the
moving series, on which they were drawn.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from adregnet_jax.atomic import new_folder
from adregnet_jax.data.dicom import structures
from adregnet_jax.data.dicom.files import write_object
from adregnet_jax.data.dicom.polygons import area, outlines
from adregnet_jax.data.dicom.structure_set import structure_set
from adregnet_jax.data.dicom.structures import Shares, Structure
from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__
from adregnet_jax.registration.series_field import SeriesField
from adregnet_jax.report import tables

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FILES = ("structures.dcm", "volumes.csv")  # every file that a result can hold
VOLUMES = (
    tables.Column("structure", "{name}"),
    tables.Column("before, cm³", "{volume_before_cm3:.2f}"),
    tables.Column("after, cm³", "{volume_after_cm3:.2f}"),
    tables.Column("change, %", "{change_percent:+.1f}"),
)
DESCRIPTION = f"Carried over by deformable registration, adregnet {__version__}"


@dataclasses.dataclass(frozen=True, eq=False)
class CarriedStructure:
    """A structure before and after.

    Attributes:
      before: as it was drawn.
      shares_before: of the voxels of the moving series.
      shares_after: of the voxels of the fixed series.
      contours: slice of the fixed series, and corners [n, 2] in its pixels, of each contour.
      points_lps: [n, 3] mm, marked points in the fixed world.
    """

    before: Structure
    shares_before: Shares
    shares_after: Shares
    contours: tuple[tuple[int, Float[np.ndarray, "_n 2"]], ...]
    points_lps: Float[np.ndarray, "m 3"]

    def row(self, field: SeriesField) -> tables.Row:
        """Name and volumes; the volume after is that of the contours."""
        before = self.shares_before.volume_mm3(field.moving) / 1000
        voxel_mm3 = abs(np.linalg.det(field.fixed.affine[:3, :3]))
        after = float(sum(area(polygon) for _, polygon in self.contours) * voxel_mm3 / 1000)
        change = 100 * (after / before - 1) if before else None
        return {
            "name": self.before.name,
            "volume_before_cm3": before,
            "volume_after_cm3": after,
            "change_percent": change,
        }


def carry_structures(found: Sequence[Structure], field: SeriesField) -> list[CarriedStructure]:
    """Structures of the moving series on the slices of the fixed one.

    Each is pulled back as the share of each voxel that belongs to it, trilinearly; its contours surround
    shares of a half and more.
    """
    voxels = field.map_grid(field.fixed.shape, field.fixed.affine, target=field.moving.affine)
    reach = _reach(voxels)
    return [_carry(structure, voxels, reach, field) for structure in found]


def _reach(voxels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Least and largest of the coordinates [3, x, y, z] in each plane across x, y and z: [3, n] each."""
    others = ((2, 3), (1, 3), (1, 2))
    return [(voxels.min(axis=axes), voxels.max(axis=axes)) for axes in others]


def _carry(
    structure: Structure,
    voxels: np.ndarray,
    reach: list[tuple[np.ndarray, np.ndarray]],
    field: SeriesField,
) -> CarriedStructure:
    before = structures.shares_of(structure, field.moving)
    after = _pulled_back(before, voxels, reach)
    if structure.contours and not after.values.any():
        warnings.warn(
            f"{field.name} leads nowhere into structure {structure.name!r}: it lies outside of "
            f"{field.fixed.name}",
            stacklevel=3,
        )
    contours = [
        (int(after.corner[2]) + k, polygon + after.corner[:2])
        for k in range(after.values.shape[2])
        for polygon in outlines(after.values[..., k])
    ]
    lps = np.array([-1.0, -1, 1])
    points_lps = structure.points
    if len(points_lps):
        points_lps = field.fixed_points(points_lps * lps) * lps
    return CarriedStructure(structure, before, after, tuple(contours), points_lps)


def _pulled_back(shares: Shares, voxels: np.ndarray, reach: list[tuple[np.ndarray, np.ndarray]]) -> Shares:
    """Shares of the voxels of one grid where the voxels of another one lead to, [3, x, y, z]."""
    padded = np.pad(shares.values, 1)
    low = (shares.corner - 1).astype(np.float32)
    high = low + padded.shape - 1
    nothing = Shares(np.zeros((1, 1, 1), np.float32), np.zeros(3, int))
    planes = [
        np.flatnonzero(((largest > low[:, None]) & (least < high[:, None])).all(axis=0))
        for least, largest in reach
    ]
    if not all(map(len, planes)):
        return nothing
    corner = np.array([found[0] for found in planes])
    there = voxels[:, *(slice(found[0], found[-1] + 1) for found in planes)]
    near = np.ones(there.shape[1:], bool)
    for along, start, end in zip(there, low, high, strict=True):
        near &= (along > start) & (along < end)
    if not near.any():
        return nothing
    box = ndimage.find_objects(near.view(np.uint8))[0]
    coordinates = there[:, *box] - low[:, None, None, None]
    values = ndimage.map_coordinates(padded, coordinates, order=1, mode="constant")
    return Shares(values, corner + [part.start for part in box])


def write_carried_structures(
    path: Path,
    field: SeriesField,
    output: Path,
    *,
    only: Sequence[str] = (),
    anonymize: bool = False,
    overwrite: bool = False,
) -> list[tables.Row]:
    """Carries the structures of a file over; writes a structure set and a table of volumes into a new folder.

    Args:
      path: RTSTRUCT drawn on the moving series.
      field: from the fixed to the moving series.
      output: the folder: `structures.dcm` and `volumes.csv`.
      only: names of the structures; all by default.
      anonymize: keep nothing that identifies.
      overwrite: replace an earlier result.

    Returns:
      Name and volumes of each structure.

    Raises:
      UserError: structures that can't be used, or another frame of reference than that of the moving series.
    """
    with new_folder(output, own=FILES, overwrite=overwrite) as temporary:
        dataset, found = read_structures_of(path, field, only=only)
        carried = carry_structures(found, field)
        made = structure_set(
            dataset,
            {each.before.number: each.contours for each in carried},
            {each.before.number: each.points_lps for each in carried},
            fixed=field.fixed,
            description=DESCRIPTION,
        )
        write_object(temporary / "structures.dcm", made, anonymize=anonymize)
        names = structures.anonymous_names(dataset) if anonymize else {}
        volumes = [each.row(field) for each in carried]
        for row, each in zip(volumes, carried, strict=True):
            row["name"] = names.get(each.before.number, each.before.name)
        (temporary / "volumes.csv").write_text(tables.to_csv(volumes), encoding="utf-8")
    return volumes


def read_structures_of(
    path: Path, field: SeriesField, *, only: Sequence[str] = ()
) -> tuple[Dataset, list[Structure]]:
    """Reads structures and checks that they were drawn on the moving series of a field."""
    dataset, found = structures.read_structures(path, only=only)
    structures.check_frame(path, dataset, field.moving)
    series = structures.drawn_on(dataset)
    fixed, moving = (str(one.slices[0].SeriesInstanceUID) for one in (field.fixed, field.moving))
    if fixed in series and moving not in series:
        raise UserError(
            f"{path}: drawn on the fixed series {field.fixed.name}, and structures are carried from the "
            "moving to the fixed one: exchange --fixed and --moving, and give the inverse field"
        )
    return dataset, found
