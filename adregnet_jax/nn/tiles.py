"""A network on overlapping tiles of a volume, for machines on which the whole does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PyTree

from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.ops.arrays import AnyArray


def predict_in_tiles(
    model: nn.Module,
    params: PyTree[AnyArray],
    fixed: Float[AnyArray, "b x y z 1"],
    moving: Float[AnyArray, "b x y z 1"],
    *,
    tile: int,
) -> Float[Array, "b x y z 3"]:
    """The network's displacement, tile by tile.

    Neighbouring tiles share a quarter of their width or more. There the displacement goes over from one to
    the other linearly, so that it has no seams. A tile sees nothing beyond itself: motion as large as the
    overlap, and whatever the network takes from far away, wants the whole volume.

    Args:
      model: the network: `AdRegNet`, or another with the same inputs and outputs.
      params: its parameters.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      tile: width of a cubic tile in voxels, 4 or more; along an axis that is shorter, the tile is as well.

    Returns:
      [b, x, y, z, 3] in voxels.

    Raises:
      ValueError: a smaller tile.
    """
    if tile < 4:
        raise ValueError(f"a tile is 4 voxels wide or more, got {tile}")
    shape = fixed.shape[1:4]
    widths = tuple(min(tile, n) for n in shape)
    starts = np.array(list(itertools.product(*map(tile_starts, shape, widths))))  # [t, 3]
    ramps = [tile_ramp(width) for width in widths]
    x, y, z = np.ix_(*ramps)
    window = jnp.asarray(x * y * z, jnp.float32)[None, ..., None]

    def add_tile(n: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, weight = sums
        start = jnp.asarray(starts)[n]
        at = (0, *start, 0)
        both = [jax.lax.dynamic_slice(image, at, (image.shape[0], *widths, 1)) for image in (fixed, moving)]
        prediction = cast(Prediction, model.apply({"params": params}, *both))
        return (
            _add_at(total, window * prediction.displacement, at),
            _add_at(weight, window, at),
        )

    start = (jnp.zeros((*fixed.shape[:4], 3)), jnp.zeros((1, *shape, 1)))
    total, weight = jax.lax.fori_loop(0, len(starts), add_tile, start)
    return total / weight


def tile_starts(n: int, width: int) -> list[int]:
    """First voxels of the fewest tiles that cover `n` voxels and share a quarter of their width or more."""
    step = width - width // 4
    count = 1 + -(-(n - width) // step)
    return [round(start) for start in np.linspace(0, n - width, count)]


def tile_ramp(width: int) -> Float[np.ndarray, " width"]:
    """The weight of each voxel along one side of a tile: 1, and down to 0 over a quarter at either end."""
    place = np.arange(width) + 0.5
    return np.minimum(1, np.minimum(place, width - place) / (width // 4 or 1))


def _add_at(array: jax.Array, addend: jax.Array, at: Sequence[int | jax.Array]) -> jax.Array:
    here = jax.lax.dynamic_slice(array, at, addend.shape)
    return jax.lax.dynamic_update_slice(array, here + addend, at)
