"""Reads and writes NIfTI and MGH volumes, and refuses those that can't be registered. NumPy and nibabel.

Axes keep the order of the file: axes 0, 1, 2 of an array are i, j, k of NIfTI.
"""

from __future__ import annotations

import itertools
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from isal import igzip
from jaxtyping import Float, Real, Shaped
from nibabel.openers import ImageOpener

from adregnet_jax.errors import UserError, one_line

Prefer = Literal["sform", "qform"]
FORMS_TOLERANCE = 0.05  # voxels: largest distance between corners placed by sform and by qform
LABEL_TOLERANCE = 1e-3  # rounding of labels in files without scaling
LARGEST_ROUNDING = 0.499  # in scaled files: halves stay ambiguous
SHEAR_TOLERANCE = 2e-4  # largest cosine between axes that ITK takes for perpendicular
MGH_SUFFIXES = (".mgz", ".mgh")
PACKED_SUFFIXES = (".gz", ".bz2", ".zst", ".mgz")
LARGEST_EXPANSION = 100  # of a compressed file that expands to more than LARGEST_EXPANDED
LARGEST_EXPANDED = 2**30  # bytes
GZIP_LEVEL = 1  # nibabel's, too

# Values, voxel -> RAS mm, and the spacing in mm.
Volume = tuple[Shaped[np.ndarray, "x y z"], Float[np.ndarray, "4 4"], Float[np.ndarray, " 3"]]


def read_volume(path: str | Path, *, prefer: Prefer | None = None, exact: bool = False) -> Volume:
    """Reads a 3-D image.

    Args:
      path: NIfTI, or FreeSurfer's .mgz or .mgh.
      prefer: the form that places an image whose sform and qform disagree.
      exact: keep whole numbers in the type they are stored in, where float32 would round those above 2^24.

    Returns:
      values [x, y, z] float32, affine [4, 4] voxel -> RAS mm, spacing_mm [3].

    Raises:
      UserError: the file isn't readable NIfTI or isn't 3-D, `open_image` refuses its header, or values are
        NaN or infinite.
    """
    image = open_image(path, prefer=prefer)
    values = _volume_voxels(path, image)
    return (
        image_values(path, values, exact=exact),
        image.affine,
        nib.affines.voxel_sizes(image.affine),
    )


def read_labels(path: str | Path, *, prefer: Prefer | None = None) -> Volume:
    """Reads a 3-D label map as `read_volume` does, but as int32, or int64 where labels exceed 2^31.

    Values must be whole numbers, apart from rounding in the file's scaling.
    """
    image = open_image(path, prefer=prefer)
    values = label_values(path, _volume_voxels(path, image), slope=_slope(image))
    return values, image.affine, nib.affines.voxel_sizes(image.affine)


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
    """Writes [x, y, z] as NIfTI or MGH: floats as float32, whole numbers as int32 or wider, bool as uint8."""
    try:
        save(make_image(stored(values), affine, path=path), path)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise UserError(
            f"{path}: can't be written ({one_line(error)}): check the name, the folder and the disk"
        ) from None


