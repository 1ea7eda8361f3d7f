"""Marked points by their names: Spatial Fiducials (PS3.3 C.21.2), and points in an RT Structure Set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from adregnet_jax.data.dicom import files
from adregnet_jax.data.dicom.series import Series
from adregnet_jax.data.dicom.structures import check_frame, read_structures
from adregnet_jax.errors import UserError

SUFFIX = ".dcm"
FIDUCIALS, STRUCTURES = "FID", "RTSTRUCT"


def read_fiducials(path: Path, series: Series) -> dict[str, Float[np.ndarray, " 3"]]:
    """Reads marked points in the frame of reference of a series.

    Args:
      path: Spatial Fiducials, or a structure set, of which structures with one point count.
      series: the series that they were marked on.

    Returns:
      LPS mm by name.

    Raises:
      UserError: another kind of object, another frame of reference, or points in pixels of an image.
    """
    dataset = files.read_object(path, FIDUCIALS, STRUCTURES)
    if dataset.Modality == STRUCTURES:
        dataset, structures = read_structures(path)
        check_frame(path, dataset, series)
        return {one.name: one.points[0] for one in structures if len(one.points) == 1}
    found: dict[str, np.ndarray] = {}
    for points in dataset.get("FiducialSetSequence", []):
        frame = str(points.get("FrameOfReferenceUID") or dataset.get("FrameOfReferenceUID", "unknown"))
        if frame != series.frame_of_reference:
            raise UserError(
                f"{path}: marked in the frame of reference {frame}, and {series.name} has "
                f"{series.frame_of_reference}: give the series that the points were marked on"
            )
        found |= {_name(item): _point(path, item) for item in points.get("FiducialSequence", [])}
    return found


def _name(item: Any) -> str:
    return str(item.get("FiducialIdentifier") or item.get("FiducialDescription") or "")


def _point(path: Path, item: Any) -> np.ndarray:
    kind = item.get("ShapeType", "POINT")
    if kind != "POINT" or "ContourData" not in item:
        where = "in pixels of an image" if kind == "POINT" else f"a {kind}"
        raise UserError(f"{path}: fiducial {_name(item)!r} is {where}; expected a point in mm")
    numbers = files.numbers(item, "ContourData")
    if numbers.shape != (3,):
        raise UserError(f"{path}: fiducial {_name(item)!r} has {numbers.size} coordinates; expected 3")
    return numbers
