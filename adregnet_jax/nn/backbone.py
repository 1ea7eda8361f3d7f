"""The 3-D U-Net of section III-B1, eq. 4-7."""

from __future__ import annotations

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.nn.layers import ChannelDropout, ConvBlock, Downsample, Upsample
from adregnet_jax.nn.remat import recomputed


class Backbone(nn.Module):
    """Decoder features of one image at every level; fixed and moving images go through the same parameters.

    Attributes:
      channels: of each level, fine to coarse.
      finest_level: the last level that is decoded.
      dropout: share of the channels that are left out of the features of each level, with a "dropout" key.
      dtype: of the activations.
      convolution: see `ops.convolution`.
      remat: compute the inside of each block again for its gradient, instead of keeping it.

    Dropout is in the decoder alone, as in Bayesian SegNet (Kendall et al., BMVC 2017): matching and field
    heads of every level read these features, so that a doubt of any level reaches the displacement, while the
    edges that the encoder finds stay.
    """

    channels: tuple[int, ...]
    finest_level: int = 0
    dropout: float = 0.0
    dtype: str = "float32"
    convolution: str = "auto"
    remat: bool = False

    @nn.compact
    def __call__(self, image: Float[Array, "b x y z c"]) -> list[Float[Array, "b _ _ _ _"]]:
        """[b, x, y, z, c] -> the levels [b, x / 2^l, y / 2^l, z / 2^l, channels[l]], coarse to fine.

        The sizes must be multiples of 2^(levels - 1).
        """

        def block(channels: int, *volumes: jax.Array, name: str) -> jax.Array:
            module = ConvBlock(channels, dtype=self.dtype, convolution=self.convolution, name=name)
            return recomputed(module, *volumes) if self.remat else module(*volumes)

        encoded = []  # eq. 4, 5
        features = image
        for level, channels in enumerate(self.channels):
            if level:
                features = Downsample(channels, dtype=self.dtype, name=f"down_{level}")(features)
            features = block(channels, features, name=f"encoder_{level}_a")
            features = block(channels, features, name=f"encoder_{level}_b")
            encoded.append(features)

        # eq. 6, 7; the coarsest level has nothing below it to decode
        features = ChannelDropout(self.dropout, name=f"dropout_{len(self.channels) - 1}")(features)
        decoded = [features]
        for level in reversed(range(self.finest_level, len(self.channels) - 1)):
            channels = self.channels[level]
            features = Upsample(channels, dtype=self.dtype, name=f"up_{level}")(features)
            features = block(channels, features, encoded[level], name=f"decoder_{level}_a")
            features = block(channels, features, name=f"decoder_{level}_b")
            features = ChannelDropout(self.dropout, name=f"dropout_{level}")(features)
            decoded.append(features)
        return decoded
