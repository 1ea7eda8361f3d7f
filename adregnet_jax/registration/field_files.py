"""Transforms in files: applied to images and points, inverted, composed, converted."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from adregnet_jax.data.io import nifti
from adregnet_jax.data.io.images import ITK_SUFFIXES, NIBABEL_SUFFIXES, Image, read_image, write_image
from adregnet_jax.data.io.itk import from_itk, read_itk_file
from adregnet_jax.data.io.nifti import Prefer
from adregnet_jax.data.io.points import read_points, write_points
from adregnet_jax.data.io.transforms import (
    MATRIX_SUFFIXES,
    WRITTEN_SUFFIXES,
    Field,
    Format,
    read_field,
    read_transform,
    write_field,
    write_matrix,
)
from adregnet_jax.errors import UserError
from adregnet_jax.ops.cubic import inside_grid
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.registration.chains import (
    Link,
    chain_field,
    chain_points,
    first_grid,
    inverted,
    merged,
)
from adregnet_jax.registration.field import (
    DisplacementField,
    Interpolation,
    compose_fields,
    invert_field,
    warp_image,
)

_warp = jax.jit(warp_image, static_argnames=("mode", "padding"))
_invert = jax.jit(invert_field)
_compose = jax.jit(compose_fields)


@dataclasses.dataclass(frozen=True)
class TransformFile:
    """A transform in a file, and whether its inverse is meant.

    Attributes:
      path: a field, a matrix or a composite, as for `data.io.transforms.read_transform`.
      inverted: take its inverse.
      format: of a NIfTI field; None: as its header says.
    """

    path: Path
    inverted: bool = False
    format: Format | None = None


def apply_to_image(
    transforms: Sequence[TransformFile],
    image_path: Path,
    output: Path,
    *,
    mode: Interpolation,
    reference: Path | None = None,
    prefer: Prefer | None = None,
    series: str | None = None,
    overwrite: bool = False,
) -> None:
    """Warps an image file to the fixed grid.

    Where the transforms lead outside the image, the result has the image's smallest value, or 0 for labels.
    With "nearest", whole numbers stay whole numbers.

    Args:
      transforms: in the order in which fixed points pass through them, as for ANTs.
      image_path: the moving image.
      output: the file to write.
      mode: see `warp_image`.
      reference: an image or a field on the fixed grid; None: the grid of the first transform.
      prefer: the form that places NIfTI images whose sform and qform disagree.
      series: UID of the moving series, in a DICOM folder that holds several.
      overwrite: replace an existing file.

    Raises:
      UserError: files that can't be used, no grid, labels that aren't whole numbers (mode "label"), or an
        image that the transforms don't reach.
    """
    _check_new(output, overwrite)
    field = _on_grid(transforms, load_links(transforms), reference, prefer)
    image = read_image(image_path, labels=mode == "label", exact=True, prefer=prefer, series=series)
    if mode in ("linear", "cubic"):
        image = _as_float32(image)
    reached = _warp(field, np.ones(image.shape, np.float32), image.affine, mode="nearest")
    if not np.any(reached):
        kind = "field" if len(transforms) == 1 else "chain"
        raise UserError(
            f"{image_path}: the {kind} {_names(transforms)} doesn't lead into this image anywhere: does it "
            "belong to another scan, or are the headers wrong?"
        )
    values = _warped_values(field, image, mode)
    write_image(output, Image(values, np.asarray(field.affine)), overwrite=overwrite)


def _as_float32(image: Image) -> Image:
    """The image for interpolation, with a warning where whole numbers are rounded."""
    values = image.values.astype(np.float32)
    if image.values.dtype.kind in "iu" and not np.array_equal(values, image.values):
        warnings.warn(
            f'{image.name}: whole numbers above 2^24 are rounded: mode="nearest" or mode="label" keep them',
            stacklevel=2,
        )
    return dataclasses.replace(image, values=values)


def _warped_values(field: DisplacementField, image: Image, mode: Interpolation) -> np.ndarray:
    values = image.values
    if mode == "label":
        # Ranks, because labels may exceed what float32 or int32 hold.
        present, ranks = np.unique(values, return_inverse=True)
        numbers = ranks.reshape(values.shape).astype(np.int32) + 1
        warped = _warp(field, numbers, image.affine, mode=mode, classes=np.arange(1, len(present) + 1))
        return np.concatenate([np.zeros(1, present.dtype), present])[np.asarray(warped)]
    if mode == "nearest":
        # The numbers of the voxels: their values come back as they are.
        numbers = np.arange(1, values.size + 1, dtype=np.int32).reshape(values.shape)
        found = np.asarray(_warp(field, numbers, image.affine, mode=mode))
        taken = np.where(found > 0, values.ravel()[found - 1], values.min())
        whole = taken.dtype.kind == "f" and np.array_equal(values, np.round(values))
        return taken.astype(np.int64) if whole and np.abs(values).max() < 2**63 else taken
    outside = values.min()
    return np.asarray(_warp(field, values - outside, image.affine, mode=mode) + outside)


def apply_to_points(
    transforms: Sequence[TransformFile], points_path: Path, output: Path, *, overwrite: bool = False
) -> int:
    """Maps a file of fixed points; returns how many points leave the grid of a field on their way."""
    _check_new(output, overwrite)
    points_mm = read_points(points_path)
    moved_mm, outside = chain_points(load_links(transforms), points_mm)
    write_points(output, moved_mm, overwrite=overwrite)
    return outside


def invert_file(
    path: Path, output: Path, *, from_format: Format | None, format: Format, overwrite: bool = False
) -> float:
    """Writes the inverse of a field file, and returns how far the two composed are from the identity.

    The distance is the 99th percentile, in voxels, over voxels whose inverse stays inside the grid; NaN if
    there are none.
    """
    _check_new(output, overwrite)
    field = load_field(path, from_format)
    inverse = _invert(field)
    _save(output, inverse, np.asarray(field.affine), format, overwrite)
    inside = np.asarray(inside_grid(identity_grid(field.shape) + inverse.displacement, field.shape))
    error = np.linalg.norm(np.asarray(_compose(field, inverse).displacement), axis=-1)[inside]
    return float(np.percentile(error, 99)) if error.size else float("nan")


def compose_files(
    transforms: Sequence[TransformFile],
    output: Path,
    *,
    format: Format = "itk",
    reference: Path | None = None,
    prefer: Prefer | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one transform that does what several do: a matrix if they are matrices, else a field.

    Args:
      transforms: in the order in which fixed points pass through them, as for ANTs.
      output: its suffix determines the kind of file.
      format: of a NIfTI field.
      reference: an image or a field on the fixed grid; None: the grid of the first transform.
      prefer: the form that places a NIfTI reference whose sform and qform disagree.
      overwrite: replace an existing file.

    Raises:
      UserError: files that can't be used, no grid, or fields for a file that holds matrices.
    """
    _check_new(output, overwrite)
    links = load_links(transforms)
    matrix = links[0] if len(links) == 1 and not isinstance(links[0], tuple) else None
    if matrix is not None and reference is None and output.name.endswith(MATRIX_SUFFIXES):
        write_matrix(output, matrix, overwrite=overwrite)
        return
    if not output.name.endswith(WRITTEN_SUFFIXES):
        held = "hold matrices only" if output.name.endswith(MATRIX_SUFFIXES) else "aren't known"
        raise UserError(f"{output}: such files {held}; expected one of {', '.join(WRITTEN_SUFFIXES)}")
    field = _on_grid(transforms, links, reference, prefer)
    _save(output, field, np.asarray(field.affine), format, overwrite)


