"""Images with their position in the world: NIfTI by nibabel; MetaImage, NRRD, DICOM by SimpleITK. NumPy only.

SimpleITK is an extra: `pip install 'adregnet-jax[itk]'`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped

from adregnet_jax.atomic import new_file
from adregnet_jax.data.io import nifti
from adregnet_jax.errors import UserError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")
METAIMAGE_SUFFIXES = (".mha", ".mhd")
# Bytes per voxel; MET_LONG is missing because its size depends on the platform.
METAIMAGE_BYTES = {"MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2}
METAIMAGE_BYTES |= {"MET_INT": 4, "MET_UINT": 4, "MET_FLOAT": 4, "MET_DOUBLE": 8}
METAIMAGE_FIELD = re.compile("([^=:]*)[=:]?(.*)", re.DOTALL)  # matches any line
LONGEST_LINE = 2**16  # bytes, in the header of a MetaImage
BLOCK_BYTES = 2**20
SINGLE_FILE_SUFFIXES = (*NIFTI_SUFFIXES, ".mha", ".nrrd")  # can be written under one name at once
# ITK counts towards left, posterior, superior; nibabel towards right, anterior, superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SLICE_TOLERANCE = 0.05  # of the distance between DICOM slices


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A scan or a label map, with its position in the world.

    Attributes:
      values: [x, y, z], in the index order of the file.
      affine: [4, 4] voxel -> RAS mm.
      name: used in messages.

    Raises:
      ValueError: wrong shapes.
    """

    values: Shaped[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]
    name: str = "image"

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or self.affine.shape != (4, 4):
            raise ValueError(
                f"{self.name}: expected values [x, y, z] and an affine [4, 4], "
                f"got {self.values.shape} and {self.affine.shape}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.values.shape
        return x, y, z

    @property
    def spacing_mm(self) -> Float[np.ndarray, " 3"]:
        """The distance between neighbouring voxels along each axis."""
        return nib.affines.voxel_sizes(self.affine)


def read_image(path: str | Path, *, labels: bool = False) -> Image:
    """Reads a 3-D image: NIfTI, MetaImage (.mha, .mhd), NRRD, or a folder with one DICOM series.

    Args:
      path: the file or the folder.
      labels: True for label maps.

    Returns:
      The image with float32 values, or int32 for labels.

    Raises:
      UserError: SimpleITK is needed but missing, the file can't be read or isn't one 3-D volume in mm, values
        are NaN or infinite, labels are not whole numbers, sform and qform disagree, the affine can't be
        inverted, or a DICOM folder holds several series or lacks slices.
    """
    path = Path(path)
    if path.is_dir() or path.name.lower().endswith(ITK_SUFFIXES):
        values, affine = _read_itk(path)
        values = nifti.label_values(path, values) if labels else nifti.image_values(path, values)
    else:
        values, affine, _ = nifti.read_labels(path) if labels else nifti.read_volume(path)
    return Image(values, affine, str(path))


def write_image(path: str | Path, image: Image, *, overwrite: bool = False) -> None:
    """Writes NIfTI, .mha or .nrrd: floats as float32, whole numbers as int32, bool as uint8.

    Args:
      path: its suffix determines the format.
      image: the values and their position in the world.
      overwrite: replace a file that is there.

    Raises:
      UserError: unknown suffix, SimpleITK is needed but missing, the file exists, or it can't be written.
    """
    path = Path(path)
    if not path.name.endswith(SINGLE_FILE_SUFFIXES):
        raise UserError(f"{path}: can't write this kind; expected one of {', '.join(SINGLE_FILE_SUFFIXES)}")
    if path.name.endswith(NIFTI_SUFFIXES):
        with new_file(path, overwrite=overwrite) as temporary:
            nib.save(nifti.make_image(nifti.stored(image.values), image.affine), temporary)
        return
    itk_image = to_itk(path, nifti.stored(image.values), image.affine)
    with new_file(path, overwrite=overwrite) as temporary, itk_errors_as_os_errors():
        simpleitk(path).WriteImage(itk_image, str(temporary), useCompression=True)


@contextlib.contextmanager
def itk_errors_as_os_errors() -> Iterator[None]:
    """Turns SimpleITK's `RuntimeError`, raised for any cause, into the `OSError` that other writers raise."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(_last_line(error)) from error


def simpleitk(path: Path) -> Any:
    """The module SimpleITK; if it is missing, a UserError explains how to install it."""
    try:
        import SimpleITK
    except ImportError:
        raise UserError(f"{path}: this needs SimpleITK: pip install 'adregnet-jax[itk]'") from None
    SimpleITK.ProcessObject.GlobalWarningDisplayOff()  # errors are raised and reported in one line
    return SimpleITK


def to_itk(path: Path, values: np.ndarray, affine: np.ndarray) -> Any:
    """A SimpleITK image of [x, y, z], or of vectors from [x, y, z, c]."""
    spacing_mm = nib.affines.voxel_sizes(affine)
    lps = LPS_TO_RAS @ affine
    channels = range(3, values.ndim)
    image = simpleitk(path).GetImageFromArray(values.transpose(2, 1, 0, *channels), isVector=values.ndim == 4)
    image.SetSpacing(spacing_mm.tolist())
    image.SetDirection((lps[:3, :3] / spacing_mm).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def from_itk(path: Path, image: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values [x, y, z] or [x, y, z, c], and affine [4, 4] voxel -> RAS mm, of a 3-D SimpleITK image."""
    values = simpleitk(path).GetArrayFromImage(image)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return values.transpose(2, 1, 0, *range(3, values.ndim)), LPS_TO_RAS @ affine


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    itk = simpleitk(path)
    if path.suffix.lower() in METAIMAGE_SUFFIXES:
        _check_metaimage(path)
    try:
        image = _read_series(path, itk) if path.is_dir() else itk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not an image that can be read ({_last_line(error)})") from None
    nifti.volume_shape(path, image.GetSize())
    while image.GetDimension() > 3:
        image = image[(..., 0)]
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise UserError(f"{path}: voxels are {image.GetPixelIDTypeAsString()}; expected one real number each")
    values, affine = from_itk(path, image)
    nifti.check_affine(path, affine)
    return values, affine


def _check_metaimage(path: Path) -> None:
    """Refuses files on which ITK would hang or write out of bounds.

    These have an impossible number of axes, no voxels, or compressed voxels that are damaged or don't match
    the number in the header.
    """
    try:
        with path.open("rb") as file:
            fields = {}
            for line in iter(lambda: file.readline(LONGEST_LINE), b""):
                name, value = METAIMAGE_FIELD.fullmatch(line.decode("latin-1")).groups()  # type: ignore[union-attr]
                fields[name.strip()] = value.strip()
                if name.strip() == "ElementDataFile":
                    break
            if not re.fullmatch("[1-9]", axes := fields.get("NDims", "none")):
                raise UserError(f"{path}: not an image that can be read (NDims is {axes}; expected 3)")
            place = fields.get("ElementDataFile", "")
            voxel_file = path.parent / place
            elsewhere = place.upper() != "LOCAL" and not re.fullmatch(
                r"LIST( \d+D?)?|\S*%\d*d\S*( \d+)*", place
            )
            if elsewhere and not voxel_file.is_file():
                where = f"its voxels are in {place[:60]!r}, which doesn't exist"
                raise UserError(f"{path}: not an image that can be read ({where})")
            if fields.get("CompressedData", "").lower()[:1] not in ("t", "1"):
                return
            if place.upper() == "LOCAL":
                found = _expanded_bytes(path, file)
            elif voxel_file.is_file():
                with voxel_file.open("rb") as voxels:
                    found = _expanded_bytes(path, voxels)
            else:
                return
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}): check the file") from None
    sizes = [int(size) for size in fields.get("DimSize", "").split() if size.isdecimal()]
    each = METAIMAGE_BYTES.get(fields.get("ElementType", ""))
    channels = fields.get("ElementNumberOfChannels", "1")
    if len(sizes) != int(axes) or not channels.isdecimal():
        shape = fields.get("DimSize", "not there")
        raise UserError(f"{path}: not an image that can be read (DimSize is {shape})")
    if each and found != (declared := math.prod(sizes) * each * int(channels)):
        raise UserError(
            f"{path}: its header declares {declared} bytes, its voxels are {found}: copy or download it again"
        )


