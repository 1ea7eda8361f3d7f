"""The look of a label map in a scanner: intensities, textures, blur, bias field, noise and crop."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from adregnet_jax.synthesis.anatomy import MOST_LABELS
from adregnet_jax.synthesis.draw import normals, smooth_noise, uniforms, whole

_LARGEST_BLUR = 0.9 + 1.5  # voxels, SD
_TRUNCATE = 2.5  # SD
_HALVINGS = 16  # of the range of intensities, in the search for a percentile


def paint(key: PRNGKeyArray, labels: Int[Array, "x y z"]) -> Float[Array, "x y z"]:
    """A value for each label, and a texture.

    Args:
      key: random key.
      labels: [x, y, z], at most `MOST_LABELS`.

    Returns:
      [x, y, z].
    """
    noise, numbers = jax.random.split(key)
    values, strength, emptiness, voxels_a_wave = uniforms(
        numbers, (0, 1, 1 + MOST_LABELS), (0, 0.12, 1 + MOST_LABELS), (0, 1), (2.5, 6)
    )
    empty = (emptiness < 0.7) & (jnp.arange(1 + MOST_LABELS) == 0)
    values, strength = jnp.where(empty, 0, values), jnp.where(empty, 0, strength)
    size = min(labels.shape)
    texture = smooth_noise(noise, labels.shape, whole(size / voxels_a_wave), most_cells=int(size / 2.5))[0]
    return values[labels] + strength[labels] * texture


def recolour(key: PRNGKeyArray, image: Float[Array, "x y z"]) -> Float[Array, "x y z"]:
    """Maps intensities through a random curve that rises and falls; the background stays 0.

    Args:
      key: random key.
      image: [x, y, z], intensities in [0, 1].

    Returns:
      [x, y, z].
    """
    place = 4 * jnp.clip(image, 0, 1)
    heights = jax.random.uniform(key, (5,))
    curve = sum(height * jnp.maximum(1 - jnp.abs(place - n), 0) for n, height in enumerate(heights))
    return jnp.where(image > 0, curve, 0)


def acquire(
    key: PRNGKeyArray, image: Float[Array, "x y z"], exponent: Float[Array, ""]
) -> Float[Array, "x y z"]:
    """Simulates a scanner: partial volume, thick slices, bias field, noise, a crop.

    Args:
      key: random key.
      image: [x, y, z], any intensities.
      exponent: power of the intensities, once they are in [0, 1].

    Returns:
      [x, y, z] in [0, 1].
    """
    field_key, noise_key, numbers = jax.random.split(key, 3)
    width, thickness, axis, cells, bias, noise, margins, chances = uniforms(
        numbers, (0.3, 0.9), (0.5, 1.5), (0, 3), (1, 4), (0, 0.3), (0, 0.06), (0, 0.15, 6), (0, 1, 3)
    )
    thick, biased, cropped = chances < jnp.array([0.3, 0.5, 0.25])
    image = blur(image, width + jnp.where(thick & (jnp.arange(3) == whole(axis)), thickness, 0))
    image = rescale_percentiles(image) ** exponent
    field = smooth_noise(field_key, image.shape, whole(cells), most_cells=3)[0]
    image = image * jnp.exp(jnp.where(biased, bias, 0) * field)
    image = image + noise * normals(noise_key, image.shape)
    image = jnp.where(cropped & ~_box(margins.reshape(2, 3), image.shape), 0, image)
    return jnp.clip(image, 0, 1)


def _box(margins: Array, shape: tuple[int, ...]) -> Array:
    """[x, y, z] bool: the volume without the shares `margins` [2, 3] at its lower and upper sides."""
    low, high = whole(margins * jnp.array(shape)[None])
    grid = jnp.meshgrid(*(jnp.arange(n) for n in shape), indexing="ij", sparse=True)
    x, y, z = ((axis >= low[n]) & (axis < shape[n] - high[n]) for n, axis in enumerate(grid))
    return x & y & z


def blur(image: Float[Array, "x y z"], sigma: Float[Array, 3]) -> Float[Array, "x y z"]:
    """Gaussian filter with an SD of its own along each axis; the outermost voxels are repeated outside.

    Args:
      image: [x, y, z].
      sigma: [3] SD in voxels, at most 2.4.

    Returns:
      [x, y, z].
    """
    radius = int(_TRUNCATE * _LARGEST_BLUR + 0.5)
    steps = jnp.arange(-radius, radius + 1)
    for axis, n in enumerate(image.shape):
        near = jnp.abs(steps) <= jnp.floor(_TRUNCATE * sigma[axis] + 0.5)
        weights = jnp.where(near, jnp.exp(-0.5 * (steps / sigma[axis]) ** 2), 0)
        weights = weights / weights.sum()
        padded = jnp.pad(image, [(radius, radius) if k == axis else (0, 0) for k in range(3)], mode="edge")
        taps = (
            weight * jax.lax.slice_in_dim(padded, step, step + n, axis=axis)
            for step, weight in enumerate(weights)
        )
        image = functools.reduce(operator.add, taps)
    return image


def rescale_percentiles(image: Float[Array, "x y z"]) -> Float[Array, "x y z"]:
    """Clips an image at its percentiles 0.5 and 99.5 and maps them to [0, 1], as `data.preprocessing` does.

    The percentiles are found by bisection: sorting a volume takes longer than everything else. An image in
    which all voxels are equal becomes 0.

    Args:
      image: [x, y, z], any intensities.

    Returns:
      [x, y, z] in [0, 1].
    """
    goal = jnp.array([0.005, 0.995]) * image.size
    ends = jnp.stack([image.min(), image.max()])

    def halve(_: int | Array, bounds: Array) -> Array:
        middle = bounds.mean(axis=0)
        below = jnp.stack([jnp.sum(image <= value) for value in middle])
        return jnp.where((below < goal)[None], jnp.stack([middle, bounds[1]]), jnp.stack([bounds[0], middle]))

    start = jnp.broadcast_to(ends[:, None], (2, 2))  # [lower and upper bound, percentile]
    bottom, top = jax.lax.fori_loop(0, _HALVINGS, halve, start)[1]
    bottom, top = jnp.where(bottom < top, jnp.stack([bottom, top]), ends)
    return jnp.clip((image - bottom) / jnp.where(bottom < top, top - bottom, 1), 0, 1)
