"""Structures of radiotherapy: read as contours and as shares of the voxels of a series."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage

from adregnet_jax.data.dicom import files
from adregnet_jax.data.dicom.anonymity import anonymous
from adregnet_jax.data.dicom.polygons import coverage
from adregnet_jax.data.dicom.series import Series
from adregnet_jax.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CLOSED, POINT = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"), "POINT"
OFF_SLICE = 0.1  # of the distance between slices: how far a contour may lie from its slice


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """A region of interest.

    Attributes:
      number: its ROI number.
      name: as it is shown.
      contours: closed planar contours, corners [n, 3] LPS mm of each.
      points: [n, 3] LPS mm, marked points such as an isocentre.
      colour: red, green, blue in [0, 1], or None.
    """

    number: int
    name: str
    contours: tuple[Float[np.ndarray, "_n 3"], ...]
    points: Float[np.ndarray, "m 3"]
    colour: tuple[float, float, float] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Shares:
    """How much of each voxel of a series belongs to a structure, in the smallest box that holds it.

    Attributes:
      values: [x, y, z] float32 in [0, 1].
      corner: voxel of the series that is values[0, 0, 0].
    """

    values: Float[np.ndarray, "x y z"]
    corner: Int[np.ndarray, " 3"]

    def volume_mm3(self, series: Series) -> float:
        return float(self.values.sum(dtype=np.float64) * abs(np.linalg.det(series.affine[:3, :3])))


def read_structures(path: Path, *, only: Sequence[str] = ()) -> tuple[Dataset, list[Structure]]:
    """Reads an RT Structure Set.

    Args:
      path: the file.
      only: names of the structures to read; all by default.

    Returns:
      The object without its contours, and its structures in the order of their definition.

    Raises:
      UserError: not a readable RTSTRUCT, no such structure, or open contours.
    """
    dataset = files.read_object(path, "RTSTRUCT")
    names = {
        int(item.ROINumber): str(item.get("ROIName", ""))
        for item in dataset.get("StructureSetROISequence", [])
    }
    if not names:
        raise UserError(f"{path}: holds no structures")
    if unknown := [name for name in only if name not in names.values()]:
        known = ", ".join(names.values())
        raise UserError(f"{path}: has no structure {unknown[0]!r}; it has {known}")
    drawn = {int(item.ReferencedROINumber): item for item in dataset.get("ROIContourSequence", [])}
    found = [
        _structure(path, number, name, drawn.get(number, {}))
        for number, name in names.items()
        if not only or name in only
    ]
    for item in drawn.values():
        item.pop("ContourSequence", None)  # parsed already; the rest is little
    dataset.remove_private_tags()  # decodes all text with its own character set
    return dataset, found


def _structure(path: Path, number: int, name: str, drawing: Any) -> Structure:
    contours, points = [], [np.empty((0, 3))]
    for item in drawing.get("ContourSequence", []):
        kind = str(item.get("ContourGeometricType", ""))
        try:
            corners = files.numbers(item, "ContourData").reshape(-1, 3)
            if not np.isfinite(corners).all():
                raise ValueError
        except (KeyError, ValueError):
            raise UserError(
                f"{path}: a contour of structure {name!r} isn't a list of points: export it again"
            ) from None
        if kind == POINT:
            points.append(corners)
        elif kind in CLOSED:
            contours.append(corners)
        else:
            raise UserError(
                f"{path}: structure {name!r} has open contours ({kind or 'no type'}); expected closed planar "
                "ones: close them, or choose other structures with --only NAME"
            )
    red_green_blue = [int(value) / 255 for value in drawing.get("ROIDisplayColor") or []]
    colour = (red_green_blue[0], red_green_blue[1], red_green_blue[2]) if len(red_green_blue) == 3 else None
    return Structure(number, name, tuple(contours), np.concatenate(points), colour)


def anonymous_names(dataset: Dataset) -> dict[int, str]:
    """The names of structures by their numbers, as they are in an anonymous copy of their structure set."""
    items = anonymous(dataset).StructureSetROISequence
    return {int(item.ROINumber): str(item.ROIName) for item in items}


def check_frame(path: Path, dataset: Dataset, series: Series) -> None:
    """Refuses structures that were drawn in another frame of reference than that of a series."""
    items = dataset.StructureSetROISequence
    frames = {str(item.get("ReferencedFrameOfReferenceUID") or "unknown") for item in items}
    if frames != {series.frame_of_reference}:
        raise UserError(
            f"{path}: drawn in the frame of reference {', '.join(sorted(frames))}, and {series.name} has "
            f"{series.frame_of_reference}: give the series that the structures were drawn on"
        )


def drawn_on(dataset: Dataset) -> set[str]:
    """UIDs of the series that a structure set refers to."""
    return {
        str(series.SeriesInstanceUID)
        for frame in dataset.get("ReferencedFrameOfReferenceSequence", [])
        for study in frame.get("RTReferencedStudySequence", [])
        for series in study.get("RTReferencedSeriesSequence", [])
    }


def shares_of(structure: Structure, series: Series) -> Shares:
    """How much of each voxel of a series belongs to a structure; contours on one slice exclude each other.

    A structure that was drawn on every second slice, or fewer, is interpolated between them.

    Raises:
      UserError: contours that lie between the slices, or across them.
    """
    to_voxels = np.linalg.inv(series.lps)
    slices: dict[int, list[np.ndarray]] = {}
    for contour in structure.contours:
        voxels = nib.affines.apply_affine(to_voxels, contour)
        k = round(float(voxels[:, 2].mean()))
        off = float(np.abs(voxels[:, 2] - k).max())
        if off > OFF_SLICE:
            raise UserError(
                f"structure {structure.name!r} has contours {off:.2g} of a slice off the slices of "
                f"{series.name}: give the series that it was drawn on"
            )
        if 0 <= k < series.shape[2]:
            slices.setdefault(k, []).append(voxels[:, :2])
    if not slices:
        return Shares(np.zeros((1, 1, 1), np.float32), np.zeros(3, int))
    corners = np.concatenate([polygon for polygons in slices.values() for polygon in polygons])
    widest = np.array(series.shape[:2]) - 1
    low = np.clip(np.floor(corners.min(axis=0)).astype(int) - 1, 0, widest)
    high = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, widest)
    first, last = min(slices), max(slices)
    shape = (int(high[0] - low[0] + 1), int(high[1] - low[1] + 1))
    values = np.zeros((*shape, last - first + 1), np.float32)
    for k, polygons in slices.items():
        values[..., k - first] = coverage([polygon - low for polygon in polygons], shape=shape)
    _interpolate(values, [k - first for k in sorted(slices)])
    return Shares(values, np.array([*low, first]))


def _interpolate(values: np.ndarray, drawn: Sequence[int]) -> None:
    """Fills the slices between those that were drawn, if none of these are neighbours, in place.

    Between two slices the border moves evenly: its distance from each pixel is interpolated. Gaps that are
    wider than the others separate pieces, and stay.
    """
    steps = np.diff(drawn)
    if not len(steps) or (step := int(steps.min())) < 2:
        return
    for below, above in itertools.pairwise(drawn):
        if above - below != step:
            continue
        ends = [_distance_inside(values[..., k]) for k in (below, above)]
        for k in range(below + 1, above):
            share = (k - below) / step
            values[..., k] = np.clip((1 - share) * ends[0] + share * ends[1] + 0.5, 0, 1)


def _distance_inside(shares: np.ndarray) -> np.ndarray:
    """The distance of each pixel from the border of a region, in pixels; negative outside."""
    inside = shares > 0.5
    if not inside.any():
        return np.full(shares.shape, -1.0)
    padded = np.pad(inside, 1)
    signed = ndimage.distance_transform_edt(padded) - ndimage.distance_transform_edt(~padded)
    return (signed - 0.5 * np.sign(signed))[1:-1, 1:-1]


def is_structure_set(path: Path) -> bool:
    """Whether a path is a file with an RT Structure Set, by its name and its header."""
    if not path.is_file() or path.suffix.lower() != ".dcm":
        return False
    module = files.pydicom(path)
    try:
        return module.dcmread(path, specific_tags=["Modality"]).get("Modality") == "RTSTRUCT"
    except (module.errors.InvalidDicomError, OSError, EOFError, ValueError):
        return False  # whoever reads it as an image says what is wrong


def label_map(
    found: Sequence[Structure], series: Series, *, numbers: Mapping[str, int]
) -> Int[np.ndarray, "x y z"]:
    """Structures as labels on the grid of a series; where they overlap, the smaller one counts.

    Args:
      found: the structures.
      series: the series that they were drawn on.
      numbers: labels by name; other structures are left out.
    """
    labels = np.zeros(series.shape, np.int32)
    drawn = [(shares_of(one, series), numbers[one.name]) for one in found if one.name in numbers]
    for shares, number in sorted(drawn, key=lambda pair: -pair[0].volume_mm3(series)):
        box = tuple(slice(c, c + n) for c, n in zip(shares.corner, shares.values.shape, strict=True))
        labels[box][shares.values > 0.5] = number
    return labels
