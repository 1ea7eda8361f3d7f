"""DICOM's registration objects, PS3.3 C.20.2 and C.20.3, as pure functions of a field or a matrix.

The two objects run in opposite directions. A Spatial Registration has the matrix that takes points of the
source (moving) frame of reference to the registered (fixed) one, C.20.2.1.1. A Deformable Spatial
Registration takes points of the registered frame to the source, C.20.3.1.1, as our fields do:

    source = post @ (pre @ registered + offset(registered))

Ours has pre = identity, so that readers agree on where the grid lies, and the affine step as post.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from adregnet_jax.data.dicom import headers
from adregnet_jax.data.dicom.headers import SERIES_NUMBERS
from adregnet_jax.data.dicom.series import Series
from adregnet_jax.data.io.itk import LPS_TO_RAS

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SPATIAL = "1.2.840.10008.5.1.4.1.1.66.1"
DEFORMABLE = "1.2.840.10008.5.1.4.1.1.66.3"
SLAB = 16  # columns of a grid that are turned at once
RIGID_TOLERANCE = 1e-5  # of the product of a linear part with its transpose
LPS = np.diag(LPS_TO_RAS)[:3]


def spatial_registration(matrix: Float[np.ndarray, "4 4"], *, fixed: Series, moving: Series) -> Dataset:
    """A Spatial Registration of two series.

    Args:
      matrix: [4, 4] fixed RAS mm -> moving RAS mm, as a registration gives it.
      fixed: the series whose frame of reference is the registered one.
      moving: the other series.
    """
    from pydicom.dataset import Dataset

    made = _registration(SPATIAL, fixed, moving, label="AFFINE", description="Rigid or affine registration")
    items = []
    for series, to_fixed in ((fixed, np.eye(4)), (moving, np.linalg.inv(matrix))):
        item = Dataset()
        item.FrameOfReferenceUID = series.frame_of_reference
        item.ReferencedImageSequence = [headers.reference(header) for header in series.slices]
        sequence = Dataset()
        sequence.RegistrationTypeCodeSequence = [_method()] if series is moving else []
        sequence.MatrixSequence = [_matrix(to_fixed)]
        item.MatrixRegistrationSequence = [sequence]
        items.append(item)
    made.RegistrationSequence = items
    return made


def deformable_registration(
    displacement: Float[np.ndarray, "x y z 3"],
    affine: Float[np.ndarray, "4 4"],
    *,
    matrix: Float[np.ndarray, "4 4"],
    fixed: Series,
    moving: Series,
) -> Dataset:
    """A Deformable Spatial Registration of two series.

    Args:
      displacement: [x, y, z, 3] in voxels of its grid, before the matrix.
      affine: [4, 4] voxel -> RAS mm of the grid, with perpendicular axes.
      matrix: [4, 4] RAS mm, applied after the displacement.
      fixed: the series whose frame of reference is the registered one.
      moving: the source.
    """
    from pydicom.dataset import Dataset

    made = _registration(DEFORMABLE, fixed, moving, label="DEFORMABLE", description="Deformable registration")
    item = Dataset()
    item.SourceFrameOfReferenceUID = moving.frame_of_reference
    item.ReferencedImageSequence = [headers.reference(header) for header in moving.slices]
    item.RegistrationTypeCodeSequence = [_method()]
    item.PreDeformationMatrixRegistrationSequence = [_matrix(np.eye(4))]
    item.PostDeformationMatrixRegistrationSequence = [_matrix(matrix)]
    item.DeformableRegistrationGridSequence = [_grid(displacement, affine)]
    made.DeformableRegistrationSequence = [item]
    return made


def _grid(displacement: np.ndarray, affine: np.ndarray) -> Dataset:
    """The grid with its offsets in mm, the first axis fastest."""
    from pydicom.dataset import Dataset

    displacement, affine = _right_handed(displacement, affine)
    lps = LPS_TO_RAS @ affine
    spacing_mm = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing_mm
    to_mm = lps[:3, :3].T.astype(np.float32)
    grid = Dataset()
    grid.ImagePositionPatient = [headers.decimal(value) for value in lps[:3, 3]]
    grid.ImageOrientationPatient = [headers.decimal(value) for value in axes[:, :2].T.ravel()]
    grid.GridDimensions = list(displacement.shape[:3])
    grid.GridResolution = spacing_mm.tolist()
    diagonal = np.array_equal(to_mm, np.diag(np.diag(to_mm)))
    x, y, z = displacement.shape[:3]
    offsets_mm = np.empty((z, y, x, 3), "<f4")
    for start in range(0, x, SLAB):
        slab = displacement[start : start + SLAB].astype(np.float32, copy=False)
        along = slab * np.diag(to_mm) if diagonal else slab @ to_mm
        offsets_mm[:, :, start : start + SLAB] = along.transpose(2, 1, 0, 3)
    grid.VectorGridData = offsets_mm.tobytes()
    return grid


def _right_handed(displacement: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same field on a grid whose third axis is the cross product of the others, as DICOM defines it."""
    if np.linalg.det((LPS_TO_RAS @ affine)[:3, :3]) > 0:
        return displacement, affine
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 2] * (displacement.shape[2] - 1)
    flipped[:3, 2] *= -1
    return displacement[:, :, ::-1] * np.array([1, 1, -1], displacement.dtype), flipped


def _matrix(matrix: np.ndarray) -> Dataset:
    """A matrix from RAS to RAS mm as an item, in LPS mm."""
    from pydicom.dataset import Dataset

    item = Dataset()
    lps = LPS_TO_RAS @ matrix @ LPS_TO_RAS
    lps += 0.0  # no negative zeros
    item.FrameOfReferenceTransformationMatrix = [headers.decimal(value) for value in lps.ravel()]
    item.FrameOfReferenceTransformationMatrixType = "RIGID" if _is_rigid(matrix) else "AFFINE"
    return item


def _is_rigid(matrix: np.ndarray) -> bool:
    linear = matrix[:3, :3]
    orthonormal = np.allclose(linear @ linear.T, np.eye(3), atol=RIGID_TOLERANCE)
    return bool(orthonormal and np.linalg.det(linear) > 0)


def _method() -> Dataset:
    return headers.code("125024", "Image Content-based Alignment")


def _registration(sop_class: str, fixed: Series, moving: Series, *, label: str, description: str) -> Dataset:
    """The attributes that both kinds of objects share."""
    header = fixed.slices[0]
    made = headers.of_patient_and_study(header)
    number = int(header.get("SeriesNumber") or 0) + SERIES_NUMBERS + 1
    headers.identify(
        made, sop_class=sop_class, series=headers.new_uid(), number=number, description=description
    )
    made.Modality = "REG"
    headers.add_equipment(made)
    made.FrameOfReferenceUID = fixed.frame_of_reference
    made.PositionReferenceIndicator = header.get("PositionReferenceIndicator", "")
    made.InstanceNumber = 1
    made.ContentLabel = label
    made.ContentDescription = description
    made.ContentCreatorName = ""
    made.ContentDate, made.ContentTime = made.SeriesDate, made.SeriesTime
    headers.add_instance_references(made, (*fixed.slices, *moving.slices))
    return made
