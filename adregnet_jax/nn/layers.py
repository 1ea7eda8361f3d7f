"""The layers that the backbone and the field heads share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.nn.precision import products, stored
from adregnet_jax.ops.convolution import conv3d
from adregnet_jax.ops.cpu.budget import limit_bytes
from adregnet_jax.ops.cpu.chunks import map_nearby
from adregnet_jax.ops.normalisation import instance_norm


class Conv(nn.Module):
    """3x3x3 convolution, stride 1, zero padding. [b, x, y, z, c] -> [b, x, y, z, features].

    Several volumes count as if their channels were concatenated, which of large ones they never are.
    """

    features: int
    use_bias: bool = True
    initial_scale: float = 1.0
    dtype: str = "float32"
    convolution: str = "auto"

    @nn.compact
    def __call__(self, *volumes: Float[Array, "b x y z _"]) -> Float[Array, "b x y z features"]:
        init = nn.initializers.variance_scaling(self.initial_scale, "fan_in", "truncated_normal")
        channels = sum(volume.shape[-1] for volume in volumes)
        kernel = self.param("kernel", init, (3, 3, 3, channels, self.features))
        parts = [volume.astype(stored(self.dtype)) for volume in volumes]
        result = conv3d(
            parts,
            kernel.astype(stored(self.dtype)),
            implementation=self.convolution,
            precision=products(self.dtype),
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            result = add_bias(result, bias)
        return result


def add_bias(features: Float[Array, "*rest c"], bias: Float[Array, " c"]) -> Float[Array, "*rest c"]:
    """`features` [..., c] with `bias` [c] added in float32.

    The gradient of the bias is a sum over all voxels, which stops growing early in bfloat16.
    """
    bias = jnp.expand_dims(bias, range(features.ndim - 1))
    return (features.astype(jnp.float32) + bias).astype(features.dtype)


class DenseParameters(nn.Module):
    """Kernel [c, features] and bias of a dense layer, for who multiplies by them elsewhere."""

    c: int
    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self) -> tuple[Float[Array, ...], ...]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.c, self.features))
        if not self.use_bias:
            return (kernel,)
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,))


class JoinedDense(nn.Module):
    """A dense layer on the channels of several volumes together.

    They are concatenated chunk by chunk, never as whole large volumes.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, *volumes: Float[Array, "b x y z _"]) -> Float[Array, "b x y z features"]:
        """[b, x, y, z, c] of each -> [b, x, y, z, features]."""
        c = sum(volume.shape[-1] for volume in volumes)
        layer = DenseParameters(c, self.features)
        nn.share_scope(self, layer)
        kernel, bias = layer()

        def dense(_: object, parameters: tuple[jax.Array, jax.Array], *parts: jax.Array) -> tuple[jax.Array]:
            joined = jnp.concatenate([part.astype(stored(self.dtype)) for part in parts], axis=-1)
            return (_dense(joined, *parameters, precision=products(self.dtype)),)

        return _in_chunks(dense, volumes, (kernel, bias), c + self.features)


def _dense(
    features: jax.Array, kernel: jax.Array, bias: jax.Array, *, precision: jax.lax.Precision
) -> jax.Array:
    return add_bias(jnp.matmul(features, kernel.astype(features.dtype), precision=precision), bias)


def _in_chunks(
    function: Callable[..., tuple[jax.Array]],
    volumes: Sequence[jax.Array],
    parameters: tuple[jax.Array, ...],
    channels: int,
) -> jax.Array:
    """`function` of slices, each of which has so many channels a voxel as its intermediates."""
    (result,) = map_nearby(
        function,
        volumes,
        reach=0,
        slice_bytes=4 * channels * math.prod(volumes[0].shape[2:-1]),
        limit_bytes=limit_bytes("dense"),
        shared=parameters,
    )
    return result


