"""Means within masks, of whole volumes and of slabs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.slabs import mean_over_slabs, slab_start, sum_over_slabs, whole_width


def masked_mean(
    values: Float[AnyArray, "b x y z"], mask: Float[AnyArray, "b x y z"] | None
) -> Float[Array, " b"]:
    """Means over [b, x, y, z] within the mask: [b]; 0 where the mask is empty."""
    if mask is None:
        mean = jnp.mean(values, axis=(1, 2, 3))
        return mean_over_slabs(mean)
    total, count = jnp.sum(values * mask, axis=(1, 2, 3)), jnp.sum(mask, axis=(1, 2, 3))
    total, count = sum_over_slabs((total, count))
    return total / jnp.maximum(count, 1)


def whole_shape(volume: Shaped[AnyArray, "b x y z *rest"]) -> tuple[int, int, int]:
    """(x, y, z) of the whole volume of a slab [b, x, y, z, ...]."""
    _, x, y, z = volume.shape[:4]
    return whole_width(x), y, z


def inside_along_x(values: Float[AnyArray, "b x y z"], margin: int) -> Float[Array, "b x y z"]:
    """1 for the voxels of a slab [b, x, y, z] that lie `margin` inside the whole volume along x, else 0."""
    width = values.shape[1]
    place = slab_start(width) + jnp.arange(width)
    inside = (place >= margin) & (place < whole_width(width) - margin)
    return jnp.broadcast_to(inside[:, None, None].astype(values.dtype), values.shape)


def check_displacement(displacement: AnyArray, mask: AnyArray | None) -> None:
    """Raises ValueError unless the displacement is [b, x, y, z, 3] and the mask [b, x, y, z, 1] or None."""
    if displacement.ndim != 5 or displacement.shape[-1] != 3:
        raise ValueError(f"displacement must be [b, x, y, z, 3], got shape {displacement.shape}")
    if mask is not None and mask.shape != (*displacement.shape[:-1], 1):
        raise ValueError(f"the mask must be {(*displacement.shape[:-1], 1)}, got {mask.shape}")
