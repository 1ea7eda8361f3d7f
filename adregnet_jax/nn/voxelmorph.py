"""VoxelMorph, a baseline: one U-Net on the two images, without attention and without a pyramid of fields.

Balakrishnan et al., "An Unsupervised Learning Model for Deformable Medical Image Registration", CVPR 2018,
which names VoxelMorph-1 and -2, and "VoxelMorph: A Learning Framework for Deformable Medical Image
Registration", IEEE TMI 38 (8), 2019.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.nn.layers import ChannelDropout, Conv
from adregnet_jax.nn.precision import stored
from adregnet_jax.nn.prediction import Prediction, check_images, pad_to_multiple
from adregnet_jax.ops.arrays import AnyArray

# The authors' channels of the decoder: four at 1/16 to 1/2 of the resolution, one more at 1/2, the rest full.
VOXELMORPH_1 = (32, 32, 32, 32, 8, 8)
VOXELMORPH_2 = (32, 32, 32, 32, 32, 16, 16)


class VoxelMorph(nn.Module):
    """The network as the authors' code for the two papers has it.

    Each encoder layer is a 3x3x3 convolution of stride 2; each decoder layer one of stride 1. From the
    coarsest level on, a layer is followed by nearest upsampling and the encoder's features of that level; at
    half resolution there are two layers, and the full resolution is joined by the images. LeakyReLU(0.2) and
    no normalisation. The displacement is a last convolution.

    `decoder` has at least two entries more than `encoder`. Any input size, as in `AdRegNet`: volumes are
    padded to a multiple of 2^len(encoder), and the displacement is cropped back.

    `dropout` is not the authors': that share of the channels of each decoder layer is left out, in calls with
    a "dropout" key.
    """

    encoder: tuple[int, ...] = (16, 32, 32, 32)
    decoder: tuple[int, ...] = VOXELMORPH_2
    dropout: float = 0.0
    dtype: str = "float32"
    convolution: str = "auto"

    @property
    def multiple(self) -> int:
        """The sizes of what the levels can halve are multiples of it."""
        return 2 ** len(self.encoder)

    @nn.compact
    def __call__(
        self, fixed: Float[AnyArray, "b x y z 1"], moving: Float[AnyArray, "b x y z 1"]
    ) -> Prediction:
        """Estimates the displacement that warps `moving` onto `fixed`.

        Args:
          fixed: [b, x, y, z, 1], intensities in [0, 1].
          moving: [b, x, y, z, 1], on the same grid.

        Returns:
          A `Prediction` whose pyramid is the displacement alone.

        Raises:
          ValueError: shapes that differ or are not [b, x, y, z, 1].
        """
        check_images(fixed, moving)
        _, nx, ny, nz, _ = fixed.shape
        images = jnp.concatenate([moving, fixed], axis=-1)
        images = pad_to_multiple(images, self.multiple)
        layer = functools.partial(ConvLayer, dtype=self.dtype, convolution=self.convolution)
        levels = [images.astype(stored(self.dtype))]  # fine to coarse
        for n, features in enumerate(self.encoder):
            levels.append(layer(features, stride=2, name=f"encoder_{n}")(levels[-1]))

        volume = levels.pop()
        for n, features in enumerate(self.decoder):
            volume = layer(features, name=f"decoder_{n}")(volume)
            volume = ChannelDropout(self.dropout, name=f"dropout_{n}")(volume)
            # Not after the first of the two layers at half resolution.
            if levels and n != len(self.encoder) - 1:
                volume = jnp.concatenate([upsample_nearest(volume), levels.pop()], axis=-1)

        # The SD of the flow's kernel is 1e-5 at the start.
        scale = 1e-5**2 * 27 * volume.shape[-1]
        # In float32: bfloat16 has steps of a sixteenth of a voxel from 8 on.
        flow = Conv(3, initial_scale=scale, convolution=self.convolution, name="flow")(volume)
        displacement = flow[:, :nx, :ny, :nz]
        return Prediction(displacement, (displacement,), ())


class ConvLayer(nn.Module):
    """3x3x3 convolution with one voxel of zeros around, LeakyReLU(0.2). [b, x, y, z, c] -> [.., features]."""

    features: int
    stride: int = 1  # voxels 0, stride, 2 * stride ... are kept
    dtype: str = "float32"
    convolution: str = "auto"

    @nn.compact
    def __call__(self, volume: Float[Array, "b x y z c"]) -> Float[Array, "b x2 y2 z2 features"]:
        volume = Conv(
            self.features,
            initial_scale=2.0,
            dtype=self.dtype,
            convolution=self.convolution,
            name="conv",
        )(volume)
        # All voxels, then every second: XLA's gradients of a strided convolution take 13 times longer on CPU.
        volume = volume[:, :: self.stride, :: self.stride, :: self.stride]
        return nn.leaky_relu(volume, 0.2)


def upsample_nearest(volume: Float[Array, "b x y z c"]) -> Float[Array, "b 2*x 2*y 2*z c"]:
    """[b, x, y, z, c] -> [b, 2x, 2y, 2z, c]: each voxel eight times."""
    b, nx, ny, nz, c = volume.shape
    blocks = jnp.broadcast_to(volume[:, :, None, :, None, :, None], (b, nx, 2, ny, 2, nz, 2, c))
    return blocks.reshape(b, 2 * nx, 2 * ny, 2 * nz, c)
