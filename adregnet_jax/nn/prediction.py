"""What goes into a registration network and what comes out, whichever network it is."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.errors import UserError
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.slabs import slab_count, whole_width


class Prediction(NamedTuple):
    """The output of a network for a batch of pairs."""

    displacement: Float[Array, "b x y z 3"]  # float32, voxels of the input grid
    pyramid: tuple[Float[Array, "b _ _ _ 3"], ...]  # by level, coarse to fine, in voxels of the level
    match_entropy: tuple[Float[Array, "b _ _ _"], ...]  # nats, coarse to fine; empty without attention


def check_images(fixed: AnyArray, moving: AnyArray) -> None:
    """Raises ValueError unless both are [b, x, y, z, 1] on one grid."""
    if fixed.ndim != 5 or fixed.shape[-1] != 1 or fixed.shape != moving.shape:
        raise ValueError(
            f"fixed and moving must be [b, x, y, z, 1] on one grid, got {fixed.shape} and {moving.shape}"
        )


def check_width(width: int, devices: int, multiple: int) -> None:
    """Refuses a volume that doesn't split into slabs along x which a network takes.

    Args:
      width: of the whole volume along x.
      devices: that share it.
      multiple: of which a slab must be, for the levels of the network.

    Raises:
      UserError: with a width that fits.
    """
    if width % (devices * multiple):
        fits = -(-width // (devices * multiple)) * devices * multiple
        raise UserError(
            f"a volume {width} wide along x doesn't split into slabs for {devices} devices"
            f" (run.space_devices), each a multiple of {multiple} voxels for the levels of the network:"
            f" pad the scans to {fits}, or take fewer devices"
        )


def pad_to_multiple(volume: Float[Array, "b x y z c"], multiple: int) -> Float[Array, "b x2 y2 z2 c"]:
    """[b, x, y, z, c], lengthened at the high end of each axis by repeating the border.

    Slabs (`ops.slabs`) stay as wide along x as they are, and must be such a multiple.
    """
    padding = [(0, -n % multiple) for n in volume.shape[1:4]]
    if slab_count() > 1:
        check_width(whole_width(volume.shape[1]), slab_count(), multiple)
    return jnp.pad(volume, [(0, 0), *padding, (0, 0)], mode="edge")