def _expanded_bytes(path: Path, file: BinaryIO) -> int:
    """Size of the rest of a file after decompression; the data are not kept."""
    start = file.tell()
    stored_bytes = file.seek(0, os.SEEK_END) - start
    file.seek(start)
    stream, expanded_bytes = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32), 0  # zlib or gzip
    try:
        while not stream.eof and (block := stream.unconsumed_tail or file.read(BLOCK_BYTES)):
            expanded_bytes += len(stream.decompress(block, BLOCK_BYTES))
            nifti.check_expansion(path, stored_bytes, expanded_bytes)
        expanded_bytes += len(stream.flush())
        if not stream.eof:
            raise zlib.error("it ends too early")
    except zlib.error as error:
        raise UserError(
            f"{path}: its voxels can't be expanded ({error}): copy or download it again"
        ) from None
    return expanded_bytes


def _read_series(path: Path, itk: Any) -> Any:
    series = itk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if len(series) != 1:
        raise UserError(f"{path}: holds {len(series)} DICOM series; expected the files of a single scan")
    reader = itk.ImageSeriesReader()
    reader.SetFileNames(itk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0]))
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    slices = len(reader.GetFileNames())
    if slices > 2:  # ITK spaces the slices evenly, wherever they were
        positions = [reader.GetMetaData(k, "0020|0032").split("\\") for k in range(slices)]
        steps = np.diff(np.array(positions, float), axis=0)
        steps_mm = np.linalg.norm(steps, axis=1)
        normal = np.reshape(image.GetDirection(), (3, 3))[:, 2]
        aside_mm = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1).max()
        if aside_mm > SLICE_TOLERANCE * np.median(steps_mm):  # ITK would ignore the tilt
            raise UserError(
                f"{path}: each slice is shifted {aside_mm:.3g} mm sideways from the previous one (tilted "
                "gantry); expected aligned slices: resample the series first"
            )
        if not steps_mm.min() > 0 or np.ptp(steps_mm) > SLICE_TOLERANCE * np.median(steps_mm):
            raise UserError(
                f"{path}: slices lie {steps_mm.min():.4g} to {steps_mm.max():.4g} mm apart; expected even "
                "steps: is a slice missing, or are there several time points?"
            )
    return image


def _last_line(error: Exception) -> str:
    """The last line of a message of SimpleITK, which starts with names of its source files."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
