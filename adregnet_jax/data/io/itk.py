"""Images between NumPy and SimpleITK, and checks of MetaImage files that ITK lacks.

SimpleITK is an extra: `pip install 'adregnet-jax[itk]'`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np

from adregnet_jax.data.io import nifti
from adregnet_jax.errors import UserError

METAIMAGE_SUFFIXES = (".mha", ".mhd")
# Bytes per voxel; MET_LONG is missing because its size depends on the platform.
METAIMAGE_BYTES = {"MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2}
METAIMAGE_BYTES |= {"MET_INT": 4, "MET_UINT": 4, "MET_FLOAT": 4, "MET_DOUBLE": 8}
METAIMAGE_FIELD = re.compile("([^=:]*)[=:]?(.*)", re.DOTALL)  # matches any line
LONGEST_LINE = 2**16  # bytes, in the header of a MetaImage
BLOCK_BYTES = 2**20
UNITS_KEY = "ITK_VoxelUnits"
MILLIMETRES = {"", "?", "mm", "millimeter", "millimetre", "millimeters", "millimetres"}
# NRRD has names and abbreviations for each.
ANATOMICAL_SPACES = {
    "right-anterior-superior", "ras", "left-anterior-superior", "las", "left-posterior-superior", "lps",
}  # fmt: skip
# ITK counts towards left, posterior, superior; nibabel towards right, anterior, superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@contextlib.contextmanager
def itk_errors_as_os_errors() -> Iterator[None]:
    """Turns SimpleITK's `RuntimeError`, raised for any cause, into the `OSError` that other writers raise."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(last_line(error)) from error


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


def read_itk_file(path: Path) -> Any:
    """The SimpleITK image in a MetaImage or NRRD file, of any dimension and any kind of voxel.

    Raises:
      UserError: SimpleITK is missing, or the file is damaged.
    """
    itk = simpleitk(path)
    if path.suffix.lower() in METAIMAGE_SUFFIXES:
        _check_metaimage(path)
    try:
        image = itk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not an image that can be read ({last_line(error)})") from None
    if path.suffix.lower() in METAIMAGE_SUFFIXES:
        units = {image.GetMetaData(UNITS_KEY)} if image.HasMetaDataKey(UNITS_KEY) else set()
    else:
        units = _check_nrrd(path)
    if others := {unit.strip().lower() for unit in units} - MILLIMETRES:
        raise UserError(
            f"{path}: units are {', '.join(sorted(others))}; expected mm: rescale its geometry, and set the "
            "units to mm"
        )
    return image


def _check_nrrd(path: Path) -> set[str]:
    """The units of a NRRD file, which ITK ignores; warns if it doesn't say where it lies."""
    with path.open("rb") as file:
        lines = itertools.takewhile(bytes.strip, iter(lambda: file.readline(LONGEST_LINE), b""))
        header = [line.decode("latin-1").strip() for line in lines]
    fields = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in header)}
    space = fields.get("space", "")
    if space.lower() not in ANATOMICAL_SPACES or "space origin" not in fields:
        warnings.warn(
            f"{path}: its header doesn't say where it lies (space: {space or 'none'}): it is placed as by "
            "ITK, whose axes point to the left, posterior and superior",
            stacklevel=2,
        )
    return set(re.findall('"([^"]+)"', fields.get("space units", "") or fields.get("units", "")))


def is_vector_image(image: Any) -> bool:
    """Whether the voxels of a SimpleITK image are vectors of three fractions, and not colours."""
    kind = image.GetPixelIDTypeAsString()
    return image.GetNumberOfComponentsPerPixel() == 3 and "float" in kind and "vector" in kind


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


def last_line(error: Exception) -> str:
    """The last line of a message of SimpleITK, which starts with names of its source files."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
