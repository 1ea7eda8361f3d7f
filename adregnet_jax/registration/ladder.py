"""A ladder of sizes: arrays are padded to the next rung, so that few programs are compiled for many sizes.

The functions on fields are those of `registration.field`, for NumPy arrays, with the same results. They are
compiled once for all grids on the same rungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Integer, Real, Shaped

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.sampling import Padding
from adregnet_jax.registration import field as fields
from adregnet_jax.registration.field import DisplacementField

RUNGS_PER_OCTAVE = 8  # a rung is at most an eighth larger than the one below it
LEAST_STEP = 2  # voxels

_warp_image = jax.jit(fields.warp_image, static_argnames=("mode", "padding"))
_after_field = jax.jit(fields.after_field)
_invert_field = jax.jit(fields.invert_field)
_reverse_field = jax.jit(fields.reverse_field, static_argnames="shape")
_refine_inverse = jax.jit(fields.refine_inverse)
_resample_field = jax.jit(fields.resample_field, static_argnames="shape")


def rung(size: int) -> int:
    """The least size on the ladder that is not below `size`: eight of them between a number and its double.

    Examples:
      >>> [rung(n) for n in (7, 64, 65, 94, 160, 161, 500)]
      [8, 64, 72, 96, 160, 176, 512]
    """
    octave = 1 << max(size - 1, 0).bit_length()  # the next power of 2
    step = max(LEAST_STEP, octave // 2 // RUNGS_PER_OCTAVE)
    return -(-size // step) * step


def rungs(shape: Sequence[int]) -> tuple[int, int, int]:
    """The rung of each axis."""
    x, y, z = map(rung, shape)
    return x, y, z


def pad(
    values: Shaped[np.ndarray, "x y z *c"], *, outside: str = "border"
) -> Shaped[np.ndarray, "x2 y2 z2 *c"]:
    """An array padded to its rungs behind the last voxel of each axis.

    Args:
      values: [x, y, z] or [x, y, z, c].
      outside: "border" repeats the outermost voxels, "zeros" is 0, "linear" continues the last difference,
        so that a central difference at the border is the one-sided one.
    """
    missing = [(0, rung(n) - n) for n in values.shape[:3]]
    if not any(after for _, after in missing):
        return values
    width = [*missing, *[(0, 0)] * (values.ndim - 3)]
    if outside == "linear":
        return np.pad(values, width, mode="reflect", reflect_type="odd")
    return np.pad(values, width, mode="edge" if outside == "border" else "constant")


def crop(values: Shaped[jax.Array | np.ndarray, "x2 y2 z2 *c"], shape: Sequence[int]) -> np.ndarray:
    """The first voxels of each axis: an array as it was before `pad`."""
    x, y, z = shape
    return np.asarray(values)[:x, :y, :z]


def warp_image(
    field: DisplacementField,
    values: Shaped[np.ndarray, "x2 y2 z2"],
    affine: Real[np.ndarray, "4 4"],
    *,
    mode: Literal["linear", "nearest", "label"] = "linear",
    padding: Padding = "zeros",
    classes: Integer[np.ndarray, " k"] | None = None,
) -> Shaped[np.ndarray, "x y z"]:
    """`field.warp_image`, without cubic splines, whose border would be another; "label" needs `classes`."""
    if mode == "linear":
        values = values.astype(np.float32, copy=False)
    if mode != "label":
        warped = _warp_image(_padded(field), pad(values, outside=padding), affine, mode=mode, padding=padding)
        return crop(warped, field.shape)
    # Labels keep their border up to half a voxel beyond it.
    if classes is None:
        raise ValueError('mode "label" needs the classes')
    missing = rung(len(classes)) - len(classes)
    classes = np.pad(classes, (0, missing), mode="edge")  # a label that comes again wins nothing
    labels = _warp_image(_padded(field), pad(values), affine, mode="label", padding="border", classes=classes)
    labels = crop(labels, field.shape)
    if padding == "border":
        return labels
    everywhere = np.ones(values.shape, np.float32)
    return np.where(warp_image(field, everywhere, affine, mode="nearest") > 0, labels, 0)


def after_field(field: DisplacementField, matrix: Real[np.ndarray, "4 4"]) -> DisplacementField:
    """`field.after_field`."""
    return _cropped(_after_field(_padded(field), matrix), field.shape, field.affine)


def invert_field(field: DisplacementField) -> DisplacementField:
    """`field.invert_field`."""
    return _cropped(_invert_field(_padded(field)), field.shape, field.affine)


def reverse_field(
    inverse: DisplacementField,
    matrix: Real[np.ndarray, "4 4"],
    *,
    shape: Sequence[int],
    affine: Real[np.ndarray, "4 4"],
) -> DisplacementField:
    """`field.reverse_field`."""
    return _cropped(
        _reverse_field(_padded(inverse), matrix, shape=rungs(shape), affine=affine), shape, affine
    )


def refine_inverse(
    inverse: DisplacementField, field: DisplacementField, matrix: Real[np.ndarray, "4 4"]
) -> DisplacementField:
    """`field.refine_inverse`."""
    refined = _refine_inverse(_padded(inverse), _padded(field), matrix)
    return _cropped(refined, inverse.shape, inverse.affine)


def resample_field(
    field: DisplacementField, *, shape: Sequence[int], affine: Real[np.ndarray, "4 4"]
) -> DisplacementField:
    """`field.resample_field`."""
    return _cropped(_resample_field(_padded(field), shape=rungs(shape), affine=affine), shape, affine)


def zero_field(shape: Sequence[int], affine: Real[AnyArray, "4 4"]) -> DisplacementField:
    """The field that moves nothing."""
    return DisplacementField(np.zeros((*shape, 3), np.float32), np.asarray(affine, np.float32))


def _padded(field: DisplacementField) -> DisplacementField:
    return DisplacementField(pad(np.asarray(field.displacement)), field.affine)


def _cropped(field: DisplacementField, shape: Sequence[int], affine: AnyArray) -> DisplacementField:
    return DisplacementField(crop(field.displacement, shape), np.asarray(affine, np.float32))
