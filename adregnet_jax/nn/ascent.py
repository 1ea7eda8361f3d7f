"""Learned gradient ascent on the similarity of the images. Not in the paper."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.nn.layers import Conv
from adregnet_jax.ops.convolution import conv3d
from adregnet_jax.ops.ncc import ncc_ascent
from adregnet_jax.ops.resampling import resize_displacement

STEP = 0.5  # voxels of the level for a gradient of 1/voxel, at the start; at 2 it overshoots


def level_ascent(
    images: Float[Array, "both X Y Z 1"], displacement: Float[Array, "b x y z 3"], window: int
) -> Float[Array, "b x y z 3"]:
    """The gradient of the images' local NCC by the displacement of a level.

    It is taken at the full resolution, where the loss is, and is its mean over the voxels that one of the
    level covers. No gradient goes through it: it is an input.

    Args:
      images: [2b, X, Y, Z, 1], fixed before moving, intensities in [0, 1]; a multiple of the level's shape.
      displacement: [b, x, y, z, 3] in voxels of the level.
      window: of the local NCC, an odd number of voxels of the images.

    Returns:
      [b, x, y, z, 3], 1/voxel of the images.

    Reference:
      Qiu, Hammernik, Qin, Chen and Rueckert, Embedding Gradient-based Optimization in Image Registration
      Networks, MICCAI 2022.
    """
    b, *shape = displacement.shape[:4]
    whole = images.shape[1:4]
    fixed, moving = jnp.split(images.astype(jnp.float32) - 0.5, 2)
    full = resize_displacement(jax.lax.stop_gradient(displacement), whole)
    ascent = jax.lax.stop_gradient(ncc_ascent(fixed, moving, full, window))
    (x, y, z), sides = shape, [n // m for n, m in zip(whole, shape, strict=True)]
    return ascent.reshape(b, x, sides[0], y, sides[1], z, sides[2], 3).mean((2, 4, 6))


class AscentStep(nn.Module):
    """A step from the gradient, the displacement, the step before and what was seen in the images.

    One convolution is linear and knows how large a gradient is: at the start it climbs by a smoothed gradient
    of fixed length. Small two-layer corrections that see the features come in addition.

    In a long training the levels before drift, probably because no gradient goes through the way uphill
    (docs/decisions.md): train these, then go on with the steps for a while.
    """

    features: int
    window: int
    dtype: str = "float32"
    convolution: str = "auto"

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "both X Y Z 1"],
        displacement: Float[Array, "b x y z 3"],
        before: Float[Array, "b x y z 3"],
        context: Float[Array, "b x y z c"],
    ) -> Float[Array, "b x y z 3"]:
        """Takes one step.

        Args:
          images: [2b, X, Y, Z, 1], fixed before moving, intensities in [0, 1].
          displacement: [b, x, y, z, 3] in voxels of the level.
          before: [b, x, y, z, 3], the step that led there.
          context: [b, x, y, z, c].

        Returns:
          [b, x, y, z, 3] float32, what is to be added to the displacement.
        """
        ascent = level_ascent(images, displacement, self.window)
        state = jnp.concatenate([ascent, displacement, before], axis=-1)
        kernel = self.param("kernel", _smoothed_first, (3, 3, 3, state.shape[-1], 3))
        step = conv3d([state], kernel, implementation=self.convolution, precision="highest")
        conv = functools.partial(Conv, dtype=self.dtype, convolution=self.convolution)
        hidden = nn.leaky_relu(conv(self.features, name="hidden")(state) + context, 0.2)
        correction = conv(3, initial_scale=1e-4, name="correction")(hidden)
        return step + correction.astype(jnp.float32)


def _smoothed_first(_key: jax.Array, shape: tuple[int, int, int, int, int]) -> jax.Array:
    """A kernel that smooths the first three channels, times `STEP`, and leaves out the others."""
    x, y, z = jnp.ix_(*[jnp.array([0.25, 0.5, 0.25])] * 3)
    return STEP * (x * y * z)[..., None, None] * jnp.eye(shape[3], shape[4])[None, None, None]
