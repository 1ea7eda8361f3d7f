"""Random numbers and smooth random fields."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

Interval = tuple[float, float] | tuple[float, float, int]


def uniforms(key: PRNGKeyArray, *intervals: Interval) -> list[Array]:
    """A number from each interval (low, high), or n numbers from each (low, high, n).

    All of them in one draw, because XLA takes a quarter of a second to compile a draw.
    """
    counts = [interval[2] if len(interval) == 3 else 1 for interval in intervals]
    parts = jnp.split(jax.random.uniform(key, (sum(counts),)), np.cumsum(counts)[:-1])
    numbers = [
        part if len(interval) == 3 else part[0] for part, interval in zip(parts, intervals, strict=True)
    ]
    return [low + (high - low) * u for (low, high, *_), u in zip(intervals, numbers, strict=True)]


def whole(number: Array) -> Array:
    """Rounds down: from the interval (2, 5), this is 2, 3 or 4."""
    return jnp.floor(number).astype(jnp.int32)


def normals(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Normal random numbers. Drawn along several short axes, they take XLA ten times as long to compile."""
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def smooth_noise(
    key: PRNGKeyArray, shape: tuple[int, ...], cells: int | Array, *, most_cells: int, count: int = 1
) -> Float[Array, "n x y z"]:
    """Smooth random fields of mean 0 and SD 1, `cells` waves across the volume.

    Cubic B-splines over a grid of random numbers. In each voxel the splines add up to 1, so mean and SD are
    set on the coarse grid, and the volume is written once.

    Args:
      key: random key.
      shape: (x, y, z) of the volume.
      cells: number of waves along each axis, from 1 to `most_cells`.
      most_cells: the largest possible number, which decides the size of the coarse grid.
      count: n, number of fields.

    Returns:
      [n, x, y, z].
    """
    weights = [_spline_weights(n, cells, most_cells + 3) for n in shape]
    numbers = normals(key, (count, *(most_cells + 3,) * 3))  # [n, i, j, k]
    mean = _einsum("nijk,i,j,k->n", numbers, *(w.mean(axis=0) for w in weights))
    numbers = numbers - mean[:, None, None, None]
    products = [_einsum("xi,xl->il", w, w) / len(w) for w in weights]
    variance = jnp.sum(numbers * _einsum("nlmo,il,jm,ko->nijk", numbers, *products), axis=(1, 2, 3))
    numbers = numbers / jnp.sqrt(variance)[:, None, None, None]
    return _einsum("nijk,xi,yj,zk->nxyz", numbers, *weights)


def _spline_weights(n: int, cells: int | Array, knots: int) -> Array:
    """[n, knots]: cubic B-splines at the centres of n voxels; those beyond `cells` cells are 0."""
    place = (jnp.arange(n) + 0.5) / n * cells
    distance = jnp.abs(place[:, None] - (jnp.arange(knots) - 1)[None])
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    far = jnp.clip(2 - distance, 0) ** 3 / 6
    return jnp.where(distance < 1, near, far)


def _einsum(subscripts: str, *operands: Array) -> Array:
    # TF32, the default of newer GPUs, has too few digits.
    return jnp.einsum(subscripts, *operands, precision="highest")
