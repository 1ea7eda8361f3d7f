"""Trees of vessels: branches that fork and become thinner."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adregnet_jax.synthesis.draw import normals, uniforms

_GENERATIONS = 8
_WIDEST = 2.0  # voxels, radius of the first generation
_NARROWING = 0.75


def vessel_trees(
    key: PRNGKeyArray, origins: Float[Array, "n 3"], *, shape: tuple[int, ...]
) -> Bool[Array, "n x y z"]:
    """Masks of trees that start at the given voxels.

    Args:
      key: random key.
      origins: [n, 3] in voxels.
      shape: (x, y, z) of the volume.

    Returns:
      [n, x, y, z].
    """
    branches = 1 + sum(2 ** (1 + n) for n in range(_GENERATIONS))
    ways, widths = jax.random.split(key)
    numbers = normals(ways, (len(origins), branches, 3))
    (radii,) = uniforms(widths, (1.0, _WIDEST, len(origins)))
    draw = functools.partial(_voxels, shape=shape)
    voxels = jax.vmap(draw)(numbers, radii, origins)
    mask = jnp.zeros((len(origins), math.prod(shape)), bool)
    mask = jax.vmap(lambda own, index: own.at[index].set(True, mode="drop"))(mask, voxels)
    return mask.reshape(-1, *shape)


def _voxels(numbers: Array, radius: Array, origin: Array, shape: tuple[int, ...]) -> Array:
    """Flat indices of the voxels of a tree, or the size of the volume where there is none.

    `numbers` [branches, 3] are normal: the random part of each direction.
    """
    ends = origin[None]  # [branches, 3]
    first, *turns = jnp.split(numbers, np.cumsum([2**n for n in range(_GENERATIONS + 1)])[:-1])
    ways = _directions(first)
    length, widest = 0.22 * min(shape), _WIDEST
    drawn = []
    for turn in turns:
        ends, ways = jnp.repeat(ends, 2, axis=0), jnp.repeat(ways, 2, axis=0)
        ways = _directions(ways + 0.8 * turn)
        steps = jnp.linspace(0, 1, math.ceil(length) + 1)[:, None, None]
        points = (ends[None] + steps * length * ways[None]).reshape(-1, 1, 3)
        ball = _ball(widest)
        i, j, k = jnp.moveaxis(jnp.round(points + ball[None]).astype(jnp.int32), -1, 0)  # [points, ball]
        inside = (np.linalg.norm(ball, axis=-1) <= radius)[None]
        for place, n in zip((i, j, k), shape, strict=True):
            inside = inside & (place >= 0) & (place < n)
        drawn.append(jnp.where(inside, (i * shape[1] + j) * shape[2] + k, math.prod(shape)).ravel())
        ends = ends + length * ways
        length, radius, widest = 0.78 * length, _NARROWING * radius, _NARROWING * widest
    return jnp.concatenate(drawn)


def _ball(radius: float) -> np.ndarray:
    """[n, 3]: steps to the voxels that are nearer than `radius`."""
    reach = np.arange(-math.ceil(radius) + 1, math.ceil(radius))
    steps = np.stack(np.meshgrid(reach, reach, reach, indexing="ij"), axis=-1).reshape(-1, 3)
    return steps[np.linalg.norm(steps, axis=1) < radius]


def _directions(vectors: Array) -> Array:
    return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