def load_field(path: Path, format: Format | None = None) -> DisplacementField:
    """Reads a field; its affine stays float64."""
    displacement, affine = read_field(path, format=format)
    return DisplacementField(displacement, affine)


def load_links(transforms: Sequence[TransformFile]) -> tuple[Link, ...]:
    """Reads transforms as a chain, in their order; neighbouring matrices are multiplied."""
    links: list[Link] = []
    for transform in transforms:
        parts = read_transform(transform.path, format=transform.format)
        found: tuple[Link, ...] = tuple(
            (DisplacementField(part.displacement, part.affine), False) if isinstance(part, Field) else part
            for part in parts
        )
        links += inverted(found) if transform.inverted else found
    return merged(links)


def _on_grid(
    transforms: Sequence[TransformFile], links: Sequence[Link], reference: Path | None, prefer: Prefer | None
) -> DisplacementField:
    if reference is not None:
        shape, affine = _read_grid(reference, prefer)
        return chain_field(links, shape=shape, affine=affine)
    own = first_grid(links)
    if own is None:
        raise UserError(
            f"{_names(transforms)}: the first transform has no grid in the fixed world: name an image on the"
            " grid that the result is to have (reference=GRID)"
        )
    return chain_field(links, shape=own.shape, affine=np.asarray(own.affine))


def _read_grid(path: Path, prefer: Prefer | None) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine of an image or a field."""
    if path.name.endswith(NIBABEL_SUFFIXES):
        image = nifti.open_image(path, prefer=prefer)
        return nifti.volume_shape(path, [int(n) for n in image.shape[:3]]), image.affine
    if path.name.endswith((".npz", ".h5", ".tfm")):
        field = load_field(path)
        return field.shape, np.asarray(field.affine)
    if path.name.endswith(ITK_SUFFIXES):
        grid = read_itk_file(path)
        values, affine = from_itk(path, grid)
        return nifti.volume_shape(path, values.shape[:3]), affine
    found = read_image(path)
    return found.shape, found.affine


def _names(transforms: Sequence[TransformFile]) -> str:
    return ", ".join(str(transform.path) for transform in transforms)


def _save(path: Path, field: DisplacementField, affine: np.ndarray, format: Format, overwrite: bool) -> None:
    write_field(path, np.asarray(field.displacement), affine, format=format, overwrite=overwrite)


def _check_new(path: Path, overwrite: bool) -> None:
    """Refuses an existing file before the computation; writing checks again."""
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name, or overwrite it")
