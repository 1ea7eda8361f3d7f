"""Displacement fields in files: applied to images and points, inverted, composed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.points import read_points, write_points
from adregnet_jax.data.io.transforms import Format, read_field, write_field
from adregnet_jax.errors import UserError
from adregnet_jax.ops.cubic import inside_grid
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.registration.field import (
    DisplacementField,
    Interpolation,
    compose_fields,
    invert_field,
    warp_image,
    warp_points,
)

_warp = jax.jit(warp_image, static_argnames=("mode", "padding"))
_invert = jax.jit(invert_field)
_compose = jax.jit(compose_fields)


def apply_to_image(
    field_path: Path,
    image_path: Path,
    output: Path,
    *,
    mode: Interpolation,
    format: Format | None = None,
    overwrite: bool = False,
) -> None:
    """Warps an image file to the grid of a field file.

    Where the field maps outside the image, the result has the image's smallest value, or 0 for labels. With
    "nearest", whole numbers stay whole numbers.

    Raises:
      UserError: files that can't be used, labels that aren't whole numbers (mode "label"), or an image that
        the field doesn't reach.
    """
    _check_new(output, overwrite)
    field = load_field(field_path, format)
    image = read_image(image_path, labels=mode == "label", exact=mode == "nearest")
    reached = _warp(field, np.ones(image.shape, np.float32), image.affine, mode="nearest")
    if not np.any(reached):
        raise UserError(
            f"{image_path}: the field {field_path} doesn't lead into this image anywhere: does it belong to "
            "another scan, or are the headers wrong?"
        )
    values = _warped_values(field, image, mode)
    write_image(output, Image(values, np.asarray(field.affine)), overwrite=overwrite)


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
        return taken.astype(np.int32) if whole else taken
    outside = values.min()
    return np.asarray(_warp(field, values - outside, image.affine, mode=mode) + outside)


def apply_to_points(
    field_path: Path,
    points_path: Path,
    output: Path,
    *,
    format: Format | None = None,
    overwrite: bool = False,
) -> int:
    """Maps a file of points by a field file; returns how many points lie outside the field's grid."""
    _check_new(output, overwrite)
    points_mm = read_points(points_path)
    field = load_field(field_path, format)
    moved_mm = np.asarray(warp_points(field, jnp.asarray(points_mm)), np.float64)
    write_points(output, moved_mm, overwrite=overwrite)
    voxels = nib.affines.apply_affine(np.linalg.inv(field.affine), points_mm)
    return int(((voxels < -0.5) | (voxels > np.array(field.shape) - 0.5)).any(axis=1).sum())


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


def compose_files(paths: Sequence[Path], output: Path, *, format: Format, overwrite: bool = False) -> None:
    """Writes one field that warps as the first, then as the second, and so on.

    Raises:
      UserError: files that can't be used, or fields on different grids.
    """
    _check_new(output, overwrite)
    composed = load_field(paths[0])
    affine = np.asarray(composed.affine)
    for path in paths[1:]:
        try:
            composed = compose_fields(composed, load_field(path))
        except ValueError as error:
            raise UserError(f"{paths[0]} and {path}: {error}") from None
    _save(output, composed, affine, format, overwrite)


def load_field(path: Path, format: Format | None = None) -> DisplacementField:
    """Reads a field; its affine stays float64."""
    displacement, affine = read_field(path, format=format)
    return DisplacementField(displacement, affine)


def _save(path: Path, field: DisplacementField, affine: np.ndarray, format: Format, overwrite: bool) -> None:
    write_field(path, np.asarray(field.displacement), affine, format=format, overwrite=overwrite)


def _check_new(path: Path, overwrite: bool) -> None:
    """Refuses an existing file before the computation; writing checks again."""
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name, or overwrite it")
