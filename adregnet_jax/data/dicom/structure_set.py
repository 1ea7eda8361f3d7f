"""RT Structure Sets with the structures of another one, and contours on another series."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from jaxtyping import Float

from adregnet_jax.data.dicom import files, headers
from adregnet_jax.data.dicom.headers import SERIES_NUMBERS
from adregnet_jax.data.dicom.series import Series
from adregnet_jax.data.dicom.structures import CLOSED, POINT

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
CONTOUR_DATA = 0x30060050
DIGITS = 3  # of written coordinates in mm: DICOM's decimals have at most 16 characters


def structure_set(
    source: Dataset,
    contours: Mapping[int, Sequence[tuple[int, Float[np.ndarray, "_n 2"]]]],
    points: Mapping[int, Float[np.ndarray, "_m 3"]],
    *,
    fixed: Series,
    description: str,
) -> Dataset:
    """A structure set with the structures of another one, contours on the slices of a series.

    Args:
      source: names, colours and observations come from it.
      contours: by ROI number; of each contour the slice and the corners [n, 2] in pixels of the series.
      points: [m, 3] LPS mm, by ROI number.
      fixed: has the slices, the patient and the study.
      description: how the contours were made.
    """
    made = headers.with_patient_and_study(source, fixed.slices[0], without=("ROIContourSequence",))
    header = fixed.slices[0]
    number = int(source.get("SeriesNumber") or 0) + SERIES_NUMBERS
    headers.identify(
        made, sop_class=CLASS, series=headers.new_uid(), number=number, description="Structures carried over"
    )
    headers.add_equipment(made)
    made.StructureSetDate, made.StructureSetTime = made.SeriesDate, made.SeriesTime
    made.FrameOfReferenceUID = fixed.frame_of_reference
    made.PositionReferenceIndicator = header.get("PositionReferenceIndicator", "")
    made.ReferencedFrameOfReferenceSequence = [_frame(fixed)]
    made.PredecessorStructureSetSequence = [headers.reference(source)]
    kept = {*contours, *points}
    made.StructureSetROISequence = [
        _definition(item, fixed, description)
        for item in source.StructureSetROISequence
        if int(item.ROINumber) in kept
    ]
    made.RTROIObservationsSequence = [
        copy.deepcopy(item)
        for item in source.get("RTROIObservationsSequence", [])
        if int(item.ReferencedROINumber) in kept
    ]
    made.ROIContourSequence = [
        _contours(item, contours, points, fixed)
        for item in source.get("ROIContourSequence", [])
        if int(item.ReferencedROINumber) in kept
    ]
    return made


def _frame(fixed: Series) -> Dataset:
    """The series that contours are drawn on, within its study and its frame of reference."""
    from pydicom.dataset import Dataset

    series = Dataset()
    series.SeriesInstanceUID = fixed.slices[0].SeriesInstanceUID
    series.ContourImageSequence = [headers.reference(header) for header in fixed.slices]
    study = Dataset()
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # a study, as PS3.3 C.8.8.5 refers to it
    study.ReferencedSOPInstanceUID = fixed.slices[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = fixed.frame_of_reference
    frame.RTReferencedStudySequence = [study]
    return frame


def _definition(item: Dataset, fixed: Series, description: str) -> Dataset:
    made = copy.deepcopy(item)
    made.ReferencedFrameOfReferenceUID = fixed.frame_of_reference
    made.ROIGenerationAlgorithm = "AUTOMATIC"
    made.ROIGenerationDescription = description
    made.pop("ROIVolume", None)
    return made


def _contours(
    item: Dataset,
    contours: Mapping[int, Sequence[tuple[int, np.ndarray]]],
    points: Mapping[int, np.ndarray],
    fixed: Series,
) -> Dataset:
    """An item of ROIContourSequence: number and colour as before, contours anew."""
    from pydicom.dataset import Dataset

    made = Dataset()
    number = int(item.ReferencedROINumber)
    made.ReferencedROINumber = number
    if "ROIDisplayColor" in item:
        made.ROIDisplayColor = item.ROIDisplayColor
    drawn = [
        _contour(
            CLOSED[0], nib.affines.apply_affine(fixed.lps, np.c_[polygon, np.full(len(polygon), k)]), fixed, k
        )
        for k, polygon in contours.get(number, ())
    ]
    drawn += [_contour(POINT, point[None], fixed, None) for point in points.get(number, ())]
    for count, contour in enumerate(drawn, 1):
        contour.ContourNumber = count
    if drawn:
        made.ContourSequence = drawn
    return made


def _contour(kind: str, corners_mm: np.ndarray, fixed: Series, k: int | None) -> Dataset:
    from pydicom.charset import default_encoding
    from pydicom.dataset import Dataset

    made = Dataset()
    if k is not None:
        made.ContourImageSequence = [headers.reference(fixed.slices[k])]
    made.ContourGeometricType = kind
    made.NumberOfContourPoints = len(corners_mm)
    made[CONTOUR_DATA] = files.decimals(corners_mm, CONTOUR_DATA, digits=DIGITS)
    # As the file will be: what is encoded already stays as it is.
    made.set_original_encoding(
        is_implicit_vr=False, is_little_endian=True, character_encoding=default_encoding
    )
    return made
