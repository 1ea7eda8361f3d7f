"""Structures and doses of one DICOM series carried to another one by a displacement field.

Both are pulled back as images are: for each voxel of the fixed series, the field says where to look in the
moving series, on which the structures were drawn and the dose was computed.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float
from scipy import ndimage

from adregnet_jax.atomic import new_folder
from adregnet_jax.data.dicom import headers, structures
from adregnet_jax.data.dicom.polygons import area, outlines
from adregnet_jax.data.dicom.series import Series, read_series
from adregnet_jax.data.dicom.structures import Shares, Structure
from adregnet_jax.data.io.transforms import Format, read_field
from adregnet_jax.errors import UserError
from adregnet_jax.ops.composition import DAMPING
from adregnet_jax.provenance import __version__
from adregnet_jax.registration.dicom import warn_of_two_patients
from adregnet_jax.report import tables

STRUCTURE_FILES = ("structures.dcm", "volumes.csv")
VOLUMES = (
    tables.Column("structure", "{name}"),
    tables.Column("before, cm³", "{volume_before_cm3:.2f}"),
    tables.Column("after, cm³", "{volume_after_cm3:.2f}"),
    tables.Column("change, %", "{change_percent:+.1f}"),
)
INVERSE_STEPS = 100
SAME_GRID_MM = 1e-3  # affines of fields are stored as float32
DESCRIPTION = f"Carried over by deformable registration, adregnet {__version__}"


@dataclasses.dataclass(frozen=True, eq=False)
class SeriesField:
    """A field between two series.

    Attributes:
      displacement: [x, y, z, 3] in voxels of its own grid.
      affine: [4, 4] voxel -> RAS mm of its grid.
      fixed: the series that it starts from.
      moving: the series that it leads to.
      name: used in messages.
    """

    displacement: Float[np.ndarray, "x y z 3"]
    affine: Float[np.ndarray, "4 4"]
    fixed: Series
    moving: Series
    name: str

    def map_grid(
        self, shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"]
    ) -> Float[np.ndarray, "x2 y2 z2 3"]:
        """Where the voxels of a grid lead to, RAS mm; beyond the field's own grid, its border counts."""
        i, j, k = np.indices(shape, np.float32, sparse=True)
        same = shape == self.displacement.shape[:3] and np.allclose(affine, self.affine, atol=SAME_GRID_MM)
        to_field = np.linalg.inv(self.affine) @ affine
        starts = [(row[0] * i + row[1] * j + row[2] * k + row[3]).astype(np.float32) for row in to_field[:3]]
        ends = np.stack(starts, axis=-1)
        if same:
            ends += self.displacement
        else:
            for axis in range(3):
                ends[..., axis] += self._sample(axis, starts)
        return ends @ self.affine[:3, :3].T.astype(np.float32) + self.affine[:3, 3].astype(np.float32)

    def map_points(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Fixed points in the moving world, RAS mm."""
        voxels = nib.affines.apply_affine(np.linalg.inv(self.affine), points_mm)
        moved = np.stack([self._sample(axis, list(voxels.T)) for axis in range(3)], axis=-1)
        return nib.affines.apply_affine(self.affine, voxels + moved)

    def fixed_points(self, moving_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """The fixed points that lead to points of the moving world, RAS mm."""
        axes = [np.arange(0, n, max(1, n // 32)) for n in self.displacement.shape[:3]]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        starts_mm = nib.affines.apply_affine(self.affine, grid.reshape(-1, 3))
        ends_mm = self.map_points(starts_mm)
        nearest = [int(np.argmin(np.sum((ends_mm - point) ** 2, axis=1))) for point in moving_mm]
        found = starts_mm[nearest] + moving_mm - ends_mm[nearest]
        for _ in range(INVERSE_STEPS):
            found = found - DAMPING * (self.map_points(found) - moving_mm)
        return found

    def _sample(self, axis: int, coordinates: list[np.ndarray]) -> np.ndarray:
        return ndimage.map_coordinates(self.displacement[..., axis], coordinates, order=1, mode="nearest")


def read_series_field(
    path: Path,
    *,
    fixed: Path,
    moving: Path,
    fixed_series: str | None = None,
    moving_series: str | None = None,
    format: Format | None = None,
) -> SeriesField:
    """Reads a field and the headers of the two series that it lies between.

    Raises:
      UserError: files that can't be used, or a field whose grid lies elsewhere than the fixed series.
    """
    displacement, affine = read_field(path, format=format)
    field = SeriesField(
        displacement,
        affine,
        read_series(fixed, series=fixed_series),
        read_series(moving, series=moving_series),
        str(path),
    )
    centre_mm = field.fixed.affine @ [*(np.array(field.fixed.shape) / 2 - 0.5), 1]
    voxel = (np.linalg.inv(affine) @ centre_mm)[:3]
    if np.any(voxel < 0) or np.any(voxel > np.array(displacement.shape[:3]) - 1):
        raise UserError(
            f"{path}: its grid doesn't hold the centre of {fixed}: expected a field from that series to "
            f"{moving}"
        )
    warn_of_two_patients(field.fixed, field.moving)
    return field


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
        after = sum(area(polygon) for _, polygon in self.contours) * voxel_mm3 / 1000
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
    moving_mm = field.map_grid(field.fixed.shape, field.fixed.affine)
    to_voxels = np.linalg.inv(field.moving.affine).astype(np.float32)
    voxels = moving_mm @ to_voxels[:3, :3].T + to_voxels[:3, 3]  # [x, y, z, 3]
    del moving_mm
    return [_carry(structure, voxels, field) for structure in found]


def _carry(structure: Structure, voxels: np.ndarray, field: SeriesField) -> CarriedStructure:
    before = structures.shares_of(structure, field.moving)
    after = _pulled_back(before, voxels)
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


def _pulled_back(shares: Shares, voxels: np.ndarray) -> Shares:
    """Shares of the voxels of one grid where the voxels of another one lead to, [x, y, z, 3]."""
    padded = np.pad(shares.values, 1)
    low = shares.corner - 1
    near = np.ones(voxels.shape[:3], bool)
    for axis, size in enumerate(padded.shape):
        near &= (voxels[..., axis] > low[axis]) & (voxels[..., axis] < low[axis] + size - 1)
    if not near.any():
        return Shares(np.zeros((1, 1, 1), np.float32), np.zeros(3, int))
    box = ndimage.find_objects(near.astype(np.uint8))[0]
    coordinates = np.moveaxis(voxels[box] - low.astype(np.float32), -1, 0)
    values = ndimage.map_coordinates(padded, coordinates, order=1, mode="constant")
    return Shares(values, np.array([part.start for part in box]))


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
    with new_folder(output, own=STRUCTURE_FILES, overwrite=overwrite) as temporary:
        dataset, found = read_structures_of(path, field, only=only)
        carried = carry_structures(found, field)
        made = structures.structure_set(
            dataset,
            {each.before.number: each.contours for each in carried},
            {each.before.number: each.points_lps for each in carried},
            fixed=field.fixed,
            description=DESCRIPTION,
        )
        headers.write_object(temporary / "structures.dcm", made, anonymize=anonymize)
        rows = [each.row(field) for each in carried]
        if anonymize:
            names = {
                int(item.ROINumber): item.ROIName for item in headers.anonymous(made).StructureSetROISequence
            }
            rows = [
                row | {"name": names[each.before.number]} for row, each in zip(rows, carried, strict=True)
            ]
        (temporary / "volumes.csv").write_text(tables.to_csv(rows), encoding="utf-8")
    return rows


def read_structures_of(
    path: Path, field: SeriesField, *, only: Sequence[str] = ()
) -> tuple[headers.Dataset, list[Structure]]:
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
