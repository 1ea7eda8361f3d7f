"""A learned step of gradient descent on the similarity of the images. Not in the paper."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from adregnet_jax.nn.layers import Conv
from adregnet_jax.ops.local_ncc import ncc_ascent
from adregnet_jax.ops.resampling import resize_displacement


def level_ascent(
    images: jax.Array, displacement: jax.Array, window: int, *, axis_name: str | None = None
) -> jax.Array:
    """The gradient of the images' local NCC by the displacement of a level.

    It is taken at the full resolution, where the loss is, and is its mean over the voxels that one of the
    level covers. No gradient goes through it: it is an input.

    Args:
      images: [2b, X, Y, Z, 1], fixed before moving, intensities in [0, 1]; a multiple of the level's shape.
      displacement: [b, x, y, z, 3] in voxels of the level.
      window: of the local NCC, an odd number of voxels of the images.
      axis_name: that of `ops.slabs`.

    Returns:
      [b, x, y, z, 3], 1/voxel of the images.

    Reference:
      Qiu, Hammernik, Qin, Chen and Rueckert, Embedding Gradient-based Optimization in Image Registration
      Networks, MICCAI 2022.
    """
    b, *shape = displacement.shape[:4]
    whole = images.shape[1:4]
    fixed, moving = jnp.split(images.astype(jnp.float32) - 0.5, 2)
    full = resize_displacement(jax.lax.stop_gradient(displacement), whole, axis_name=axis_name)
    ascent = jax.lax.stop_gradient(ncc_ascent(fixed, moving, full, window, axis_name=axis_name))
    (x, y, z), sides = shape, [n // m for n, m in zip(whole, shape, strict=True)]
    return ascent.reshape(b, x, sides[0], y, sides[1], z, sides[2], 3).mean((2, 4, 6))


class DescentStep(nn.Module):
    """A correction of the displacement from the way uphill, the displacement itself and the features.

    The heads normalise each instance, and lose how large a gradient is. This has no norm, and sees the
    displacement, so that it can smooth it as it goes.
    """

    features: int
    dtype: str = "float32"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, ascent: jax.Array, displacement: jax.Array, features: jax.Array) -> jax.Array:
        """ascent, displacement: [b, x, y, z, 3]; features: [b, x, y, z, c] -> [b, x, y, z, 3] float32."""
        common: dict[str, Any] = {"dtype": self.dtype, "axis_name": self.axis_name}
        hidden = Conv(self.features, **common, name="hidden")(ascent, displacement, features)
        # Small at the start, so that a network trained without it goes on from where it was.
        step = Conv(3, initial_scale=1e-4, **common, name="step")(nn.leaky_relu(hidden, 0.2))
        return step.astype(jnp.float32)
