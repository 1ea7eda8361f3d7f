"""Displacement fields in world coordinates, and their application to images and points.

A field maps the fixed world to the moving world: the point `w = affine @ p` of the fixed scan goes to
`w + affine[:3, :3] @ u(p)` in the moving scan. Images on any grid are pulled back onto the grid of the field.
All functions are pure and work under `jit`, `vmap` and `grad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Real, Shaped

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.composition import compose, invert, points_before
from adregnet_jax.ops.cubic import inside_grid, sample_cubic
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.ops.sampling import Padding, sample, warp_labels

Interpolation = Literal["linear", "nearest", "cubic", "label"]


@no_type_check  # at run time: JAX puts tracers, shapes and placeholders into the fields
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DisplacementField:
    """A displacement on a grid in the world.

    Attributes:
      displacement: [x, y, z, 3] in voxels of its own grid, that of the fixed image.
      affine: [4, 4] voxel of the grid -> RAS mm.
    """

    displacement: Float[AnyArray, "x y z 3"]
    affine: Real[AnyArray, "4 4"]

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.displacement.shape[:3]
        return x, y, z


def warp_image(
    field: DisplacementField,
    values: Shaped[AnyArray, "x2 y2 z2"],
    affine: Real[AnyArray, "4 4"],
    *,
    mode: Interpolation = "linear",
    padding: Padding = "zeros",
    classes: Sequence[int] | Integer[AnyArray, " k"] | None = None,
) -> Shaped[Array, "x y z"]:
    """Pulls a moving image on any grid back onto the grid of the field.

    Args:
      field: from the fixed to the moving world.
      values: [x', y', z'], the moving image.
      affine: [4, 4] voxel -> RAS mm of the moving image.
      mode: "linear"; "nearest"; "cubic", a B-spline, which may overshoot; "label", which warps a binary image
        per class linearly and takes the class with the largest value.
      padding: values outside the moving image: "zeros" (linear: fading out over a voxel) or "border".
      classes: the labels for mode "label", including the background; None takes all labels present, which
        doesn't work under `jit`.

    Returns:
      [x, y, z] on the grid of the field: in the dtype of the values for "nearest" and "label", else in a
      floating-point one.

    Raises:
      ValueError: wrong shapes or an unknown mode.
    """
    _check_field(field)
    if values.ndim != 3 or affine.shape != (4, 4):
        raise ValueError(f"expected values [x, y, z] and affine [4, 4], got {values.shape}, {affine.shape}")
    # [x, y, z, 3], voxels of the moving image
    coordinates = _to_voxels(affine, _displaced_mm(field))
    if mode == "cubic":
        return sample_cubic(values, coordinates, padding=padding)
    if mode == "label":
        present = jnp.asarray(np.unique(values) if classes is None else classes)
        displacement = coordinates - identity_grid(field.shape)
        labels = warp_labels(values[None, ..., None], displacement[None], present)[0, ..., 0]
        return jnp.where(inside_grid(coordinates, values.shape), labels, 0) if padding == "zeros" else labels
    if mode == "linear" and not jnp.issubdtype(values.dtype, jnp.floating):
        values = jnp.asarray(values, jnp.float32)  # between whole numbers there are fractions
    return sample(jnp.asarray(values)[..., None], coordinates, mode=mode, padding=padding)[..., 0]


def warp_points(field: DisplacementField, points_mm: Real[AnyArray, "n 3"]) -> Float[Array, "n 3"]:
    """Maps fixed points to the moving image.

    Outside its grid, the field keeps its border values (ITK takes 0 there).

    Args:
      field: from the fixed to the moving world.
      points_mm: [n, 3] RAS mm.

    Returns:
      [n, 3] RAS mm.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(field)
    if points_mm.ndim != 2 or points_mm.shape[1] != 3:
        raise ValueError(f"points must be [n, 3], got shape {points_mm.shape}")
    displacement = sample(field.displacement, _to_voxels(field.affine, points_mm))
    return jnp.asarray(points_mm) + _linear(field.affine, displacement)


def compose_fields(first: DisplacementField, second: DisplacementField) -> DisplacementField:
    """The field that warps an image as `first` does, followed by `second`.

    Points pass through the fields in the opposite order: through `second`, then through `first`.

    Args:
      first: from an intermediate to the moving world.
      second: from the fixed to the intermediate world, on the same grid.

    Returns:
      From the fixed to the moving world, on the same grid.

    Raises:
      ValueError: fields on different grids. Under `jit`, where affines have no values yet, only the shapes
        are compared.
    """
    _check_field(first)
    _check_field(second)
    if first.shape != second.shape:
        raise ValueError(
            f"fields live on different grids, {first.shape} and {second.shape} voxels: resample one of them"
        )
    traced = any(isinstance(field.affine, jax.core.Tracer) for field in (first, second))
    if not traced and not np.allclose(first.affine, second.affine, rtol=1e-5, atol=1e-3):
        raise ValueError(
            "fields live on different grids: the affines differ by up to "
            f"{np.abs(np.subtract(first.affine, second.affine)).max():.3g}: resample one of them"
        )
    displacement = compose(first.displacement[None], second.displacement[None])[0]
    return DisplacementField(displacement, second.affine)


def resample_field(
    field: DisplacementField, *, shape: Sequence[int], affine: Real[AnyArray, "4 4"]
) -> DisplacementField:
    """Resamples a field to another grid (trilinear); beyond its own grid, it keeps its border values.

    Args:
      field: on any grid.
      shape: (x, y, z) of the other grid.
      affine: [4, 4] voxel -> RAS mm of the other grid.

    Returns:
      Between the same worlds, on the other grid.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(field)
    if affine.shape != (4, 4):
        raise ValueError(f"affine must be [4, 4], got shape {affine.shape}")
    still = DisplacementField(jnp.zeros((*shape, 3)), jnp.asarray(affine, jnp.float32))
    displacement = sample(field.displacement, _to_voxels(field.affine, _displaced_mm(still)))
    return dataclasses.replace(
        still, displacement=_linear(_inverse(still.affine), _linear(field.affine, displacement))
    )


def invert_field(field: DisplacementField, *, iterations: int = 20) -> DisplacementField:
    """The inverse field, from the moving to the fixed world, on the same grid: see `ops.composition.invert`.

    Args:
      field: from the fixed to the moving world.
      iterations: number of fixed-point iterations.

    Returns:
      From the moving to the fixed world, on the grid of `field`.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(field)
    return DisplacementField(invert(field.displacement[None], iterations=iterations)[0], field.affine)


def reverse_field(
    inverse: DisplacementField,
    matrix: Real[AnyArray, "4 4"],
    *,
    shape: Sequence[int],
    affine: Real[AnyArray, "4 4"],
) -> DisplacementField:
    """The inverse of `after_field`, on the grid of the moving scan.

    Args:
      inverse: of the displacement before the matrix, on the grid of the fixed scan (`invert_field`).
      matrix: [4, 4] RAS mm, as applied by `after_field`.
      shape: (x, y, z) of the moving scan.
      affine: [4, 4] voxel -> RAS mm of the moving scan.

    Returns:
      From the moving to the fixed world.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(inverse)
    if matrix.shape != (4, 4) or affine.shape != (4, 4):
        raise ValueError(f"matrix and affine must be [4, 4], got shapes {matrix.shape} and {affine.shape}")
    linear = _inverse(matrix)
    shift_mm = -_linear(linear, jnp.asarray(matrix, jnp.float32)[:3, 3])
    straight = jnp.eye(4).at[:3, :3].set(linear).at[:3, 3].set(shift_mm)
    back = field_from_affine(straight, shape=shape, affine=affine)
    between_mm = _displaced_mm(back)  # [x, y, z, 3]
    shift_mm = _linear(inverse.affine, sample(inverse.displacement, _to_voxels(inverse.affine, between_mm)))
    return DisplacementField(back.displacement + _linear(_inverse(affine), shift_mm), back.affine)


def refine_inverse(
    inverse: DisplacementField,
    field: DisplacementField,
    matrix: Real[AnyArray, "4 4"],
    *,
    iterations: int = 20,
) -> DisplacementField:
    """An inverse that leads back from its own voxels, where it had been resampled from another grid.

    Each iteration moves every point of the fixed world by a share of what field and matrix together miss of
    its voxel. Beyond the grid of the field, its border goes on, and the matrix acts as everywhere.

    Args:
      inverse: from the moving to the fixed world, near the inverse of `after_field(field, matrix)`.
      field: the displacement before the matrix, on the grid of the fixed scan.
      matrix: [4, 4] RAS mm, as applied by `after_field`.
      iterations: number of fixed-point iterations.

    Returns:
      From the moving to the fixed world, on the grid of `inverse`.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(inverse)
    _check_field(field)
    if matrix.shape != (4, 4):
        raise ValueError(f"matrix must be [4, 4], got shape {matrix.shape}")
    target_mm = _displaced_mm(DisplacementField(jnp.zeros_like(inverse.displacement), inverse.affine))
    linear = _inverse(matrix)
    shift_mm = jnp.asarray(matrix, jnp.float32)[:3, 3]

    def displaced(points_mm: Array) -> Array:
        moved_mm = _linear(field.affine, sample(field.displacement, _to_voxels(field.affine, points_mm)))
        return _linear(matrix, points_mm + moved_mm) + shift_mm

    points_mm = points_before(
        target_mm,
        _displaced_mm(inverse),
        displaced=displaced,
        back=lambda missed_mm: _linear(linear, missed_mm),
        iterations=iterations,
    )
    shift = _linear(_inverse(inverse.affine), points_mm - target_mm)
    return DisplacementField(shift, jnp.asarray(inverse.affine, jnp.float32))


def field_jacobian(field: DisplacementField) -> Float[Array, "x y z"]:
    """The Jacobian determinant of the map: the change of volume, 0 or less where it folds.

    It is the same in voxels and in millimetres.

    Args:
      field: from the fixed to the moving world.

    Returns:
      [x, y, z] on the grid of the field.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(field)
    return jacobian_determinant(field.displacement[None])[0]


def field_from_affine(
    matrix: Real[AnyArray, "4 4"], *, shape: Sequence[int], affine: Real[AnyArray, "4 4"]
) -> DisplacementField:
    """A world matrix as a field.

    Args:
      matrix: [4, 4], fixed RAS mm -> moving RAS mm.
      shape: (x, y, z) of the field.
      affine: [4, 4] voxel -> RAS mm of the field.

    Returns:
      From the fixed to the moving world.

    Raises:
      ValueError: wrong shapes.
    """
    return after_field(DisplacementField(jnp.zeros((*shape, 3)), affine), matrix)


def after_field(field: DisplacementField, matrix: Real[AnyArray, "4 4"]) -> DisplacementField:
    """The field that displaces a fixed point by `field`, then moves it by the world matrix.

    Args:
      field: from the fixed world to an intermediate world.
      matrix: [4, 4] RAS mm, from the intermediate to the moving world.

    Returns:
      From the fixed to the moving world, on the grid of `field`.

    Raises:
      ValueError: wrong shapes.
    """
    _check_field(field)
    if matrix.shape != (4, 4):
        raise ValueError(f"matrix must be [4, 4], got shape {matrix.shape}")
    # The shift is computed in millimetres before it becomes voxels, so that far origins cost no precision.
    origin_mm = jnp.asarray(matrix)[None, None, None, :3, 3]
    shift_mm = _linear(matrix - jnp.eye(4), _displaced_mm(field)) + origin_mm
    displacement = field.displacement + _linear(_inverse(field.affine), shift_mm)
    return DisplacementField(displacement, field.affine)


def _check_field(field: DisplacementField) -> None:
    displacement, affine = field.displacement, field.affine
    if displacement.ndim != 4 or displacement.shape[-1] != 3 or affine.shape != (4, 4):
        raise ValueError(
            "a field has a displacement [x, y, z, 3] and an affine [4, 4], "
            f"got {displacement.shape} and {affine.shape}"
        )


def _displaced_mm(field: DisplacementField) -> jax.Array:
    """[x, y, z, 3] RAS mm: where each voxel of the field goes."""
    displaced = identity_grid(field.shape) + field.displacement
    return _linear(field.affine, displaced) + jnp.asarray(field.affine, jnp.float32)[None, None, None, :3, 3]


def _to_voxels(affine: AnyArray, points_mm: AnyArray) -> jax.Array:
    origin_mm = jnp.broadcast_to(jnp.asarray(affine, jnp.float32)[:3, 3], points_mm.shape)
    return _linear(_inverse(affine), points_mm - origin_mm)


def _linear(matrix: AnyArray, vectors: AnyArray) -> jax.Array:
    """The upper left [3, 3] times vectors [..., 3]."""
    matrix = jnp.asarray(matrix, jnp.float32)[:3, :3]
    # By default GPUs multiply with 10 bits of mantissa: an error of a quarter of a voxel in 256.
    return jnp.einsum("ij,...j->...i", matrix, vectors, precision="highest")


def _inverse(affine: AnyArray) -> jax.Array:
    """[3, 3], the inverse of the linear part in closed form, since solvers lose digits on some devices."""
    a, b, c = jnp.asarray(affine, jnp.float32)[:3, :3].T
    rows = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)])
    return rows / jnp.sum(a * rows[0])
