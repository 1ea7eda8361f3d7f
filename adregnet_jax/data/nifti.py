"""NIfTI volumes in and out, with what can't be registered refused at the door. NumPy and nibabel.

Axes stay as they are in the file: axis 0, 1, 2 of an array are the NIfTI i, j, k.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.openers import ImageOpener

from adregnet_jax.errors import UserError


def read_volume(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a 3-D image.

    Returns:
      values [x, y, z] float32, affine [4, 4] voxel -> RAS mm, spacing_mm [3].

    Raises:
      UserError: not a readable NIfTI file, not 3-D, zero spacing, or values that are NaN or infinite.
    """
    values, affine, spacing_mm = _read(path)
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise UserError(f"{path}: {bad} of {values.size} voxels are NaN or infinite: replace them, e.g. by 0")
    return values.astype(np.float32), affine, spacing_mm


def read_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a 3-D label map: as `read_volume`, with values [x, y, z] int32 that have to be whole numbers."""
    values, affine, spacing_mm = _read(path)
    whole = np.isfinite(values) & (values == np.round(values))
    if not whole.all():
        example = values[~whole][0]
        raise UserError(f"{path}: labels have to be whole numbers, found {example:g}: is this an image?")
    return values.astype(np.int32), affine, spacing_mm


def read_grid(path: str | Path) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """Shape, affine [4, 4] and spacing_mm [3] of a 3-D image, from its header alone."""
    image, shape = _open(path)
    return shape, image.affine, nib.affines.voxel_sizes(image.affine)


def write_volume(path: str | Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Writes [x, y, z] as NIfTI: floats as float32, whole numbers as int32, bool as uint8."""
    dtype = {"f": np.float32, "b": np.uint8}.get(values.dtype.kind, np.int32)
    image = nib.Nifti1Image(values.astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    try:
        nib.save(image, path)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise UserError(
            f"{path}: can't be written ({_one_line(error)}): check the name, the folder and the disk"
        ) from None


def _read(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    image, shape = _open(path)
    try:
        values = np.asanyarray(image.dataobj).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(
            f"{path}: damaged or cut off ({_one_line(error)}): copy or download it again"
        ) from None
    return values, image.affine, nib.affines.voxel_sizes(image.affine)


def _open(path: str | Path) -> tuple[nib.Nifti1Image, tuple[int, int, int]]:
    """The image, its voxels still on disk, and its shape without trailing axes of one."""
    header = _raw_header(path)
    if not np.all(np.isfinite(header["pixdim"][1:4]) & (header["pixdim"][1:4] != 0)):
        found = " x ".join(f"{size:g}" for size in header["pixdim"][1:4])
        raise UserError(f"{path}: spacing is {found} mm; expected numbers above 0: mend the file's header")
    try:
        image: Any = nib.load(path)  # nibabel types it as an image without voxels
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError) as error:
        raise UserError(f"{path}: not a NIfTI image that can be read ({_one_line(error)})") from None
    if image.get_data_dtype().kind not in "biuf":
        raise UserError(f"{path}: voxels are {image.get_data_dtype()}; expected one real number each")
    spacing_mm = nib.affines.voxel_sizes(image.affine)
    if not np.all(spacing_mm > 0):
        raise UserError(f"{path}: the affine has a spacing of {spacing_mm} mm: mend the file's header")

    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise UserError(
            f"{path}: shape is {shape}; expected one 3-D volume: save one time point as its own file"
        )
    if len(shape) < 3 or min(shape) < 2:
        raise UserError(
            f"{path}: shape is {shape}; expected a 3-D volume of at least 2 voxels along each axis"
        )
    return image, (shape[0], shape[1], shape[2])


def _raw_header(path: str | Path) -> nib.Nifti1Header:
    """The header as it is in the file: on loading, nibabel mends a spacing of zero to 1 mm by itself."""
    try:
        with ImageOpener(str(path)) as file:
            block = file.read(540)  # bytes of a NIfTI-2 header, the longer one
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: can't be read ({_one_line(error)}): copy or download it again") from None
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(block):
            return kind.from_fileobj(io.BytesIO(block), check=False)
    raise UserError(f"{path}: not a NIfTI file; expected .nii or .nii.gz: convert it first")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
