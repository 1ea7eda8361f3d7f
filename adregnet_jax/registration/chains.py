"""Chains of transforms on any grids: as one field, and on points.

A point of the fixed world passes through the transforms in their order, as in ANTs: images come back from the
last one to the first. Coordinates are in float32, relative to the centre of the grid or of the points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from jaxtyping import Array, Float, Real

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.composition import points_before
from adregnet_jax.ops.cubic import inside_grid
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.sampling import sample
from adregnet_jax.registration.field import DisplacementField

INVERSE_ITERATIONS = 40
FIT_POINTS = 20_000  # voxels of a field that its linear part is fitted to, at most

# A matrix [4, 4] RAS mm, or a field and whether it is inverted.
Link = Float[np.ndarray, "4 4"] | tuple[DisplacementField, bool]


def chain_field(
    links: Sequence[Link], *, shape: Sequence[int], affine: Real[np.ndarray, "4 4"]
) -> DisplacementField:
    """The field that does what a chain of transforms does, on any grid.

    Args:
      links: in the order in which fixed points pass through them.
      shape: (x, y, z) of the fixed grid.
      affine: [4, 4] voxel -> RAS mm of the fixed grid.

    Returns:
      From the fixed to the moving world. A single field on this grid comes back as it is.

    Raises:
      ValueError: no transform.
    """
    if not links:
        raise ValueError("expected at least one transform")
    if len(links) == 1 and isinstance(links[0], tuple):
        field, inverted = links[0]
        if not inverted and field.shape == tuple(shape) and np.array_equal(field.affine, affine):
            return field
    centre_mm = nib.affines.apply_affine(affine, (np.array(shape) - 1) / 2)
    near = _moved(-centre_mm) @ affine
    start = _affine(near, identity_grid(shape))
    end, _ = _follow(links, start, centre_mm)
    displacement = _times(np.linalg.inv(near[:3, :3]), end - start)
    return DisplacementField(displacement, affine)


def chain_points(
    links: Sequence[Link], points_mm: Real[np.ndarray, "n 3"]
) -> tuple[Float[np.ndarray, "n 3"], int]:
    """Maps fixed points to the moving world.

    Args:
      links: in the order in which the points pass through them.
      points_mm: [n, 3] RAS mm.

    Returns:
      [n, 3] RAS mm, and how many points left the grid of a field on their way: there, the field keeps its
      border values.
    """
    centre_mm = points_mm.mean(axis=0)
    end, outside = _follow(links, jnp.asarray(points_mm - centre_mm, jnp.float32), centre_mm)
    return np.asarray(end, np.float64) + centre_mm, int(np.sum(outside))


def _follow(links: Sequence[Link], points: jax.Array, centre_mm: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The points [..., 3] after each link, and where one left a grid [...]; all relative to a centre."""
    there, back = _moved(-centre_mm), _moved(centre_mm)
    outside = jnp.zeros(points.shape[:-1], bool)
    for link in links:
        if not isinstance(link, tuple):
            points = _affine(there @ link @ back, points)
            continue
        field, inverted = link
        near = there @ np.asarray(field.affine, np.float64)
        grid = (near, np.linalg.inv(near))
        if inverted:
            linear = _linear_part(np.asarray(field.displacement), near)
            points, left = _through_inverse(points, field.displacement, *grid, np.linalg.inv(linear))
        else:
            points, left = _through(points, field.displacement, *grid)
        outside |= left
    return points, outside


@jax.jit
def _through(
    points: Array, displacement: AnyArray, affine: AnyArray, inverse: AnyArray
) -> tuple[Array, Array]:
    """Points [..., 3] displaced by a field, and where they lie outside of its grid."""
    voxels = _affine(inverse, points)
    moved = points + _times(affine[:3, :3], sample(displacement, voxels))
    return moved, ~inside_grid(voxels, displacement.shape[:3])


@jax.jit
def _through_inverse(
    points: Array, displacement: AnyArray, affine: AnyArray, inverse: AnyArray, straight: AnyArray
) -> tuple[Array, Array]:
    """The points that a field displaces to these, by a damped fixed point around its linear part.

    Args:
      points: [..., 3].
      displacement: [x, y, z, 3] in voxels.
      affine: [4, 4] voxel -> mm of the field.
      inverse: of `affine`.
      straight: [4, 4], the inverse of the linear part of the field.
    """
    found = points_before(
        points,
        _affine(straight, points),
        displaced=lambda found: _through(found, displacement, affine, inverse)[0],
        back=lambda missed: _times(straight[:3, :3], missed),
        iterations=INVERSE_ITERATIONS,
    )
    return found, ~inside_grid(_affine(inverse, found), displacement.shape[:3])


def _linear_part(displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """[4, 4], the affine map nearest to a field by least squares; the identity if that can't be inverted."""
    step = max(1, int(np.ceil((displacement[..., 0].size / FIT_POINTS) ** (1 / 3))))
    # Two voxels or more along a short axis, or the points would lie in a plane.
    some = tuple(slice(0, n, min(step, max(1, n - 1))) for n in displacement.shape[:3])
    voxels = np.moveaxis(np.mgrid[some], 0, -1).reshape(-1, 3)
    moved = voxels + displacement[some].reshape(-1, 3)
    before, after = (nib.affines.apply_affine(affine, points) for points in (voxels, moved))
    solved: Any = np.linalg.lstsq(np.c_[before, np.ones(len(before))], after, rcond=None)[0]
    linear = np.eye(4)
    linear[:3] = solved.T
    return linear if np.linalg.det(linear[:3, :3]) > 0 else np.eye(4)


def _moved(shift_mm: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = shift_mm
    return matrix


def _affine(matrix: AnyArray, points: AnyArray) -> Array:
    """A matrix [4, 4] applied to points [..., 3]."""
    shift = jnp.broadcast_to(jnp.asarray(matrix, jnp.float32)[:3, 3], points.shape)
    return _times(matrix[:3, :3], points) + shift


def _times(matrix: AnyArray, vectors: AnyArray) -> Array:
    """A matrix [3, 3] times vectors [..., 3]."""
    # By default GPUs multiply with 10 bits of mantissa.
    return jnp.einsum("ij,...j->...i", jnp.asarray(matrix, jnp.float32), vectors, precision="highest")


def inverted(links: Sequence[Link]) -> tuple[Link, ...]:
    """The chain that leads back."""
    return tuple(
        (link[0], not link[1]) if isinstance(link, tuple) else np.linalg.inv(link) for link in reversed(links)
    )


def first_grid(links: Sequence[Link]) -> DisplacementField | None:
    """The field whose grid is that of the fixed world: the first link, unless it is a matrix or inverted."""
    if links and isinstance(links[0], tuple) and not links[0][1]:
        return links[0][0]
    return None


def merged(links: Sequence[Link]) -> tuple[Link, ...]:
    """The chain with neighbouring matrices multiplied."""
    found: list[Link] = []
    for link in links:
        if found and not isinstance(link, tuple) and not isinstance(found[-1], tuple):
            found[-1] = link @ found[-1]
        else:
            found.append(link)
    return tuple(found)
