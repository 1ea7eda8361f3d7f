"""The 3-D U-Net of section III-B1, eq. 4-7."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from adregnet_jax.nn.layers import ConvBlock, Downsample, Upsample


class Backbone(nn.Module):
    """Decoder features of one image at every level; fixed and moving images go through the same parameters.

    Attributes:
      channels: of each level, fine to coarse.
      finest_level: the last level that is decoded.
      dtype: of the activations.
    """

    channels: tuple[int, ...]
    finest_level: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: jax.Array) -> list[jax.Array]:
        """[b, x, y, z, 1] -> the levels [b, x / 2^l, y / 2^l, z / 2^l, channels[l]], coarse to fine.

        The sizes must be multiples of 2^(levels - 1).
        """
        encoded = []  # eq. 4, 5
        features = image
        for level, channels in enumerate(self.channels):
            if level:
                features = Downsample(channels, dtype=self.dtype, name=f"down_{level}")(features)
            features = ConvBlock(channels, dtype=self.dtype, name=f"encoder_{level}_a")(features)
            features = ConvBlock(channels, dtype=self.dtype, name=f"encoder_{level}_b")(features)
            encoded.append(features)

        decoded = [features]  # eq. 6, 7; the coarsest level has nothing below it to decode
        for level in reversed(range(self.finest_level, len(self.channels) - 1)):
            channels = self.channels[level]
            features = Upsample(channels, dtype=self.dtype, name=f"up_{level}")(features)
            features = jnp.concatenate([features, encoded[level]], axis=-1)
            features = ConvBlock(channels, dtype=self.dtype, name=f"decoder_{level}_a")(features)
            features = ConvBlock(channels, dtype=self.dtype, name=f"decoder_{level}_b")(features)
            decoded.append(features)
        return decoded
