"""Composition of displacements, their inverse, and the flow of a stationary velocity."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.sampling import warp

Map = Callable[[Float[Array, "*n 3"]], Float[Array, "*n 3"]]  # of points or vectors
DAMPING = 0.6  # undamped, a stretch to the double would not converge


def compose(
    first: Float[AnyArray, "b x y z 3"], second: Float[AnyArray, "b x y z 3"]
) -> Float[Array, "b x y z 3"]:
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

    Examples:
      >>> along_x = jnp.zeros((1, 4, 4, 4, 3)).at[..., 0].set(1)
      >>> compose(along_x, 2 * along_x)[0, 0, 0, 0].tolist()
      [3.0, 0.0, 0.0]
    """
    if first.shape != second.shape:
        raise ValueError(f"displacements live on different grids: {first.shape} and {second.shape}")
    return warp(first, second) + second


def invert(displacement: Float[AnyArray, "b x y z 3"], *, iterations: int = 20) -> Float[Array, "b x y z 3"]:
    """The displacement back: `compose(u, invert(u))` is zero, wherever the map stays inside its grid.

    By the fixed point `v(q) = -u(q + v(q))`, damped: it converges where the map `p + u(p)` doesn't fold and
    stretches less than threefold, fast unless it presses together a lot. Outside its grid, `u` keeps its
    border values.

    Args:
      displacement: [b, x, y, z, 3] in voxels.
      iterations: each costs one warp.

    Returns:
      [b, x, y, z, 3] in voxels of the same grid.

    Examples:
      >>> along_x = jnp.zeros((1, 4, 4, 4, 3)).at[..., 0].set(1)
      >>> float(invert(along_x)[0, 0, 0, 0, 0])
      -1.0

    Reference:
      Chen, Lu, Chen, Ruchala and Olivera, A simple fixed-point approach to invert a deformation field,
      Medical Physics 2008.
    """

    def improve(inverse: Array, _: None) -> tuple[Array, None]:
        # Each eigenvalue e of the gradient of u shrinks the error by 1 - DAMPING (1 + e).
        return inverse - DAMPING * (inverse + warp(displacement, inverse)), None

    return jax.lax.scan(improve, -jnp.asarray(displacement), length=iterations)[0]


def points_before(
    targets: Float[AnyArray, "*n 3"],
    start: Float[AnyArray, "*n 3"],
    *,
    displaced: Map,
    back: Map,
    iterations: int,
) -> Float[Array, "*n 3"]:
    """The points that a map takes to targets, by the fixed point of `invert` around its linear part.

    Args:
      targets: [..., 3].
      start: [..., 3], near the result.
      displaced: the map, of points [..., 3].
      back: the inverse of the linear part of the map, of vectors [..., 3].
      iterations: each costs one call of the map.

    Returns:
      [..., 3].
    """

    def improve(points: Array, _: None) -> tuple[Array, None]:
        return points - DAMPING * back(displaced(points) - targets), None

    return jax.lax.scan(improve, jnp.asarray(start), length=iterations)[0]


def exponential(velocity: Float[AnyArray, "b x y z 3"], *, squarings: int = 6) -> Float[Array, "b x y z 3"]:
    """The displacement after flowing for a unit of time along a stationary velocity: scaling and squaring.

    A diffeomorphism up to interpolation, whose inverse is `exponential(-velocity)`.

    Args:
      velocity: [b, x, y, z, 3] in voxels by unit of time.
      squarings: the first step is `velocity / 2**squarings`: it should be a fraction of a voxel.

    Returns:
      [b, x, y, z, 3] in voxels.

    Examples:
      >>> along_x = jnp.zeros((1, 4, 4, 4, 3)).at[..., 0].set(1)
      >>> exponential(along_x)[0, 0, 0, 0].tolist()
      [1.0, 0.0, 0.0]

    Reference:
      Arsigny, Commowick, Pennec and Ayache, A log-Euclidean framework for statistics on diffeomorphisms,
      MICCAI 2006.
    """

    def square(displacement: Array, _: None) -> tuple[Array, None]:
        return compose(displacement, displacement), None

    return jax.lax.scan(square, jnp.asarray(velocity) / 2**squarings, length=squarings)[0]
