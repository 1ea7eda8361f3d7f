"""Volumes that several devices share: each device along the mesh axis `SPACE` holds a slab of equal width.

Slabs divide a volume along x, in the order of the devices. Inside `jax.shard_map` over `SPACE`, functions
take and return slabs: shapes are those of a slab, coordinates are those of the whole volume, and a result is
a slab of the whole volume's result, or the same number on every device. Elsewhere, and where `SPACE` has one
device, volumes are whole. The functions below find out by themselves, so no other function takes the axis.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Integer, Shaped

from adregnet_jax.ops.arrays import AnyArray

SPACE = "space"

Tree = TypeVar("Tree")


def slab_axis() -> str | None:
    """`SPACE` where volumes are slabs, None where they are whole.

    JAX keeps the mesh in the context of every trace and in the keys of its caches, so the answer is right in
    loop bodies, recomputed functions and the backward rules of `jax.custom_vjp` as well.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return SPACE if SPACE in mesh.manual_axes and mesh.shape[SPACE] > 1 else None


def slab_count() -> int:
    """How many devices share a volume."""
    axis = slab_axis()
    return 1 if axis is None else jax.lax.axis_size(axis)


def slab_index() -> int | Integer[Array, ""]:
    """The place of this device's slab among all."""
    axis = slab_axis()
    return 0 if axis is None else jax.lax.axis_index(axis)


def slab_start(width: int) -> int | Integer[Array, ""]:
    """Index along x, in the whole volume, of the first voxel of this device's slab.

    Args:
      width: of a slab, in voxels.

    Returns:
      The index, traced where there are slabs.
    """
    return slab_index() * width


def whole_width(width: int) -> int:
    """Width of the whole volume along x.

    Args:
      width: of a slab, in voxels.

    Returns:
      The number of voxels.
    """
    return slab_count() * width


def sum_over_slabs(tree: Tree) -> Tree:
    """Sums over all slabs, on every device.

    Args:
      tree: of arrays, one number or more from each slab.

    Returns:
      The tree of the sums.
    """
    axis = slab_axis()
    return tree if axis is None else jax.lax.psum(tree, axis)


def mean_over_slabs(tree: Tree) -> Tree:
    """Means over all slabs, on every device.

    Args:
      tree: of arrays, one number or more from each slab.

    Returns:
      The tree of the means.
    """
    axis = slab_axis()
    return tree if axis is None else jax.lax.pmean(tree, axis)


def join_slabs(tree: Tree) -> Tree:
    """Joins slabs to whole volumes, on every device.

    Args:
      tree: of slabs [b, x, ...].

    Returns:
      The tree of the whole volumes.
    """
    axis = slab_axis()
    return tree if axis is None else jax.lax.all_gather(tree, axis, axis=1, tiled=True)


def pass_on(tree: Tree) -> Tree:
    """Sends arrays to the next device, and from the last device to the first.

    Args:
      tree: of arrays.

    Returns:
      The tree that the device before sent.
    """
    axis = slab_axis()
    if axis is None:
        return tree
    count = slab_count()
    return jax.lax.ppermute(tree, axis, [(i, (i + 1) % count) for i in range(count)])


def halo(
    volume: Shaped[AnyArray, "b x *rest"], before: int, after: int, *, repeat_border: bool = False
) -> Shaped[Array, "b wide *rest"]:
    """Adds the neighbouring voxels along x to a slab, from several other slabs where these are thin.

    Args:
      volume: [b, x, ...], a slab or a whole volume.
      before: how many voxels to add in front.
      after: how many voxels to add behind.
      repeat_border: repeat the outermost voxels beyond the border of the whole volume, instead of 0.

    Returns:
      [b, before + x + after, ...].
    """
    front, back = beyond(volume, before, after, repeat_border=repeat_border)
    return jnp.concatenate([front, volume, back], axis=1)


def beyond(
    volume: Shaped[AnyArray, "b x *rest"], before: int, after: int, *, repeat_border: bool = False
) -> tuple[Shaped[Array, "b before *rest"], Shaped[Array, "b after *rest"]]:
    """The voxels that `halo` adds on either side of a slab.

    Args:
      volume: [b, x, ...], a slab or a whole volume.
      before: how many voxels in front.
      after: how many voxels behind.
      repeat_border: repeat the outermost voxels beyond the border of the whole volume, instead of 0.

    Returns:
      [b, before, ...] and [b, after, ...].
    """
    axis, count, index, width = slab_axis(), slab_count(), slab_index(), volume.shape[1]

    def from_side(voxels: int, step: int) -> jax.Array:
        """The voxels on one side; `step` is 1 where they come from the device before."""
        outermost = volume[:, :1] if step > 0 else volume[:, -1:]
        if axis is None:
            side = jnp.repeat(outermost, voxels, axis=1)
            return side if repeat_border else jnp.zeros_like(side)
        at_border = index == (0 if step > 0 else count - 1)
        pairs = [(i, i + step) for i in range(count) if 0 <= i + step < count]
        pieces, piece = [volume[:, :0]], volume
        while voxels > 0:
            taken = min(voxels, width)
            piece = piece[:, -taken:] if step > 0 else piece[:, :taken]
            # A device without a sender receives 0.
            piece = jax.lax.ppermute(piece, axis, pairs)
            if repeat_border:
                piece = jnp.where(at_border, outermost, piece)
            pieces.append(piece)
            voxels -= taken
        return jnp.concatenate(pieces[::-1] if step > 0 else pieces, axis=1)

    return from_side(before, 1), from_side(after, -1)
