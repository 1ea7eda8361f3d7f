"""Volumes that several devices share: each device of a mesh axis holds a slab along x, all of one width.

Functions that look beyond their voxel take `axis_name`, the axis of the `jax.shard_map` that they run in; the
slabs lie along it in the order of its devices. Shapes are then those of a slab, coordinates are those of the
whole volume, and results are slabs of what the whole volume gives, or the same number on each device. None is
a whole volume on one device, without any of this.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def slab_start(width: int, axis_name: str | None) -> int | jax.Array:
    """The place in the whole volume of the first voxel along x."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name) * width


def whole_width(width: int, axis_name: str | None) -> int:
    """Voxels of the whole volume along x."""
    return width if axis_name is None else width * jax.lax.axis_size(axis_name)


def halo(
    volume: jax.Array, before: int, after: int, axis_name: str, *, repeat_border: bool = False
) -> jax.Array:
    """A slab with voxels of its neighbours on either side, also of further ones where slabs are thin.

    Args:
      volume: [b, x, ...], a slab.
      before: voxels in front of it.
      after: voxels behind it.
      axis_name: the mesh axis of the slabs.
      repeat_border: whether the outermost voxels repeat beyond the border of the whole volume; else 0.

    Returns:
      [b, before + x + after, ...].
    """
    sides = beyond(volume, before, after, axis_name, repeat_border=repeat_border)
    return jnp.concatenate([sides[0], volume, sides[1]], axis=1)


def beyond(
    volume: jax.Array, before: int, after: int, axis_name: str, *, repeat_border: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The voxels on either side of a slab, as `halo` joins them to it: [b, before, ...], [b, after, ...]."""
    width = volume.shape[1]
    index, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)

    def from_side(voxels, step):
        """The voxels on one side; `step` is 1 where they come from the device before."""
        outermost = volume[:, :1] if step > 0 else volume[:, -1:]
        at_border = index == (0 if step > 0 else devices - 1)
        pairs = [(i, i + step) for i in range(devices) if 0 <= i + step < devices]
        pieces, piece = [volume[:, :0]], volume
        while voxels > 0:
            taken = min(voxels, width)
            piece = piece[:, -taken:] if step > 0 else piece[:, :taken]
            # Who is sent nothing gets 0.
            piece = jax.lax.ppermute(piece, axis_name, pairs)
            if repeat_border:
                piece = jnp.where(at_border, outermost, piece)
            pieces.append(piece)
            voxels -= taken
        return jnp.concatenate(pieces[::-1] if step > 0 else pieces, axis=1)

    return from_side(before, 1), from_side(after, -1)
