"""Random motions: smooth waves with an affine map, as between people, or a breath. None folds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adregnet_jax.data.datasets.synthetic import LEAST_DETERMINANT
from adregnet_jax.synthesis.draw import normals, smooth_noise, uniforms, whole

_BREATHS = 0.4  # share of the motions
_WAVES = ((2, 1.0), (3, 0.7), (5, 0.4), (8, 0.2))  # number across the volume, largest size


def draw_motion(
    key: PRNGKeyArray,
    shape: tuple[int, int, int],
    *,
    spacing_mm: tuple[float, float, float],
    largest_mm: float | Array,
) -> Float[Array, "x y z 3"]:
    """A random displacement in voxels whose determinant is at least `LEAST_DETERMINANT`.

    Args:
      key: random key.
      shape: (x, y, z) of the fixed grid.
      spacing_mm: size of a voxel.
      largest_mm: bound of the displacement; each motion draws its size from 10 to 100 % of it.

    Returns:
      [x, y, z, 3].
    """
    own, numbers = jax.random.split(key)
    kind, size = uniforms(numbers, (0, 1), (0.1, 1))
    motion = jax.lax.cond(
        kind < _BREATHS,
        lambda: _breath(own, shape),
        lambda: _waves(own, shape, np.asarray(spacing_mm)),
    )  # [3, x, y, z] mm, up to a factor
    longest = jnp.sqrt(jnp.max(jnp.sum(motion**2, axis=0)))
    scale = largest_mm * size / longest
    motion = motion * (scale / np.asarray(spacing_mm, np.float32))[:, None, None, None]
    return jnp.moveaxis(motion * _unfolding_factor(motion), 0, -1)


def _breath(key: PRNGKeyArray, shape: tuple[int, int, int]) -> Array:
    """A shift along one axis that fades behind a slanted front."""
    noise, numbers = jax.random.split(key)
    axis, front, slant, width, waves, cells, signs = uniforms(
        numbers, (0, 1), (-0.6, 0.6), (-0.4, 0.4), (0.4, 1.0), (0.1, 0.3), (3, 6), (-1, 1, 2)
    )
    along = jnp.arange(3) == jnp.sum(axis > jnp.array([0.15, 0.3]))  # z in 70 % of the cases
    grid = jnp.meshgrid(*(jnp.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    main, next_one = (_combine(on, grid) for on in (along, jnp.roll(along, 1)))
    way, fading = jnp.sign(signs)
    shift = way * (1 + jnp.tanh(fading * (main - front - slant * next_one) / width))
    motion = waves * smooth_noise(noise, shape, whole(cells), most_cells=5, count=3)
    return motion + along[:, None, None, None] * shift[None]


def _waves(key: PRNGKeyArray, shape: tuple[int, int, int], spacing_mm: np.ndarray) -> Array:
    """Smooth waves of several lengths and an affine map."""
    noise, normal, numbers = jax.random.split(key, 3)
    strength, *sizes = uniforms(numbers, (0, 0.7), *((0, size) for _, size in _WAVES))
    half_mm = (np.array(shape) - 1) / 2 * spacing_mm
    matrix = strength * normals(normal, (3, 3)) * (half_mm / half_mm.mean()).astype(np.float32)[None]
    grid = jnp.meshgrid(*(jnp.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    affine = jnp.stack([_combine(row, grid) for row in matrix])
    most_cells = max(cells for cells, _ in _WAVES)

    def add(motion: Array, wave: tuple[Array, Array, Array]) -> tuple[Array, None]:
        key, cells, size = wave
        return motion + size * smooth_noise(key, shape, cells, most_cells=most_cells, count=3), None

    waves = jax.random.split(noise, len(_WAVES)), jnp.array([cells for cells, _ in _WAVES]), jnp.stack(sizes)
    return jax.lax.scan(add, affine, waves)[0]


def _combine(factors: Array, grid: list[Array] | tuple[Array, ...]) -> Array:
    x, y, z = grid
    return factors[0] * x + factors[1] * y + factors[2] * z


def _unfolding_factor(motion: Array) -> Array:
    """The largest of 1, 0.85, 0.85^2, ... that scales a displacement [3, x, y, z] until it doesn't fold."""
    (a, b, c), (d, e, f), (g, h, i) = (jnp.gradient(component) for component in motion)
    # det(I + s G) is a polynomial in s, whose coefficients are the invariants of the gradient G.
    trace = a + e + i
    minors = a * e - b * d + a * i - c * g + e * i - f * h
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)

    def folds(factor: Array) -> Array:
        polynomial = 1 + factor * (trace + factor * (minors + factor * determinant))
        return jnp.min(polynomial) < LEAST_DETERMINANT

    return jax.lax.while_loop(folds, lambda factor: 0.85 * factor, jnp.float32(1))
