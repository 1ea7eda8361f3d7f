"""Matching the contrast of one image to that of another."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.data.preprocessing import CONTRAST_BINS, OTHER_CONTRAST


def match_contrast(moving: Float[Array, "x y z"], fixed: Float[Array, "x y z"]) -> Float[Array, "x y z"]:
    """Maps a moving image to the contrast of the fixed one, as `data.preprocessing.match_contrast` does.

    Args:
      moving: [x, y, z], intensities in [0, 1].
      fixed: [x, y, z] on the same grid.

    Returns:
      [x, y, z] in [0, 1].
    """
    inside = ~_outside(moving == 0)
    place = moving * CONTRAST_BINS
    bins = jnp.where(inside, 1 + jnp.clip(place.astype(jnp.int32), 0, CONTRAST_BINS - 1), 0)
    nothing = jnp.zeros(1 + CONTRAST_BINS)
    counts, sums = nothing.at[bins].add(1.0), nothing.at[bins].add(fixed)
    around = sums[0] / jnp.maximum(counts[0], 1)
    # Bins with few or no voxels borrow from their neighbours, but not from the background (bin 0).
    steps = jnp.arange(-4, 5)
    kernel = jnp.exp(-0.5 * steps**2)
    counts, sums = (
        jnp.convolve(values[1:], kernel / kernel.sum(), mode="same", precision="highest")
        for values in (counts, sums)
    )
    filled = counts > 1e-6
    curve = _fill_gaps(sums / jnp.where(filled, counts, 1), filled)
    matched = jnp.where(inside, jnp.interp(place - 0.5, jnp.arange(CONTRAST_BINS), curve), around)
    gain = _correlation(matched, fixed) - _correlation(moving, fixed)
    return jnp.where(filled.any() & (gain > OTHER_CONTRAST), matched, moving)


def _outside(empty: Array) -> Array:
    """The empty voxels [x, y, z] that are connected by their faces to the border of the volume."""

    def grow(state: tuple[Array, Array]) -> tuple[Array, Array]:
        outside, _ = state
        padded = jnp.pad(outside, 1, constant_values=True)
        reached = outside
        for axis in range(3):
            for start in (0, 2):
                at = [1, 1, 1]
                at[axis] = start
                reached |= jax.lax.slice(padded, at, [a + n for a, n in zip(at, empty.shape, strict=True)])
        reached &= empty
        return reached, jnp.any(reached != outside)

    return jax.lax.while_loop(lambda state: state[1], grow, (jnp.zeros_like(empty), jnp.array(True)))[0]


def _fill_gaps(values: Array, filled: Array) -> Array:
    """Interpolates values [n] linearly where they are not filled; the outermost ones are repeated."""
    place = jnp.arange(len(values))
    before = jax.lax.cummax(jnp.where(filled, place, -1))
    after = jax.lax.cummin(jnp.where(filled, place, len(values)), reverse=True)
    after = jnp.where(after == len(values), before, after)
    before = jnp.where(before == -1, after, before)
    fraction = (place - before) / jnp.maximum(after - before, 1)
    return values[before] + fraction * (values[after] - values[before])


def _correlation(a: Array, b: Array) -> Array:
    a, b = a - a.mean(), b - b.mean()
    scale = jnp.sqrt(jnp.sum(a**2) * jnp.sum(b**2))
    return jnp.where(scale > 0, jnp.sum(a * b) / jnp.where(scale > 0, scale, 1), 0)
