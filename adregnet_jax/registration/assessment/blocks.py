"""Block matching of two images that should agree: where each block of one fits best in the other.

A registration that is right sits at a peak: a block of the fixed image is more like the warped image at its
own place than a few voxels away. Where another place fits better, the distance to it is what the registration
misses; where all places fit alike, the images say nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray

WINDOW = 3  # cells along each axis that a block spans; blocks overlap, one around each cell
FLOOR = 0.1  # contrast (SD) below which a correlation fades to 0, as a share of that of the whole image
LEAST_COUNT = 0.4  # share of a block that both images must show
SAMPLES = 24.0  # independent voxels of a block: how sharply a lower correlation rules a place out


class BlockMatches(NamedTuple):
    """The blocks of an image, one around each cell of a coarse grid [i, j, k].

    Attributes:
      correlation: of the images where they are, -1 to 1, or 0 to 1 where the sign doesn't count.
      best: the highest correlation of all places that were tried.
      elsewhere: mean correlation at the places farthest away.
      residual: [i, j, k, 3] in voxels, from the block to its best place.
      expected: in voxels, the mean distance to the right place, weighted by how likely each place is.
      curvature: of the correlation at the best place, per squared voxel, along the axis that holds it least.
      texture: 0 to 1, how much of the block's contrast is above the floor, in the image with more of it.
      counts: whether both images show enough of the block.
    """

    correlation: Float[AnyArray, "i j k"]
    best: Float[AnyArray, "i j k"]
    elsewhere: Float[AnyArray, "i j k"]
    residual: Float[AnyArray, "i j k 3"]
    expected: Float[AnyArray, "i j k"]
    curvature: Float[AnyArray, "i j k"]
    texture: Float[AnyArray, "i j k"]
    counts: Float[AnyArray, "i j k"]


@functools.partial(jax.jit, static_argnames=("cell", "radius", "signed"))
def match_blocks(
    fixed: Float[AnyArray, "x y z"],
    warped: Float[AnyArray, "x y z"],
    fixed_mask: Float[AnyArray, "x y z"],
    warped_mask: Float[AnyArray, "x y z"],
    spacing: Float[AnyArray, " 3"],
    *,
    cell: tuple[int, int, int],
    radius: tuple[int, int, int],
    signed: bool,
) -> BlockMatches:
    """Compares each block of an image with the places around it in another.

    Args:
      fixed: [x, y, z], a multiple of `cell` along each axis.
      warped: [x, y, z] on the same grid.
      fixed_mask: [x, y, z], 1 where the fixed image counts, else 0.
      warped_mask: [x, y, z], likewise.
      spacing: [3], size of a voxel in units in which distances are given.
      cell: voxels of a cell.
      radius: voxels to either side that are tried.
      signed: whether what is bright in one image must be bright in the other.

    Returns:
      The blocks; distances are in the unit of `spacing`.
    """
    places = np.array(list(itertools.product(*(range(-r, r + 1) for r in radius))))
    fixed = _standardised(fixed, fixed_mask)
    warped = _standardised(warped, warped_mask)
    fixed_moments = jnp.stack([fixed_mask, fixed * fixed_mask, fixed**2 * fixed_mask])
    warped_moments = jnp.stack([warped_mask, warped * warped_mask, warped**2 * warped_mask])
    padded = jnp.pad(warped_moments, ((0, 0), *((r, r) for r in radius)))
    whole = float(np.prod(cell)) * WINDOW**3

    def correlations(place: jax.Array) -> tuple[jax.Array, ...]:
        x, y, z = (place[i] + radius[i] for i in range(3))
        w = lax.dynamic_slice(padded, (0, x, y, z), warped_moments.shape)
        f = fixed_moments
        products = jnp.stack([f[0] * w[0], f[1] * w[0], f[0] * w[1], f[2] * w[0], f[0] * w[2], f[1] * w[1]])
        n, f_sum, w_sum, ff, ww, fw = _block_sums(products, cell)
        n = jnp.maximum(n, 1)
        variance_f = jnp.maximum(ff - f_sum**2 / n, 0) / n
        variance_w = jnp.maximum(ww - w_sum**2 / n, 0) / n
        covariance = (fw - f_sum * w_sum / n) / n
        ncc = covariance / jnp.sqrt((variance_f + FLOOR**2) * (variance_w + FLOOR**2))
        enough = (n >= LEAST_COUNT * whole).astype(jnp.float32)
        texture = jnp.maximum(variance_f, variance_w)
        return jnp.clip(ncc if signed else jnp.abs(ncc), -1, 1) * enough, enough, texture

    surface, enough, texture = lax.map(correlations, jnp.asarray(places))  # [s, i, j, k]
    return _summarise(surface, enough, texture, places, radius, spacing)


def _summarise(
    surface: jax.Array,
    enough: jax.Array,
    texture: jax.Array,
    places: np.ndarray,
    radius: Sequence[int],
    spacing: AnyArray,
) -> BlockMatches:
    here = len(places) // 2
    outermost = (np.abs(places) == np.array(radius)).any(axis=1) & (places != 0).any(axis=1)
    far = outermost.astype(np.float32)[:, None, None, None] * enough
    elsewhere = jnp.sum(surface * far, axis=0) / jnp.maximum(jnp.sum(far, axis=0), 1)
    best = jnp.argmax(surface + 1e-5 * (jnp.arange(len(places)) == here)[:, None, None, None], axis=0)
    peak = jnp.max(surface, axis=0)
    offset, bends = _vertex(surface, best, places, radius)
    residual = (jnp.asarray(places, jnp.float32)[best] + offset) * spacing
    # The likelihood of a place if so many voxels of the block were independent and normal.
    positive = jnp.clip(surface, 0, 0.99)
    likelihood = -0.5 * SAMPLES * jnp.log1p(-(positive**2)) + jnp.log(jnp.maximum(enough, 1e-6))
    weights = jax.nn.softmax(likelihood, axis=0)
    distances = jnp.linalg.norm(jnp.asarray(places, jnp.float32) * spacing, axis=-1)
    within = 0.25 * jnp.min(spacing)  # of a voxel: no place is right to the last digit
    expected = jnp.sqrt(within**2 + jnp.einsum("sijk,s->ijk", weights, distances) ** 2)
    variance = texture[here]
    return BlockMatches(
        surface[here],
        peak,
        elsewhere,
        residual,
        expected,
        jnp.min(-bends / spacing**2, axis=-1),
        variance / (variance + 4 * FLOOR**2),
        enough[here],
    )


def _vertex(
    surface: jax.Array, best: jax.Array, places: np.ndarray, radius: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """[i, j, k, 3] twice: from the best place to the top of a parabola along each axis, at most half a voxel,
    and the second difference of the correlation there."""
    widths = [2 * r + 1 for r in radius]
    strides = [widths[1] * widths[2], widths[2], 1]
    offsets, bends = [], []
    for axis in range(3):
        coordinate = jnp.asarray(places[:, axis])[best]
        inner = jnp.abs(coordinate) < radius[axis]
        step = strides[axis]

        def at(index: jax.Array) -> jax.Array:
            return jnp.take_along_axis(surface, jnp.clip(index, 0, len(places) - 1)[None], axis=0)[0]

        below, top, above = at(best - step), at(best), at(best + step)
        bend = jnp.minimum(below - 2 * top + above, -1e-4)
        offsets.append(jnp.where(inner, jnp.clip(0.5 * (below - above) / bend, -0.5, 0.5), 0))
        bends.append(jnp.where(inner, bend, 0))
    return jnp.stack(offsets, axis=-1), jnp.stack(bends, axis=-1)


def _standardised(image: AnyArray, mask: AnyArray) -> AnyArray:
    n = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(image * mask) / n
    sd = jnp.sqrt(jnp.sum((image - mean) ** 2 * mask) / n)
    return (image - mean) / jnp.maximum(sd, 1e-6) * mask


def _block_sums(moments: jax.Array, cell: Sequence[int]) -> Array:
    """[c, i, j, k]: sums of [c, x, y, z] over the blocks around each cell."""
    c, *shape = moments.shape
    split = [size for n, width in zip(shape, cell, strict=True) for size in (n // width, width)]
    sums = moments.reshape(c, *split).sum(axis=(2, 4, 6))
    return lax.reduce_window(sums, 0.0, lax.add, (1, *[WINDOW] * 3), (1, 1, 1, 1), "SAME")
