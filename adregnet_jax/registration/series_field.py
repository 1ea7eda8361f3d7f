"""A displacement field between two DICOM series: where it leads voxels and points."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float
from scipy import ndimage

from adregnet_jax.data.dicom.series import Series, read_series
from adregnet_jax.data.io.transforms import Format, read_field
from adregnet_jax.errors import UserError
from adregnet_jax.ops.composition import DAMPING
from adregnet_jax.registration.dicom import warn_of_two_patients

INVERSE_STEPS = 100
SAME_GRID_MM = 1e-3  # affines of fields are stored as float32


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
        self,
        shape: tuple[int, int, int],
        affine: Float[np.ndarray, "4 4"],
        *,
        target: Float[np.ndarray, "4 4"],
    ) -> Float[np.ndarray, "3 x2 y2 z2"]:
        """Where the voxels of a grid lead to; beyond the field's own grid, its border counts.

        Args:
          shape: (x, y, z) of the grid.
          affine: [4, 4] voxel -> RAS mm of the grid, in the fixed world.
          target: [4, 4] voxel -> RAS mm of a grid in the moving world.

        Returns:
          [3, x, y, z] float32, in voxels of the target.
        """
        to_target = np.linalg.inv(target)
        ends = grid_coordinates(shape, to_target @ affine)
        turned = (to_target @ self.affine)[:3, :3].astype(np.float32)
        same = shape == self.displacement.shape[:3] and np.allclose(affine, self.affine, atol=SAME_GRID_MM)
        starts = None if same else grid_coordinates(shape, np.linalg.inv(self.affine) @ affine)
        for axis in range(3):
            shift = self.displacement[..., axis] if starts is None else self._sample(axis, starts)
            for row in range(3):
                if turned[row, axis]:
                    ends[row] += turned[row, axis] * shift
        return ends

    def map_points(self, points_mm: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
        """Fixed points in the moving world, RAS mm."""
        voxels = nib.affines.apply_affine(np.linalg.inv(self.affine), points_mm)
        moved = np.stack([self._sample(axis, voxels.T) for axis in range(3)], axis=-1)
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

    def _sample(self, axis: int, coordinates: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(self.displacement[..., axis], coordinates, order=1, mode="nearest")


def grid_coordinates(
    shape: tuple[int, ...], matrix: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "3 x y z"]:
    """The voxels of a grid through a matrix, float32."""
    i, j, k = np.indices(shape, np.float32, sparse=True)
    found = np.empty((3, *shape), np.float32)
    for row in range(3):
        found[row] = np.float32(matrix[row, 0]) * i + np.float32(matrix[row, 1]) * j
        found[row] += np.float32(matrix[row, 2]) * k + np.float32(matrix[row, 3])
    return found


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
