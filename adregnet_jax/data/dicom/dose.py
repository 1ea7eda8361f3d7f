"""RT Dose objects: read as doses on a grid, written with other doses, the same size and scaling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from adregnet_jax.data.dicom import files, headers
from adregnet_jax.data.dicom.headers import SERIES_NUMBERS
from adregnet_jax.data.dicom.series import SLICE_TOLERANCE, Series
from adregnet_jax.data.io.dicom import frame_shifts_mm
from adregnet_jax.data.io.itk import LPS_TO_RAS
from adregnet_jax.errors import UserError, one_line

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CLASS = "1.2.840.10008.5.1.4.1.1.481.2"
COMMENT = "Pulled back by deformable registration; energy isn't conserved"  # at most 64 characters
# Attributes that no longer hold for a dose on another anatomy.
OUTDATED = (
    "DerivationDescription",
    "DVHSequence",
    "DVHNormalizationDoseValue",
    "DVHNormalizationPoint",
    "ReferencedStructureSetSequence",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dose:
    """A dose on a grid.

    Attributes:
      values: [x, y, z] float32, in `unit`.
      affine: [4, 4] voxel -> RAS mm.
      unit: "Gy", or "relative".
      dataset: the object that it was read from.
    """

    values: Float[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]
    unit: str
    dataset: Dataset


def read_dose(path: Path) -> Dose:
    """Reads an RT Dose.

    Raises:
      UserError: not a readable RTDOSE, no grid or no scaling, uneven frames, or compressed without a decoder.
    """
    dataset = files.read_object(path, "RTDOSE")
    dataset.remove_private_tags()  # decodes all text with its own character set
    if not dataset.get("DoseGridScaling"):
        raise UserError(
            f"{path}: a dose without DoseGridScaling, so that its unit is unknown: export it again"
        )
    for keyword in ("PixelData", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if keyword not in dataset:
            raise UserError(f"{path}: a dose without {keyword}; expected a dose on a grid")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise UserError(f"{path}: a dose in colour; expected one number per voxel")
    try:
        stored = dataset.pixel_array
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed:
            raise UserError(
                f"{path}: compressed as {syntax.name}, which needs a decoder: pip install pylibjpeg[all]"
            ) from None
        raise UserError(f"{path}: its doses can't be read ({one_line(error)}): export it again") from None
    stored = stored.reshape(-1, *stored.shape[-2:])  # [z, y, x]
    values = (stored.transpose(2, 1, 0) * float(dataset.DoseGridScaling)).astype(np.float32)
    unit = "Gy" if dataset.get("DoseUnits", "GY") == "GY" else "relative"
    return Dose(values, _affine(path, dataset, len(stored)), unit, dataset)


def _affine(path: Path, dataset: Dataset, frames: int) -> np.ndarray:
    orientation = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(*orientation)
    lps = np.eye(4)
    lps[:3, 0] = orientation[0] * float(dataset.PixelSpacing[1])
    lps[:3, 1] = orientation[1] * float(dataset.PixelSpacing[0])
    lps[:3, 2] = normal * float(dataset.get("SliceThickness") or 1)
    lps[:3, 3] = np.array(dataset.ImagePositionPatient, float)
    if frames > 1:
        offsets = np.atleast_1d(np.array(dataset.get("GridFrameOffsetVector") or [], float))
        if len(offsets) != frames:
            raise UserError(f"{path}: {frames} frames with {len(offsets)} offsets; expected one for each")
        steps_mm = np.diff(offsets)
        if np.ptp(steps_mm) > SLICE_TOLERANCE * abs(np.median(steps_mm)) or steps_mm[0] == 0:
            span = f"{steps_mm.min():.4g} to {steps_mm.max():.4g} mm"
            raise UserError(f"{path}: frames lie {span} apart; expected even steps")
        lps[:3, 2] = frame_shifts_mm(offsets, normal)[-1] / (frames - 1)
    return LPS_TO_RAS @ lps


def check_frame(path: Path, dose: Dose, series: Series) -> None:
    """Refuses a dose in another frame of reference than that of a series."""
    frame = str(dose.dataset.get("FrameOfReferenceUID", "none"))
    if frame != series.frame_of_reference:
        raise UserError(
            f"{path}: its frame of reference is {frame}, and {series.name} has {series.frame_of_reference}: "
            "give the series that the dose was computed on"
        )


def dose_object(
    values: Float[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"], *, source: Dose, fixed: Series
) -> Dataset:
    """A dose like another one, on the anatomy of a series.

    Args:
      values: [x, y, z] in the unit of the source, not larger than its largest.
      affine: [4, 4] voxel -> RAS mm; may be shifted against the grid of the source.
      source: has size, scaling and type of the dose.
      fixed: has the frame of reference, the patient and the study.
    """
    dataset = source.dataset
    made = headers.with_patient_and_study(dataset, fixed.slices[0], without=("PixelData", *OUTDATED))
    number = int(dataset.get("SeriesNumber") or 0) + SERIES_NUMBERS
    headers.identify(
        made, sop_class=CLASS, series=headers.new_uid(), number=number, description="Dose carried over"
    )
    headers.add_equipment(made)
    made.ContentDate, made.ContentTime = made.SeriesDate, made.SeriesTime
    made.FrameOfReferenceUID = fixed.frame_of_reference
    made.PositionReferenceIndicator = fixed.slices[0].get("PositionReferenceIndicator", "")
    shift_mm = LPS_TO_RAS[:3, :3] @ (affine - source.affine)[:3, 3]
    if shift_mm.any():
        position = np.array(dataset.ImagePositionPatient, float) + shift_mm
        made.ImagePositionPatient = [headers.decimal(value) for value in position]
        offsets = np.atleast_1d(np.array(dataset.get("GridFrameOffsetVector") or [0.0], float))
        if offsets[0] != 0:  # heights rather than distances from the first frame
            made.GridFrameOffsetVector = [headers.decimal(value) for value in offsets + shift_mm[2]]
    made.DoseComment = COMMENT
    kind = "i" if dataset.get("PixelRepresentation", 0) else "u"
    dtype = np.dtype(f"<{kind}{int(dataset.BitsAllocated) // 8}")
    stored = np.round(values.astype(np.float64) / float(dataset.DoseGridScaling))
    stored = np.clip(stored, np.iinfo(dtype).min, np.iinfo(dtype).max).transpose(2, 1, 0).astype(dtype)
    made.PixelData = np.ascontiguousarray(stored).tobytes()
    made["PixelData"].VR = "OW"
    return made