def make_image(
    values: Shaped[np.ndarray, "x y z *rest"], affine: Real[np.ndarray, "4 4"], *, path: str | Path = ""
) -> Any:
    """A NIfTI image with units of mm; an MGH image, where the name of the file asks for it."""
    if str(path).endswith(MGH_SUFFIXES):
        return nib.MGHImage(values, affine)
    if is_sheared(affine):
        warnings.warn(
            "the axes of the grid aren't perpendicular: ITK, ANTs and 3D Slicer can't read it as NIfTI, but "
            "as .mha, .nrrd and .h5",
            stacklevel=2,
        )
    image = nib.Nifti1Image(values, affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    return image


def save(image: Any, path: str | Path) -> None:
    """`nibabel.save`, but compressed by ISA-L: zlib takes ten seconds for a field of 400 MB."""
    if not str(path).endswith(".nii.gz"):
        nib.save(image, path)
        return
    # Without a name and a time, so that equal images make equal files.
    with Path(path).open("wb") as file, igzip.IGzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed:
        image.to_file_map({"image": nib.FileHolder(fileobj=packed)})


def stored(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Converts values to the type they are stored with: float32, uint8 for bool, int32 or int64."""
    kind = values.dtype.kind
    if kind in "fb":
        return values.astype(np.float32 if kind == "f" else np.uint8)
    return values.astype(np.int32 if _within_int32(values) else np.int64)


def _within_int32(values: np.ndarray) -> bool:
    return values.size == 0 or (int(values.min()) >= -(2**31) and int(values.max()) < 2**31)


def image_values(path: str | Path, values: np.ndarray, *, exact: bool = False) -> np.ndarray:
    """Converts values to float32; refuses NaN and infinity.

    With `exact`, whole numbers stay as they are if float32 would round them, as do integers of any size.
    """
    if exact and values.dtype.kind in "iu":
        return values
    bad = values.size - np.count_nonzero(np.isfinite(values))
    if bad:
        raise UserError(f"{path}: {bad} of {values.size} voxels are NaN or infinite: replace them, e.g. by 0")
    if values.dtype == np.float32 and not isinstance(values, np.memmap):
        return values
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if not np.isfinite(result).all():
        largest = float(np.abs(values).max())
        raise UserError(f"{path}: values go up to {largest:.3g}, beyond float32: rescale them")
    if exact and not np.array_equal(result, values) and np.array_equal(values, np.round(values)):
        return values
    return result


def label_values(path: str | Path, values: np.ndarray, *, slope: float = 1.0) -> np.ndarray:
    """Converts values to int32, or to int64 where whole numbers exceed 2^31; refuses fractions.

    Values next to a whole number are rounded: within half a `slope`, by which the file scales its numbers,
    or within `LABEL_TOLERANCE` in a file without scaling.
    """
    if values.dtype.kind in "iub":
        if int(values.max()) >= 2**63:
            raise UserError(f"{path}: labels go up to {values.max()}, beyond 2^63: is this an image?")
        return values.astype(np.int32 if _within_int32(values) else np.int64)
    scaled = slope not in (0, 1) and math.isfinite(slope)
    # Half a slope, which the slope's own rounding may exceed.
    tolerance = min(0.501 * abs(slope), LARGEST_ROUNDING) if scaled else LABEL_TOLERANCE
    with np.errstate(invalid="ignore"):
        rounded = np.round(values)
        whole = np.isfinite(values) & (np.abs(values - rounded) <= tolerance)
    scaling = f" (its voxels are scaled by {slope:.6g})" if scaled else ""
    if not whole.all():
        example = values[~whole][0]
        raise UserError(
            f"{path}: labels must be whole numbers, found {example:g}{scaling}: is this an image?"
        )
    low, high = float(rounded.min()), float(rounded.max())
    if low < -(2**31) or high >= 2**31:
        raise UserError(f"{path}: labels go from {low:g} to {high:g}, beyond 2^31: is this an image?")
    return rounded.astype(np.int32)


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


def open_image(path: str | Path, *, prefer: Prefer | None = None) -> Any:
    """Opens a NIfTI or MGH image of any shape without reading its voxels.

    An image whose sform and qform disagree lies where ITK puts it, with a warning, unless `prefer` names the
    form. One that has neither lies where ITK puts it, too: at the origin, along left, posterior, superior.

    Raises:
      UserError: not such a file, voxels that aren't real numbers, zero spacing, an affine that can't be
        inverted, units other than mm, or sform and qform that describe different orientations.
    """
    if str(path).lower().endswith(MGH_SUFFIXES):
        image = _load(path)
        check_affine(path, image.affine)
        return image
    header = _raw_header(path)
    if not np.all(np.isfinite(header["pixdim"][1:4]) & (header["pixdim"][1:4] != 0)):
        found = " x ".join(f"{size:g}" for size in header["pixdim"][1:4])
        raise UserError(f"{path}: spacing is {found} mm; expected numbers above 0: fix the file's header")
    units = int(header["xyzt_units"]) & 7  # the other bits are the unit of time
    if units not in (0, 2):  # unknown, or mm
        name = {1: "metres", 3: "micrometres"}.get(units, f"unknown (code {units})")
        raise UserError(f"{path}: units are {name}; expected mm: rescale the affine and set the units to mm")
    image = _load(path)
    affine = _placement(path, image, prefer)
    check_affine(path, affine)
    if not np.array_equal(affine, image.affine):
        files = image.file_map
        image = type(image)(image.dataobj, affine, image.header)
        image.file_map = files
    return image


def _load(path: str | Path) -> Any:
    try:
        image: Any  # nibabel types it as an image without voxels
        if str(path).lower().endswith(".mgh"):
            with warnings.catch_warnings():  # which makes Python repeat warnings that it has shown
                warnings.simplefilter("ignore", ResourceWarning)  # nibabel doesn't close these files
                image = nib.load(path)
        else:
            image = nib.load(path)
        if isinstance(image, nib.Nifti1Image):
            _forms(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        OSError,
        EOFError,
        TypeError,  # an MGH header that is cut off
        zlib.error,
        ValueError,  # a quaternion that isn't a rotation
        OverflowError,  # an infinite offset of the voxels
    ) as error:
        kind = "an MGH" if str(path).lower().endswith(MGH_SUFFIXES) else "a NIfTI"
        raise UserError(
            f"{path}: not {kind} image that can be read ({one_line(error)}): copy it again, or convert it"
        ) from None
    if not isinstance(image, nib.Nifti1Pair | nib.MGHImage):
        kind = type(image).__name__.removesuffix("Image")
        raise UserError(f"{path}: holds {kind} data; expected a 3-D image")
    if image.get_data_dtype().kind not in "biuf":
        raise UserError(f"{path}: voxels are {image.get_data_dtype()}; expected one real number each")
    return image


def _forms(image: Any) -> dict[Prefer, tuple[np.ndarray, int]]:
    """The forms in force, with their codes."""
    header = image.header
    forms: dict[Prefer, tuple[np.ndarray, int]] = {
        "sform": (header.get_sform(), int(header["sform_code"])),
        "qform": (header.get_qform(), int(header["qform_code"])),
    }
    return {name: form for name, form in forms.items() if form[1] > 0}


def _placement(path: str | Path, image: Any, prefer: Prefer | None) -> np.ndarray:
    """voxel -> RAS mm by the form that ITK would take, unless the two agree or `prefer` names one."""
    forms = _forms(image)
    if not forms:
        spacing_mm = np.abs(image.header["pixdim"][1:4]).astype(float)
        warnings.warn(
            f"{path}: its header doesn't say where it lies (no sform, no qform): it is placed as by ITK, with"
            " its first voxel at the origin and its axes towards left, posterior, superior",
            stacklevel=2,
        )
        return np.diag([-1.0, -1.0, 1.0, 1.0]) * [*spacing_mm, 1.0]
    if len(forms) == 1:
        return image.affine
    (sform, sform_code), (qform, _) = forms["sform"], forms["qform"]
    check_affine(path, sform)
    worst_mm = corners_apart_mm(image.shape, sform, qform)
    if worst_mm <= FORMS_TOLERANCE * nib.affines.voxel_sizes(sform).min():
        return sform
    if prefer:
        return forms[prefer][0]
    check_affine(path, qform)
    axes = ["".join(nib.aff2axcodes(form)) for form in (sform, qform)]
    if axes[0] != axes[1]:
        raise UserError(
            f"{path}: sform and qform disagree by {worst_mm:.3g} mm and describe different orientations, "
            f'{axes[0]} and {axes[1]}: name the right one, prefer="sform" or prefer="qform"'
        )
    # ITK takes an sform only if its axes are perpendicular and it says that it is the scanner's.
    taken: Prefer = "sform" if sform_code == 1 and not is_sheared(sform) else "qform"
    other = "sform" if taken == "qform" else "qform"
    warnings.warn(
        f"{path}: sform and qform disagree by up to {worst_mm:.3g} mm: the {taken} is taken, as by ITK; for"
        f' the other one, prefer="{other}"',
        stacklevel=2,
    )
    return forms[taken][0]


def corners_apart_mm(
    shape: Sequence[int], affine: Real[np.ndarray, "4 4"], other: Real[np.ndarray, "4 4"]
) -> float:
    """The largest distance between the corner voxels of a grid [x, y, z, ...] placed by two affines."""
    corners = np.array(list(itertools.product(*((0, n - 1) for n in (*shape, 1, 1)[:3]))))
    apart_mm = nib.affines.apply_affine(affine, corners) - nib.affines.apply_affine(other, corners)
    return float(np.linalg.norm(apart_mm, axis=1).max())


def is_sheared(affine: Real[np.ndarray, "4 4"]) -> bool:
    """Whether the axes of a grid aren't perpendicular, so that ITK can't read it as NIfTI."""
    directions = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    return bool(np.abs(directions.T @ directions - np.eye(3)).max() > SHEAR_TOLERANCE)


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
    size = math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
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
    except (OSError, EOFError, ValueError, TypeError, OverflowError, zlib.error) as error:
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


def _volume_voxels(path: str | Path, image: Any) -> np.ndarray:
    shape = volume_shape(path, [int(n) for n in image.shape])
    return voxels(path, image).reshape(shape)


def _slope(image: Any) -> float:
    """The factor from stored numbers to values; 1 for files without scaling."""
    return float(getattr(image.dataobj, "slope", 1.0))


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
