"""Composition of displacements."""

from __future__ import annotations

import jax

from adregnet_jax.ops.sampling import warp


def compose(first: jax.Array, second: jax.Array) -> jax.Array:
    """The one displacement that does what warping by `first`, then by `second` does.

    `warp(warp(m, first), second) = warp(m, compose(first, second))`, hence
    `compose(a, b)(p) = b(p) + a(p + b(p))`. Outside its grid, `first` keeps its border values.

    Args:
      first: [b, x, y, z, 3] in voxels.
      second: [b, x, y, z, 3] in voxels of the same grid.

    Returns:
      [b, x, y, z, 3].

    Raises:
      ValueError: the shapes differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"displacements live on different grids: {first.shape} and {second.shape}")
    return second + warp(first, second)
