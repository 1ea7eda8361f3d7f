"""MIND-SSC: a description of each voxel's surroundings that scans of different contrast share."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.filters import box_mean
from adregnet_jax.ops.slabs import halo, mean_over_slabs, slab_count

# The six neighbours of a voxel, and the twelve pairs of them that are no opposites.
NEIGHBOURS = np.array([(-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, -1), (0, 0, 1)])
PAIRS = [(a, b) for a, b in itertools.combinations(range(6), 2) if np.any(NEIGHBOURS[a] + NEIGHBOURS[b])]
VARIANCE_RANGE = (1e-3, 1e3)  # of the local variance, in means over the volume


def mind_ssc(
    volume: Float[AnyArray, "b x y z 1"], *, radius: int = 1, dilation: int = 2
) -> Float[Array, "b x y z 12"]:
    """Self-similarity context: how alike the patches around a voxel are, two by two.

    `exp(-(D - min D) / V)`, where D are the twelve mean squared differences between patches at neighbours of
    the voxel and V is their mean, kept within a thousandth and a thousand times its mean over the volume.
    Blind to gain and offset, and to the sign of contrast. Beyond the border the outermost voxels repeat.

    Args:
      volume: [b, x, y, z, 1].
      radius: of the patches, which are 2 * radius + 1 voxels wide.
      dilation: distance in voxels from the voxel to the centres of the patches.

    Returns:
      [b, x, y, z, 12], 0 to 1. A constant volume gives 1 everywhere.

    Raises:
      ValueError: wrong shape.

    Examples:
      >>> image = jnp.arange(512.0).reshape(1, 8, 8, 8, 1) % 7
      >>> bool(jnp.allclose(mind_ssc(image), mind_ssc(3 - 2 * image), atol=1e-5))
      True

    Reference:
      Heinrich et al., Towards realtime multimodal fusion for image-guided interventions using
      self-similarities, MICCAI 2013.
    """
    if volume.ndim != 5 or volume.shape[-1] != 1:
        raise ValueError(f"volume must be [b, x, y, z, 1], got shape {volume.shape}")
    shape = volume.shape[1:4]
    padding = [(dilation, dilation)] * 3
    if slab_count() > 1:
        volume, padding[0] = halo(volume, dilation, dilation, repeat_border=True), (0, 0)
    padded = jnp.pad(volume, ((0, 0), *padding, (0, 0)), mode="edge")

    def neighbour(index: int) -> Array:
        first = dilation * (1 + NEIGHBOURS[index])
        return padded[(slice(None), *(slice(i, i + n) for i, n in zip(first, shape, strict=True)))]

    squared = jnp.concatenate([(neighbour(a) - neighbour(b)) ** 2 for a, b in PAIRS], axis=-1)
    distances = box_mean(squared, 2 * radius + 1)
    distances = distances - jnp.min(distances, axis=-1, keepdims=True)
    variance = jnp.mean(distances, axis=-1, keepdims=True)
    typical = mean_over_slabs(jnp.mean(variance, axis=(1, 2, 3), keepdims=True))
    low, high = VARIANCE_RANGE
    # A constant volume has no variance at all: 0 / tiny, where 0 / 0 would be NaN. The gradient divides by
    # the square of it.
    variance = jnp.maximum(jnp.clip(variance, low * typical, high * typical), 1e-18)
    return jnp.exp(-distances / variance)
