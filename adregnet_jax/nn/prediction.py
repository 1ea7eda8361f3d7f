"""What goes into a registration network and what comes out, whichever network it is."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Prediction(NamedTuple):
    """What the network says of a batch of pairs."""

    displacement: jax.Array  # [b, x, y, z, 3] float32, voxels of the input grid
    pyramid: tuple[jax.Array, ...]  # displacements of the levels, coarse to fine, in voxels of each level
    match_entropy: tuple[jax.Array, ...]  # [b, x_l, y_l, z_l] nats, coarse to fine; empty without attention


def check_images(fixed: jax.Array, moving: jax.Array) -> None:
    """Raises ValueError unless both are [b, x, y, z, 1] on one grid."""
    if fixed.ndim != 5 or fixed.shape[-1] != 1 or fixed.shape != moving.shape:
        raise ValueError(
            f"fixed and moving must be [b, x, y, z, 1] on one grid, got {fixed.shape} and {moving.shape}"
        )


def pad_to_multiple(volume: jax.Array, multiple: int) -> jax.Array:
    """[b, x, y, z, c], lengthened at the high end of each axis by repeating the border."""
    padding = [(0, -n % multiple) for n in volume.shape[1:4]]
    return jnp.pad(volume, [(0, 0), *padding, (0, 0)], mode="edge")
