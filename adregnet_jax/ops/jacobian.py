"""Spatial derivatives and the Jacobian determinant of a deformation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.slabs import halo, slab_count, slab_start, whole_width


def spatial_gradient(
    volume: Float[AnyArray, "b x y z c"], *, spacing: float | Sequence[float] = 1.0
) -> Float[Array, "b x y z c 3"]:
    """Derivatives along the three spatial axes, as `numpy.gradient` takes them.

    Central differences inside, one-sided differences on the outermost voxels.

    Args:
      volume: [b, x, y, z, c], at least two voxels along every axis.
      spacing: distance between voxels, one number or one an axis; 1 gives derivatives by voxel.

    Returns:
      [b, x, y, z, c, 3]; the last axis is the direction of the derivative.

    Raises:
      ValueError: wrong rank, or an axis of a single voxel.

    Examples:
      >>> volume = jnp.arange(4.0).reshape(1, 4, 1, 1, 1) + jnp.zeros((1, 4, 4, 4, 1))
      >>> spatial_gradient(volume, spacing=2.0)[0, 1, 1, 1, 0].tolist()
      [0.5, 0.0, 0.0]
    """
    if volume.ndim != 5:
        raise ValueError(f"volume must be [b, x, y, z, c], got shape {volume.shape}")
    return jnp.stack(_gradient(volume, np.broadcast_to(spacing, 3).tolist()), axis=-1)


def jacobian_determinant(displacement: Float[AnyArray, "b x y z 3"]) -> Float[Array, "b x y z"]:
    """Determinant of the Jacobian of the map `p + u(p)`: `det(I + du/dp)`.

    1 is no change of volume, 0 or less is a fold. The paper writes det(grad Phi), without the identity: the
    determinant of a registration at rest would be 0. Differences are those of `spatial_gradient`: central
    ones don't see a fold that alternates from voxel to voxel.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.

    Returns:
      [b, x, y, z].

    Raises:
      ValueError: wrong shape, or an axis of a single voxel.

    Examples:
      >>> stretch = 0.5 * identity_grid((4, 4, 4))[None]
      >>> float(jacobian_determinant(stretch)[0, 1, 1, 1])
      3.375
    """
    if displacement.ndim != 5 or displacement.shape[-1] != 3:
        raise ValueError(f"displacement must be [b, x, y, z, 3], got shape {displacement.shape}")
    # Nine arrays and the closed formula: a [b, x, y, z, 3, 3] array is never made.
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (
        _gradient(displacement[..., k], [1.0, 1.0, 1.0]) for k in range(3)
    )
    xx, yy, zz = 1 + xx, 1 + yy, 1 + zz
    return xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)


def _gradient(volume: AnyArray, spacing: Sequence[float]) -> list[jax.Array]:
    """Derivatives of [b, x, y, z, ...] along the three spatial axes."""
    if slab_count() == 1:
        return list(jnp.gradient(volume, *spacing, axis=(1, 2, 3)))
    width = volume.shape[1]
    extended = halo(volume, 1, 1)
    step = extended[:, 1:] - extended[:, :-1]
    place = slab_start(width) + jnp.arange(width).reshape(1, -1, *[1] * (volume.ndim - 2))
    first, last = place == 0, place == whole_width(width) - 1
    along_x = jnp.where(
        first, step[:, 1:], jnp.where(last, step[:, :-1], (extended[:, 2:] - extended[:, :-2]) / 2)
    )
    return [along_x / spacing[0], *jnp.gradient(volume, *spacing[1:], axis=(2, 3))]


def folded_volume(
    displacement: Float[AnyArray, "b x y z 3"], *, mask: Shaped[AnyArray, "b x y z"] | None = None
) -> Float[Array, " b"]:
    """Share of the volume that the map `p + u(p)` turns inside out, by tetrahedra.

    No fold between voxels hides from them, as it may from central differences.

    The cube between eight neighbouring voxels splits into five tetrahedra in two ways: one at each vertex of
    an even (or odd) sum of indices, one in the middle. On each the map is linear, with one determinant. What
    is negative counts with its volume after the map, as the mean of both ways, divided by the volume of the
    grid: the non-diffeomorphic volume.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.
      mask: [b, x, y, z], or None for the whole grid: only cubes whose eight voxels are in it count.

    Returns:
      [b], 0 without a fold; it may pass 1. NaN where no cube is in the mask.

    Raises:
      ValueError: wrong shape, or an axis of a single voxel.

    Examples:
      >>> mirror = -2 * identity_grid((4, 4, 4))[None]
      >>> float(folded_volume(0.4 * mirror)[0]), float(folded_volume(mirror)[0])
      (0.0, 1.0)

    Reference:
      Liu, Chen, Wei, Carass and Prince, On finite difference Jacobian computation in deformable image
      registration, arXiv:2212.06060.
    """
    determinants = _tetrahedra(displacement)
    inside = jnp.ones(displacement.shape[:-1], bool) if mask is None else jnp.asarray(mask, bool)
    whole = functools.reduce(jnp.logical_and, _corners(inside).values())
    inverted = functools.reduce(jnp.add, (jnp.maximum(-determinant, 0) for determinant in determinants))
    # Of a sum over all voxels XLA for CPUs makes one for each tetrahedron, and keeps their ten arrays. The
    # barrier hides from it that all are counted.
    whole = jax.lax.optimization_barrier(whole)
    total = jnp.sum(inverted, axis=(1, 2, 3), where=whole)
    return total / jnp.sum(whole, axis=(1, 2, 3)) / 6 / 2


def least_determinant(displacement: Float[AnyArray, "b x y z 3"]) -> Float[Array, "b x y z"]:
    """The least determinant of the map `p + u(p)` on the tetrahedra around each voxel.

    The tetrahedra are those of `folded_volume`, which is 0 where this is nowhere below 0.

    Args:
      displacement: [b, x, y, z, 3] in voxels of its grid.

    Returns:
      [b, x, y, z], 1 for a map at rest.

    Raises:
      ValueError: wrong shape, or an axis of a single voxel.

    Examples:
      >>> squeeze = -0.5 * identity_grid((4, 4, 4))[None]
      >>> float(least_determinant(squeeze)[0, 1, 1, 1])
      0.125
    """
    # Four at the vertices of each parity have six times their volume, the one in the middle three times.
    corner, middle = (0, 1, 2, 3, 5, 6, 7, 8), (4, 9)
    found = _tetrahedra(displacement)
    least = functools.reduce(jnp.minimum, [found[n] for n in corner] + [found[n] / 2 for n in middle])
    for axis in (1, 2, 3):
        around = jnp.pad(least, [(int(n == axis),) * 2 for n in range(4)], constant_values=jnp.inf)
        size = displacement.shape[axis]
        least = jnp.minimum(
            *(jax.lax.slice_in_dim(around, start, start + size, axis=axis) for start in (0, 1))
        )
    return least


def _corners(values: Array) -> dict[tuple[int, int, int], Array]:
    """The eight corners [b, x - 1, y - 1, z - 1, ...] of all cubes between voxels."""
    low, high = slice(None, -1), slice(1, None)
    return {
        (i, j, k): values[:, high if i else low, high if j else low, high if k else low]
        for i, j, k in itertools.product((0, 1), repeat=3)
    }


def _tetrahedra(displacement: AnyArray) -> list[Array]:
    """Six times the signed volumes [b, x - 1, y - 1, z - 1] of the tetrahedra of each cube after the map.

    For each parity four at vertices, which are 1 at rest, and the one in the middle, which is 2.
    """
    if displacement.ndim != 5 or displacement.shape[-1] != 3 or min(displacement.shape[1:4]) < 2:
        raise ValueError(
            f"displacement must be [b, x, y, z, 3] of 2 voxels or more an axis, got {displacement.shape}"
        )
    place = identity_grid(displacement.shape[1:4])[None] + jnp.asarray(displacement)
    x, y, z = (_corners(place[..., axis]) for axis in range(3))
    vertex = {bits: (x[bits], y[bits], z[bits]) for bits in x}

    def determinant(origin: tuple[int, int, int], *others: tuple[int, int, int]) -> Array:
        # By components, which XLA computes voxel by voxel, without an array of vectors in between.
        (xa, ya, za), (xb, yb, zb), (xc, yc, zc) = (
            [at - start for at, start in zip(vertex[other], vertex[origin], strict=True)] for other in others
        )
        return (ya * zb - za * yb) * xc + (za * xb - xa * zb) * yc + (xa * yb - ya * xb) * zc

    found = []
    for parity in (0, 1):
        corners = [bits for bits in vertex if sum(bits) % 2 == parity]
        middle = [bits for bits in vertex if sum(bits) % 2 != parity]
        for i, j, k in corners:
            sign = (-1) ** (i + j + k)  # the three edges of an odd vertex are a mirrored frame
            found.append(sign * determinant((i, j, k), (1 - i, j, k), (i, 1 - j, k), (i, j, 1 - k)))
        sign = 1 if parity else -1
        (first, *others) = middle
        found.append(sign * determinant(first, *others))
    return found
