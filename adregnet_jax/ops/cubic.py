"""Cubic B-spline interpolation of a volume at real-valued voxel coordinates."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Real

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.sampling import Padding


def sample_cubic(
    volume: Real[AnyArray, "x y z"], coordinates: Real[AnyArray, "*points 3"], *, padding: Padding = "border"
) -> Float[Array, "*points"]:
    """Values of one volume at voxel coordinates, by the cubic B-spline through its voxels.

    Smoother than trilinear samples and without their blur; it may overshoot the range of the volume at edges.
    The volume is mirrored at the centres of its outermost voxels, as SciPy's mode "mirror" does.

    Args:
      volume: [x, y, z], real numbers.
      coordinates: [..., 3] in voxels.
      padding: "border" repeats the outermost voxels; "zeros" is 0 beyond half a voxel outside the grid.

    Returns:
      [...] float32.

    Raises:
      ValueError: wrong shapes.

    Reference:
      Unser, Splines: a perfect fit for signal and image processing, IEEE Signal Processing Magazine 1999.
    """
    if volume.ndim != 3 or coordinates.shape[-1:] != (3,):
        raise ValueError(
            f"expected a volume [x, y, z] and coordinates [..., 3], got {volume.shape}, {coordinates.shape}"
        )
    coefficients = jnp.asarray(volume, jnp.float32)
    for axis, n in enumerate(volume.shape):
        solved = jnp.tensordot(_prefilter(n), coefficients, axes=(1, axis), precision="highest")
        coefficients = jnp.moveaxis(solved, 0, axis)

    indices, weights = [], []  # [axis][tap], each [...]
    for axis, n in enumerate(volume.shape):
        position = jnp.clip(coordinates[..., axis].astype(jnp.float32), 0, n - 1)
        lower = jnp.floor(position)
        weights.append(_weights(position - lower))
        indices.append([_mirror(lower.astype(jnp.int32) + tap, n) for tap in (-1, 0, 1, 2)])

    samples = jnp.zeros(coordinates.shape[:-1])
    for i, j, k in itertools.product(range(4), repeat=3):
        values = coefficients.at[indices[0][i], indices[1][j], indices[2][k]].get(mode="promise_in_bounds")
        samples = samples + weights[0][i] * weights[1][j] * weights[2][k] * values
    if padding == "zeros":
        samples = jnp.where(inside_grid(coordinates, volume.shape), samples, 0)
    return samples


def inside_grid(coordinates: Real[AnyArray, "*points 3"], shape: tuple[int, ...]) -> Bool[Array, "*points"]:
    """Whether coordinates lie in a voxel of the grid, at most half a voxel beyond its outermost centres.

    Args:
      coordinates: [..., 3] in voxels.
      shape: (x, y, z) of the grid.

    Returns:
      [...] bool.
    """
    highest = jnp.broadcast_to(jnp.array(shape) - 0.5, coordinates.shape)
    return jnp.all((coordinates >= -0.5) & (coordinates <= highest), axis=-1)


def _prefilter(n: int) -> np.ndarray:
    """[n, n]: the values of n voxels in a row to the coefficients of the spline through them."""
    spline = np.zeros((n, n))
    for tap, weight in ((-1, 1 / 6), (0, 4 / 6), (1, 1 / 6)):
        columns = np.abs(np.arange(n) + tap)
        columns = np.clip(n - 1 - np.abs(n - 1 - columns), 0, n - 1)
        np.add.at(spline, (np.arange(n), columns), weight)
    return np.linalg.inv(spline).astype(np.float32)


def _weights(fraction: jax.Array) -> list[jax.Array]:
    """The cubic B-spline at distances 1 + f, f, 1 - f and 2 - f."""
    rest = 1 - fraction
    return [
        rest**3 / 6,
        2 / 3 - fraction**2 * (2 - fraction) / 2,
        2 / 3 - rest**2 * (2 - rest) / 2,
        fraction**3 / 6,
    ]


def _mirror(index: jax.Array, n: int) -> jax.Array:
    # The clip keeps the promise of the gather for axes of one voxel and for NaN.
    return jnp.clip(n - 1 - jnp.abs(n - 1 - jnp.abs(index)), 0, n - 1)
