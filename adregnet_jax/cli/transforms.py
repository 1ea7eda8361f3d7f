"""Fields from files to files: applied, inverted, composed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from adregnet_jax.data.images import Image, read_image, write_image
from adregnet_jax.data.points import read_points, write_points
from adregnet_jax.data.transforms import Format, read_field, write_field
from adregnet_jax.errors import UserError
from adregnet_jax.fields import (
    DisplacementField,
    Interpolation,
    compose_fields,
    field_jacobian,
    invert_field,
    warp_image,
    warp_points,
)

_warp = jax.jit(warp_image, static_argnames=("mode", "padding"))
_invert = jax.jit(invert_field)
_determinant = jax.jit(field_jacobian)


def apply_to_image(
    field_path: Path,
    image_path: Path,
    output: Path,
    *,
    mode: Interpolation,
    format: Format | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the image, pulled back onto the grid of the field.

    Raises:
      UserError: files that can't be used, labels that aren't whole numbers (mode "label"), or an image that
        the field doesn't reach.
    """
    _check_new(output, overwrite)
    field = load_field(field_path, format)
    image = read_image(image_path, labels=mode == "label")
    reached = _warp(field, np.ones(image.shape, np.float32), image.affine, mode="nearest")
    if not np.any(reached):
        raise UserError(
            f"{image_path}: the field {field_path} doesn't lead into this image anywhere: is it of another "
            "scan, or are the headers wrong?"
        )
    classes = np.unique(image.values) if mode == "label" else None
    warped = _warp(field, image.values, image.affine, mode=mode, classes=classes)
    write_image(output, Image(np.asarray(warped), np.asarray(field.affine)), overwrite=overwrite)


def apply_to_points(
    field_path: Path,
    points_path: Path,
    output: Path,
    *,
    format: Format | None = None,
    overwrite: bool = False,
) -> int:
    """Writes where the points go; returns how many of them lie outside of the field's grid."""
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
    """Writes the inverse; returns the share of the field that is folded and has none, in percent."""
    _check_new(output, overwrite)
    field = load_field(path, from_format)
    _save(output, _invert(field), np.asarray(field.affine), format, overwrite)
    return 100 * float(jnp.mean(_determinant(field) <= 0))


def compose_files(paths: Sequence[Path], output: Path, *, format: Format, overwrite: bool = False) -> None:
    """Writes the field that warps as the first one, then as the second one, and so on.

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
    """A field on disk as the value that `adregnet_jax.fields` takes; its affine keeps its 64 bits."""
    displacement, affine = read_field(path, format)
    return DisplacementField(displacement, affine)  # type: ignore[arg-type]


def _save(path: Path, field: DisplacementField, affine: np.ndarray, format: Format, overwrite: bool) -> None:
    write_field(path, np.asarray(field.displacement), affine, format=format, overwrite=overwrite)


def _check_new(path: Path, overwrite: bool) -> None:
    """Before anything is computed; writing looks again."""
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name, or add --overwrite")