class InstanceNorm(nn.Module):
    """Each channel of each volume to mean 0 and SD 1, then a learned scale and offset, and a leaky ReLU."""

    negative_slope: float = 1.0

    @nn.compact
    def __call__(self, volume: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        scale = self.param("scale", nn.initializers.ones, (volume.shape[-1],))
        offset = self.param("offset", nn.initializers.zeros, (volume.shape[-1],))
        return instance_norm(volume, scale, offset, negative_slope=self.negative_slope)


class ConvBlock(nn.Module):
    """Convolution, instance norm, LeakyReLU(0.2). The paper says "Conv block" and no more.

    Takes several volumes as `Conv` does.
    """

    features: int
    dtype: str = "float32"
    convolution: str = "auto"

    @nn.compact
    def __call__(self, *volumes: Float[Array, "b x y z _"]) -> Float[Array, "b x y z features"]:
        # A bias would be taken out again by the norm. Scale 2: half the variance is lost in the activation.
        volume = Conv(
            self.features,
            use_bias=False,
            initial_scale=2.0,
            dtype=self.dtype,
            convolution=self.convolution,
            name="conv",
        )(*volumes)
        return InstanceNorm(0.2, name="norm")(volume)


class ChannelDropout(nn.Module):
    """Sets a random share `rate` of the channels to 0 and divides the others by 1 - rate.

    Only where the call has a key, `apply(..., rngs={"dropout": key})`; the volume as it is without one.

    Whole channels, since neighbouring voxels say nearly the same: single voxels would come back through the
    next convolution (Tompson et al., "Efficient Object Localization Using Convolutional Networks", CVPR
    2015). The same channels in all images of the call: what is drawn is a network, not noise in its input
    (Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016), so fixed and moving features are
    still made alike and match, and pairs of a batch on several devices get what they get on one.
    """

    rate: float

    @nn.compact
    def __call__(self, volume: Float[Array, "b x y z c"]) -> Float[Array, "b x y z c"]:
        if not self.rate or not self.has_rng("dropout"):
            return volume
        return nn.Dropout(self.rate, broadcast_dims=(0, 1, 2, 3), deterministic=False)(volume)


class Downsample(nn.Module):
    """2x2x2 convolution, stride 2, as a dense layer on blocks of eight voxels: the same numbers, faster."""

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, volume: Float[Array, "b x y z c"]) -> Float[Array, "b x//2 y//2 z//2 features"]:
        b, nx, ny, nz, c = volume.shape
        parameters = DenseParameters(8 * c, self.features, name="dense")()

        def dense(
            _: object, parameters: tuple[jax.Array, jax.Array], pairs: jax.Array
        ) -> tuple[jax.Array]:  # of slices, [b, x / 2, 2, y, z, c]
            slices = pairs.reshape(pairs.shape[0], -1, ny, nz, c).astype(stored(self.dtype))
            return (_dense(space_to_depth(slices, 2), *parameters, precision=products(self.dtype)),)

        pairs = volume.reshape(b, nx // 2, 2, ny, nz, c)
        return _in_chunks(dense, [pairs], parameters, 2 * c + self.features)


def space_to_depth(volume: Float[Array, "b x y z c"], side: int) -> Float[Array, "b x2 y2 z2 c2"]:
    """Blocks of side^3 voxels become one voxel: [b, x, y, z, c] -> [b, x / side, ..., side^3 c].

    The sizes must be multiples of `side`.
    """
    b, nx, ny, nz, c = volume.shape
    blocks = volume.reshape(b, nx // side, side, ny // side, side, nz // side, side, c)
    blocks = blocks.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return blocks.reshape(b, nx // side, ny // side, nz // side, side**3 * c)


class Upsample(nn.Module):
    """2x2x2 transposed convolution, stride 2, as a dense layer whose outputs are blocks of eight voxels.

    It has a bias for each of the eight places, where a transposed convolution has one for all.
    """

    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, volume: Float[Array, "b x y z c"]) -> Float[Array, "b 2*x 2*y 2*z features"]:
        b, nx, ny, nz, c = volume.shape
        parameters = DenseParameters(c, 8 * self.features, name="dense")()

        def dense(_: object, parameters: tuple[jax.Array, jax.Array], part: jax.Array) -> tuple[jax.Array]:
            features = part.astype(stored(self.dtype))
            blocks = _dense(features, *parameters, precision=products(self.dtype))
            blocks = blocks.reshape(*part.shape[:4], 2, 2, 2, self.features)
            blocks = blocks.transpose(0, 1, 4, 2, 5, 3, 6, 7)
            return (blocks.reshape(*part.shape[:2], 2, 2 * ny, 2 * nz, self.features),)

        pairs = _in_chunks(dense, [volume], parameters, c + 16 * self.features)
        return pairs.reshape(b, 2 * nx, 2 * ny, 2 * nz, self.features)
