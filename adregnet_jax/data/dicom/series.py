"""Series of DICOM slices: their headers, and the series derived from them."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from adregnet_jax.data.dicom import headers
from adregnet_jax.data.io.images import Image
from adregnet_jax.data.io.itk import LPS_TO_RAS
from adregnet_jax.errors import UserError
from adregnet_jax.provenance import __version__

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
DERIVED_CLASSES = {CT: "CT", MR: "MR"}  # classes that a warped series can have
SLICE_TOLERANCE = 0.05  # of the distance between slices
GRID_TOLERANCE_MM = 0.01  # between the grid of an image and that of its headers
# JPEG 2000 with high throughput and JPEG XL, which GDCM doesn't decode, and what does.
UNDECODED = ("1.2.840.10008.1.2.4.20", "1.2.840.10008.1.2.4.11")
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
STORED_RANGE = {0: (0, 2**16 - 1), 1: (-(2**15), 2**15 - 1)}  # of 16 bits, by the pixel representation
COARSEST = 1000  # steps of the stored values, at least, between the least and the largest value
SERIES_NUMBERS = 1000  # added to the number of the source's series


@dataclasses.dataclass(frozen=True, eq=False)
class Series:
    """The headers of a series, ordered along the normal of its slices, as ITK orders them.

    Attributes:
      slices: the headers, without pixels.
      affine: [4, 4] voxel (column, row, slice) -> RAS mm.
      name: used in messages.
    """

    slices: tuple[Dataset, ...]
    affine: Float[np.ndarray, "4 4"]
    name: str

    @property
    def shape(self) -> tuple[int, int, int]:
        return int(self.slices[0].Columns), int(self.slices[0].Rows), len(self.slices)

    @property
    def frame_of_reference(self) -> str:
        return str(self.slices[0].FrameOfReferenceUID)

    @property
    def sop_class(self) -> str:
        return str(self.slices[0].SOPClassUID)

    @property
    def lps(self) -> Float[np.ndarray, "4 4"]:
        """Voxel -> LPS mm, the coordinates of DICOM."""
        return LPS_TO_RAS @ self.affine

    def check_grid(self, image: Image) -> None:
        """Refuses an image whose voxels aren't those of the series, in the same order."""
        if image.shape != self.shape or not np.allclose(image.affine, self.affine, atol=GRID_TOLERANCE_MM):
            raise UserError(
                f"{self.name}: its headers describe {self.shape} voxels, the image {image.name} has "
                f"{image.shape} elsewhere: expected one classic series of single-frame slices"
            )


def read_series(folder: str | Path, *, series: str | None = None) -> Series:
    """Reads the headers of the series in a folder.

    Args:
      folder: the files of one series, or of several if `series` is given.
      series: UID of the series to read.

    Raises:
      UserError: pydicom is missing; not a folder with exactly one series of images; no such series; colour,
        several time points, uneven or missing slices, no position or no frame of reference.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: expected a folder with the slices of a DICOM series")
    found: dict[str, list[Any]] = {}
    for header in _headers(folder):
        found.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(header)
    if series is not None:
        if series not in found:
            raise UserError(f"{folder}: has no series {series}; it holds {_listed(found)}")
        slices = found[series]
    elif len(found) == 1:
        (slices,) = found.values()
    else:
        one = "choose one by its UID with --fixed-series or --moving-series"
        advice = one if found else "expected the slices of a CT or an MR"
        raise UserError(f"{folder}: holds {len(found)} DICOM series{_listed(found, ': ')}: {advice}")
    return _ordered(folder, slices)


def _headers(folder: Path) -> list[Any]:
    """Headers of the images among the files of a folder."""
    module = headers.pydicom(folder)
    found = []
    for path in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        try:
            header = module.dcmread(path, stop_before_pixels=True)
        except module.errors.InvalidDicomError:
            continue
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: a DICOM file that can't be read ({error}): copy it again") from None
        if "Rows" in header:
            found.append(header)
    return found


def _listed(found: dict[str, list[Any]], before: str = "") -> str:
    """Series by their UIDs, for messages; descriptions are left out, since they can name people."""
    kinds = [f"{uid} ({one[0].get('Modality', '?')}, {len(one)} files)" for uid, one in sorted(found.items())]
    return before + ", ".join(kinds) if kinds else ""


def _ordered(folder: Path, slices: list[Any]) -> Series:
    first = slices[0]
    if first.get("SamplesPerPixel", 1) != 1:
        raise UserError(
            f"{folder}: colour images ({first.get('PhotometricInterpretation')}); expected grey ones"
        )
    syntax = first.file_meta.get("TransferSyntaxUID", "")
    if syntax.startswith(UNDECODED):
        raise UserError(
            f"{folder}: compressed as {syntax.name}, which needs a decoder: pip install pylibjpeg[all], and "
            "decompress the series by `pydicom decompress`"
        )
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID"):
        if any(not header.get(keyword) for header in slices):
            raise UserError(f"{folder}: slices without {keyword}; expected classic slices, one per file")
    orientation = np.array(first.ImageOrientationPatient, float).reshape(2, 3)
    normal = np.cross(*orientation)
    slices = sorted(slices, key=lambda header: float(normal @ np.array(header.ImagePositionPatient, float)))
    for keyword in ("ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "FrameOfReferenceUID"):
        kinds = Counter(str(header.get(keyword)) for header in slices)
        if len(kinds) > 1:
            raise UserError(
                f"{folder}: slices differ in {keyword} ({', '.join(list(kinds)[:3])}); expected one"
            )
    positions = np.array([header.ImagePositionPatient for header in slices], float)
    affine = np.eye(4)
    column_mm, row_mm = (float(size) for size in first.PixelSpacing)  # between rows, between columns
    affine[:3, 0] = orientation[0] * row_mm
    affine[:3, 1] = orientation[1] * column_mm
    affine[:3, 2] = _step_mm(folder, first, positions, normal)
    affine[:3, 3] = positions[0]
    return Series(tuple(slices), LPS_TO_RAS @ affine, str(folder))


def _step_mm(folder: Path, first: Any, positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """[3], from one slice to the next."""
    if len(positions) == 1:
        return normal * float(first.get("SliceThickness") or 1)
    steps = np.diff(positions, axis=0)
    along_mm = steps @ normal
    if not np.all(along_mm > 0.1 * along_mm.max()):
        repeated = len(positions) / len(np.unique((positions @ normal).round(3)))
        raise UserError(
            f"{folder}: {repeated:.3g} slices at a position: a time series? Expected one time point: put "
            "the files of one into a folder of their own"
        )
    if np.ptp(along_mm) > SLICE_TOLERANCE * np.median(along_mm):
        raise UserError(
            f"{folder}: slices lie {along_mm.min():.4g} to {along_mm.max():.4g} mm apart; expected even "
            "steps: is a slice missing?"
        )
    return (positions[-1] - positions[0]) / (len(positions) - 1)


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
      Datasets in the order of the fixed slices, ready for `headers.write_object`.
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
        if dropped or any(other.get(element.tag) != element for other in series.slices[1:]):
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
    if not fits or 0 < high - low < slope * COARSEST:
        signed, bounds = 0, STORED_RANGE[0]
        common.RescaleIntercept = headers.decimal(low)
        common.RescaleSlope = headers.decimal((high - low or 1) / bounds[1])
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
    made.ImageType = ["DERIVED", "SECONDARY", kinds[2] if len(kinds) > 2 else "OTHER"]
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
