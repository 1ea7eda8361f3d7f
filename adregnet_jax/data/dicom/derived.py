"""A warped series as derived slices: pixels and contrast of one series, grid of another."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from adregnet_jax.data.dicom import headers
from adregnet_jax.data.dicom.headers import SERIES_NUMBERS
from adregnet_jax.data.dicom.series import Series
from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
DERIVED_CLASSES = {CT: "CT", MR: "MR"}  # classes that a warped series can have
GEOMETRY = (
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PatientPosition",
    "PixelSpacing",
    "PositionReferenceIndicator",
    "Rows",
    "Columns",
    "SliceLocation",
    "SliceThickness",
    "SpacingBetweenSlices",
    "GantryDetectorTilt",
)
# Attributes of slices that no longer hold for the slices of a derived series.
OUTDATED = (
    "AcquisitionNumber",
    "IconImageSequence",
    "LargestImagePixelValue",
    "LargestPixelValueInSeries",
    "ModalityLUTSequence",
    "PixelData",
    "PixelPaddingRangeLimit",
    "ReferencedImageSequence",
    "SmallestImagePixelValue",
    "SmallestPixelValueInSeries",
    "SourceImageSequence",
    "ContentDate",
    "ContentTime",
)
# Attributes that an image must have, and that are empty where slices differ.
EMPTIED = ("EchoTime", "EchoTrainLength", "InversionTime", "KVP", "RepetitionTime", "ScanOptions")
STORED_RANGE = {0: (0, 2**16 - 1), 1: (-(2**15), 2**15 - 1)}  # of 16 bits, by the pixel representation
COARSEST = 1000  # steps of the stored values, at least, between the least and the largest value


def check_can_be_derived(series: Series) -> None:
    """Refuses series of other kinds than CT and MR, before a registration that may take minutes."""
    if series.sop_class not in DERIVED_CLASSES:
        kind = f"{series.slices[0].get('Modality', '?')} (class {series.sop_class})"
        raise UserError(f"{series.name}: --dicom writes CT and MR series, and this is {kind}: drop --dicom")


def derived_series(
    values: Float[np.ndarray, "x y z"],
    reached: Int[np.ndarray, "z 2"],
    *,
    fixed: Series,
    moving: Series,
    description: str,
) -> list[Dataset]:
    """The slices of a warped series: pixels, patient, study and contrast of one series, grid of another.

    Args:
      values: [x, y, z], warped to the grid of the fixed series.
      reached: [z, 2], first and last slice of the moving series that each slice was computed from.
      fixed: has the grid and the frame of reference.
      moving: has the patient, the study and the scanner.
      description: how the slices were derived.

    Returns:
      Datasets in the order of the fixed slices, ready for `files.write_object`.
    """
    common = _common_header(moving)
    slope, intercept, bounds = _storage(values, common)
    stored = np.clip(np.round((values - intercept) / slope), *bounds)
    stored = stored.astype(np.int16 if bounds[0] < 0 else np.uint16)
    planes = np.ascontiguousarray(stored.transpose(2, 1, 0))  # [z, y, x]
    series = headers.new_uid()
    number = int(moving.slices[0].get("SeriesNumber") or 0) + SERIES_NUMBERS
    return [
        _derived_slice(
            common,
            planes[k],
            header,
            sources=[moving.slices[n] for n in range(reached[k, 0], reached[k, 1] + 1)],
            series=series,
            series_number=number,
            number=k + 1,
            description=description,
        )
        for k, header in enumerate(fixed.slices)
    ]


def _common_header(series: Series) -> Dataset:
    """The attributes that all slices of a series share and a derived series keeps."""
    common = copy.deepcopy(series.slices[0])
    for element in list(common):
        overlay = element.tag.group in headers.OVERLAY_GROUPS
        dropped = element.tag.is_private or overlay or element.keyword in (*OUTDATED, *GEOMETRY)
        differs = not dropped and any(other.get(element.tag) != element for other in series.slices[1:])
        if differs and element.keyword in EMPTIED:
            element.value = None
        elif dropped or differs:
            del common[element.tag]
    headers.complete_study(common)
    return common


def _storage(values: np.ndarray, common: Dataset) -> tuple[float, float, tuple[int, int]]:
    """Slope, intercept and range of the stored values; sets them in the header.

    Those of the source are kept where all slices share them and they hold the values. A slope that is coarser
    than a thousandth of the range is replaced.
    """
    slope, intercept = float(common.get("RescaleSlope") or 1), float(common.get("RescaleIntercept") or 0)
    signed = int(common.get("PixelRepresentation", 1))
    low, high = float(values.min()), float(values.max())
    bounds = STORED_RANGE[signed]
    fits = bounds[0] <= (low - intercept) / slope and (high - intercept) / slope <= bounds[1]
    replaced = not fits or 0 < high - low < slope * COARSEST
    if replaced:
        signed, bounds = 0, STORED_RANGE[0]
        slope, intercept = (high - low or 1) / bounds[1], low
    if replaced or common.Modality == "CT":  # which must have them
        common.RescaleIntercept, common.RescaleSlope = headers.decimal(intercept), headers.decimal(slope)
        slope, intercept = float(common.RescaleSlope), float(common.RescaleIntercept)
    if signed != common.get("PixelRepresentation", 1):
        common.pop("PixelPaddingValue", None)
    common.BitsAllocated = common.BitsStored = 16
    common.HighBit = 15
    common.PixelRepresentation = signed
    common.SamplesPerPixel = 1
    return slope, intercept, bounds


def _derived_slice(
    common: Dataset,
    plane: np.ndarray,
    header: Dataset,
    *,
    sources: list[Dataset],
    series: str,
    series_number: int,
    number: int,
    description: str,
) -> Dataset:
    made = copy.deepcopy(common)
    headers.identify(
        made,
        sop_class=common.SOPClassUID,
        series=series,
        number=series_number,
        description="Warped by registration",
    )
    for keyword in (*GEOMETRY, "FrameOfReferenceUID"):
        if keyword in header:
            made[keyword] = header[keyword]
    for keyword in ("PositionReferenceIndicator", "SliceThickness"):  # may be empty, but must be there
        if keyword not in made:
            setattr(made, keyword, None)
    kinds = [str(kind) for kind in common.get("ImageType", [])]
    usual = "AXIAL" if common.Modality == "CT" else "OTHER"
    made.ImageType = ["DERIVED", "SECONDARY", kinds[2] if len(kinds) > 2 else usual]
    made.InstanceNumber = number
    made.AcquisitionNumber = None
    made.ContentDate, made.ContentTime = made.SeriesDate, made.SeriesTime
    made.DerivationDescription = description
    made.DerivationCodeSequence = [headers.code("113085", "Spatial resampling")]
    made.SourceImageSequence = [_source(source) for source in sources]
    made.ContributingEquipmentSequence = [_equipment()]
    made.PixelData = plane.tobytes()
    made["PixelData"].VR = "OW"
    return made


def _source(instance: Dataset) -> Dataset:
    item = headers.reference(instance)
    meaning = "Source image for image processing operation"
    item.PurposeOfReferenceCodeSequence = [headers.code("121322", meaning)]
    return item


def _equipment() -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [headers.code("109103", "Modifying Equipment")]
    item.Manufacturer = item.ManufacturerModelName = headers.OUR_NAME
    item.SoftwareVersions = __version__
    return item


def reached_slices(
    displacement: Float[np.ndarray, "x y z 3"], affine: Float[np.ndarray, "4 4"], moving: Series
) -> Int[np.ndarray, "z 2"]:
    """First and last slice of a series that each slice of a grid is mapped to.

    Args:
      displacement: [x, y, z, 3] in voxels of its grid, from the fixed to the moving world.
      affine: [4, 4] voxel -> RAS mm of the grid.
      moving: the series.

    Returns:
      [z, 2], inclusive; the nearest slice where none is reached.
    """
    along = (np.linalg.inv(moving.affine) @ affine)[2]  # from voxels of the grid to slices
    i, j, k = np.ogrid[tuple(slice(n) for n in displacement.shape[:3])]
    depth = displacement @ along[:3].astype(np.float32) + (i * along[0] + j * along[1] + k * along[2])
    depth += along[3]
    last = len(moving.slices) - 1
    low = np.clip(np.floor(depth.min(axis=(0, 1))), 0, last).astype(int)
    high = np.clip(np.ceil(depth.max(axis=(0, 1))), 0, last).astype(int)
    return np.stack([low, high], axis=-1)
