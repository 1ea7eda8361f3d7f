"""Reads and writes NIfTI volumes, and refuses those that can't be registered. NumPy and nibabel.

Axes keep the order of the file: axes 0, 1, 2 of an array are i, j, k of NIfTI.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float, Real, Shaped
from nibabel.openers import ImageOpener

from adregnet_jax.errors import UserError, one_line

FORMS_TOLERANCE_MM = 0.1  # largest distance between corners placed by sform and by qform
PACKED_SUFFIXES = (".gz", ".bz2", ".zst")
LARGEST_EXPANSION = 100  # of a compressed file that expands to more than LARGEST_EXPANDED
LARGEST_EXPANDED = 2**30  # bytes

# Values, voxel -> RAS mm, and the spacing in mm.
Volume = tuple[Shaped[np.ndarray, "x y z"], Float[np.ndarray, "4 4"], Float[np.ndarray, " 3"]]


def read_volume(path: str | Path) -> Volume:
    """Reads a 3-D image.

    Returns:
      values [x, y, z] float32, affine [4, 4] voxel -> RAS mm, spacing_mm [3].

    Raises:
      UserError: the file isn't readable NIfTI or isn't 3-D, `open_image` refuses its header, or values are
        NaN or infinite.
    """
    values, affine, spacing_mm = _read(path)
    return image_values(path, values), affine, spacing_mm


def read_labels(path: str | Path) -> Volume:
    """Reads a 3-D label map as `read_volume` does, but as int32; values must be whole numbers."""
    values, affine, spacing_mm = _read(path)
    return label_values(path, values), affine, spacing_mm


def read_grid(
    path: str | Path,
) -> tuple[tuple[int, int, int], Float[np.ndarray, "4 4"], Float[np.ndarray, " 3"]]:
    """Shape, affine [4, 4] and spacing_mm [3] of a 3-D image, from its header alone."""
    image = open_image(path)
    shape = volume_shape(path, image.shape)
    return shape, image.affine, nib.affines.voxel_sizes(image.affine)


def write_volume(
    path: str | Path, values: Shaped[np.ndarray, "x y z"], affine: Real[np.ndarray, "4 4"]
) -> None:
    """Writes [x, y, z] as NIfTI: floats as float32, whole numbers as int32, bool as uint8."""
    try:
        nib.save(make_image(stored(values), affine), path)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise UserError(
            f"{path}: can't be written ({one_line(error)}): check the name, the folder and the disk"
        ) from None


def make_image(values: Shaped[np.ndarray, "x y z *rest"], affine: Real[np.ndarray, "4 4"]) -> nib.Nifti1Image:
    """A NIfTI image with units of mm."""
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    return image


def stored(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Converts values to the type they are stored with: float32, int32, or uint8 for bool."""
    return values.astype({"f": np.float32, "b": np.uint8}.get(values.dtype.kind, np.int32))


def image_values(path: str | Path, values: np.ndarray) -> np.ndarray:
    """Converts values to float32; refuses NaN and infinity."""
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise UserError(f"{path}: {bad} of {values.size} voxels are NaN or infinite: replace them, e.g. by 0")
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if not np.isfinite(result).all():
        largest = float(np.abs(values).max())
        raise UserError(f"{path}: values go up to {largest:.3g}, beyond float32: rescale them")
    return result


def label_values(path: str | Path, values: np.ndarray) -> np.ndarray:
    """Converts values to int32; refuses fractions."""
    whole = np.isfinite(values) & (values == np.round(values))
    if not whole.all():
        example = values[~whole][0]
        raise UserError(f"{path}: labels must be whole numbers, found {example:g}: is this an image?")
    low, high = float(values.min()), float(values.max())
    if low < -(2**31) or high >= 2**31:
        raise UserError(f"{path}: labels go from {low:g} to {high:g}, beyond 2^31: is this an image?")
    return values.astype(np.int32)


