"""Multi-resolution synthesis of the displacement, section III-B4, eq. 13-15."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.nn.layers import Conv, ConvBlock


class FieldHead(nn.Module):
    """The candidate displacement of a level from its features, `f_DVF` of eq. 13."""

    features: int
    dtype: str = "float32"
    field_dtype: str = "float32"  # in which the field is made; a small correction may be made in bfloat16
    convolution: str = "auto"

    @nn.compact
    def __call__(self, features: Float[Array, "b x y z c"]) -> Float[Array, "b x y z 3"]:
        """[b, x, y, z, c] -> [b, x, y, z, 3] float32, in voxels of the level."""
        block = ConvBlock(self.features, dtype=self.dtype, convolution=self.convolution, name="block")
        hidden = block(features)
        # Small at the start, so that training begins near the identity.
        last = Conv(3, initial_scale=1e-4, dtype=self.field_dtype, convolution=self.convolution, name="field")
        field = last(hidden)
        return field.astype(jnp.float32)


class Fusion(nn.Module):
    """Blends the candidate of a level with the displacement from the coarser level, eq. 14 and 15.

    `f_weight`, "a convolutional network that generates the weight map", is one convolution here.
    """

    dtype: str = "float32"
    convolution: str = "auto"

    @nn.compact
    def __call__(
        self,
        candidate: Float[Array, "b x y z 3"],
        coarser: Float[Array, "b x y z 3"],
        attended: Float[Array, "b x y z c"],
        mask: Float[Array, "b x y z 1"],
    ) -> Float[Array, "b x y z 3"]:
        """Weighs the two displacements voxel by voxel.

        Args:
          candidate: [b, x, y, z, 3], the displacement found on this level.
          coarser: [b, x, y, z, 3], that of the coarser level, already resampled to this one.
          attended: [b, x, y, z, c], the features that the weights are made from.
          mask: [b, x, y, z, 1], the M^l of eq. 15.

        Returns:
          [b, x, y, z, 3].
        """
        conv = Conv(1, initial_scale=1e-2, dtype=self.dtype, convolution=self.convolution, name="weight")
        logit = conv(attended, coarser)
        weight = jax.nn.sigmoid(logit.astype(jnp.float32)) * mask  # eq. 15
        return weight * candidate + (1 - weight) * coarser
