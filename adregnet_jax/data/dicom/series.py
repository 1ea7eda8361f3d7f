"""The headers of a series of DICOM slices, and the grid that they describe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from adregnet_jax.data.dicom import files
from adregnet_jax.data.io.dicom import check_alike
from adregnet_jax.data.io.images import Image
from adregnet_jax.data.io.itk import LPS_TO_RAS
from adregnet_jax.errors import UserError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

SLICE_TOLERANCE = 0.05  # of the distance between slices
GRID_TOLERANCE_MM = 0.01  # between the grid of an image and that of its headers
# High-throughput JPEG 2000 and JPEG XL, which GDCM does not decode.
UNDECODED = ("1.2.840.10008.1.2.4.20", "1.2.840.10008.1.2.4.11")


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
    module = files.pydicom(folder)
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
    for keyword in ("Rows", "Columns", "FrameOfReferenceUID"):
        kinds = Counter(str(header.get(keyword)) for header in slices)
        if len(kinds) > 1:
            raise UserError(
                f"{folder}: slices differ in {keyword} ({', '.join(list(kinds)[:3])}); expected one"
            )
    turns, spacings = (
        np.array([header[keyword].value for header in slices], float)
        for keyword in ("ImageOrientationPatient", "PixelSpacing")
    )
    check_alike(folder, turns, spacings)
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