def volume_shape(path: str | Path, shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape without trailing axes of size 1; refuses all but 3-D volumes."""
    found = tuple(int(n) for n in shape)
    while len(found) > 3 and found[-1] == 1:
        found = found[:-1]
    if len(found) > 3:
        raise UserError(
            f"{path}: shape is {found}; expected one 3-D volume: save one time point as its own file"
        )
    if len(found) < 3 or min(found) < 2:
        raise UserError(
            f"{path}: shape is {found}; expected a 3-D volume of at least 2 voxels along each axis"
        )
    return found[0], found[1], found[2]


def open_image(path: str | Path) -> Any:
    """Opens a NIfTI image of any shape without reading its voxels.

    Raises:
      UserError: not a NIfTI file, voxels that aren't real numbers, zero spacing, an affine that can't be
        inverted, units other than mm, or sform and qform that disagree.
    """
    header = _raw_header(path)
    if not np.all(np.isfinite(header["pixdim"][1:4]) & (header["pixdim"][1:4] != 0)):
        found = " x ".join(f"{size:g}" for size in header["pixdim"][1:4])
        raise UserError(f"{path}: spacing is {found} mm; expected numbers above 0: fix the file's header")
    units = int(header["xyzt_units"]) & 7  # the other bits are the unit of time
    if units not in (0, 2):  # unknown, or mm
        name = {1: "metres", 3: "micrometres"}.get(units, f"unknown (code {units})")
        raise UserError(f"{path}: units are {name}; expected mm: rescale the affine and set the units to mm")
    try:
        image: Any = nib.load(path)  # nibabel types it as an image without voxels
        forms = [form for form, code in _coded_forms(image) if code > 0]
    except (
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        OSError,
        ValueError,  # a quaternion that isn't a rotation
        OverflowError,  # an infinite offset of the voxels
    ) as error:
        raise UserError(
            f"{path}: not a NIfTI image that can be read ({one_line(error)}): copy it again, or convert it"
        ) from None
    if image.get_data_dtype().kind not in "biuf":
        raise UserError(f"{path}: voxels are {image.get_data_dtype()}; expected one real number each")
    check_affine(path, image.affine)
    if len(forms) == 2:
        corners = np.array(list(itertools.product(*((0, n - 1) for n in (*image.shape, 1, 1)[:3]))))
        apart_mm = nib.affines.apply_affine(forms[0], corners) - nib.affines.apply_affine(forms[1], corners)
        worst_mm = np.linalg.norm(apart_mm, axis=1).max()
        if not worst_mm <= FORMS_TOLERANCE_MM:
            raise UserError(
                f"{path}: sform and qform disagree by up to {worst_mm:.3g} mm: find out which one is right "
                "and set the code of the other to 0"
            )
    return image


def check_affine(path: str | Path, affine: Real[np.ndarray, "4 4"]) -> None:
    """Refuses a matrix [4, 4] that isn't affine, isn't finite, or can't be inverted."""
    if not np.isfinite(affine).all():
        raise UserError(f"{path}: the affine has numbers that are NaN or infinite: fix the file's header")
    if not np.allclose(affine[3], [0, 0, 0, 1]):
        raise UserError(
            f"{path}: the last row of the affine is {affine[3]}; expected 0 0 0 1: write it again"
        )
    spacing_mm = nib.affines.voxel_sizes(affine)
    if not np.all(spacing_mm > 0):
        raise UserError(f"{path}: the affine has a spacing of {spacing_mm} mm: fix the file's header")
    if not abs(np.linalg.det(affine[:3, :3] / spacing_mm)) > 1e-3:
        raise UserError(f"{path}: two axes of the affine are parallel: fix the file's header")


def voxels(path: str | Path, image: Any) -> np.ndarray:
    """Reads the scaled values of an opened image, in its own shape; refuses damaged files and zip bombs."""
    size = math.prod(image.shape) * image.get_data_dtype().itemsize
    try:
        file = Path(image.file_map["image"].filename)
        stored_bytes = file.stat().st_size
        if file.name.lower().endswith(PACKED_SUFFIXES):
            check_expansion(path, stored_bytes, size)
        elif size > stored_bytes:  # found before memory is allocated
            raise EOFError(f"its header declares {size} bytes, it has {stored_bytes}")
        return np.asanyarray(image.dataobj)
    except MemoryError:
        raise UserError(f"{path}: needs more memory than available: resample it to larger voxels") from None
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise UserError(
            f"{path}: damaged or cut off ({one_line(error)}): copy or download it again"
        ) from None


def check_expansion(path: str | Path, stored_bytes: int, expanded_bytes: int) -> None:
    """Refuses a small compressed file that would fill the memory: it is damaged or malicious."""
    if expanded_bytes > max(LARGEST_EXPANDED, LARGEST_EXPANSION * stored_bytes):
        raise UserError(
            f"{path}: expands from {stored_bytes / 2**20:.3g} MiB to {expanded_bytes / 2**30:.3g} GiB, by its"
            " header; expected a scan: copy it again, or store it uncompressed if it is one"
        )


def _read(path: str | Path) -> Volume:
    image = open_image(path)
    shape = volume_shape(path, image.shape)
    return voxels(path, image).reshape(shape), image.affine, nib.affines.voxel_sizes(image.affine)


def _coded_forms(image: Any) -> list[tuple[np.ndarray, int]]:
    header = image.header
    return [(header.get_sform(), int(header["sform_code"])), (header.get_qform(), int(header["qform_code"]))]


def _raw_header(path: str | Path) -> nib.Nifti1Header:
    """The header as stored: when it loads an image, nibabel silently turns a spacing of 0 into 1 mm."""
    try:
        with ImageOpener(str(path)) as file:
            block = file.read(540)  # bytes of a NIfTI-2 header, the longer one
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: a null byte in the name
        raise UserError(f"{path}: can't be read ({one_line(error)}): copy or download it again") from None
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if kind.may_contain_header(block):  # without the extensions that may follow
            return kind(block[: kind.template_dtype.itemsize], check=False)
    raise UserError(f"{path}: not a NIfTI file; expected .nii or .nii.gz: convert it first")
