"""The 3x3x3 convolution and its derivatives by oneDNN, on CPU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.cpu import onednn
from adregnet_jax.ops.cpu.budget import limit_bytes
from adregnet_jax.ops.cpu.chunks import chunk, delayed, for_each_chunk, joined, slices_a_chunk, taps_of_parts


@jax.custom_vjp
def onednn_conv3d(
    parts: tuple[Float[Array, "b x y z _"], ...], kernel: Float[Array, "3 3 3 _ out"]
) -> Float[Array, "b x y z out"]:
    """`conv3d` of a tuple of volumes on CPU, all in float32 or all in bfloat16.

    oneDNN convolves bfloat16 more slowly than float32, so volumes are converted chunk by chunk. Several large
    volumes are joined chunk by chunk as well.
    """
    dtype = parts[0].dtype
    kernel = kernel.astype(jnp.float32)
    result_bytes = 4 * kernel.shape[-1] * math.prod(parts[0].shape[:4])
    if dtype == jnp.float32 and (len(parts) == 1 or result_bytes <= limit_bytes("onednn_sum")):
        own = taps_of_parts(kernel, parts)
        result = onednn.convolve(parts[0], own[0], (1, 1, 1))
        for part, taps in zip(parts[1:], own[1:], strict=True):
            result = onednn.convolve(part, taps, (1, 1, 1), result)
        return result

    b, nx, ny, nz, _ = parts[0].shape
    slices = _slices(parts, sum(kernel.shape[-2:]))

    def convolved(n: jax.Array) -> jax.Array:
        volume = joined([chunk(part, n, slices, halo=1) for part in parts])
        return onednn.convolve(volume.astype(jnp.float32), kernel, (0, 1, 1)).astype(dtype)

    result = for_each_chunk(convolved, b * nx // slices, *parts, kernel)
    return result.reshape(b, nx, ny, nz, -1)


_Saved = tuple[tuple[jax.Array, ...], jax.Array]


def _forward(parts: tuple[jax.Array, ...], kernel: jax.Array) -> tuple[jax.Array, _Saved]:
    return onednn_conv3d(parts, kernel), (parts, kernel)


def _backward(saved: _Saved, gradient: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    parts, kernel = saved
    to_kernel = _kernel_gradient(parts, gradient).astype(kernel.dtype)
    # Only the optimiser needs the gradient in the kernel: XLA would put it off and keep the parts until then.
    return _volume_gradients(parts, delayed(kernel, to_kernel), gradient), to_kernel


onednn_conv3d.defvjp(_forward, _backward)


def _volume_gradients(
    parts: tuple[jax.Array, ...], kernel: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, ...]:
    mirrored = jnp.flip(kernel, (0, 1, 2))
    return tuple(onednn_conv3d((gradient,), own.swapaxes(3, 4)) for own in taps_of_parts(mirrored, parts))


@jax.custom_vjp
def _kernel_gradient(
    parts: tuple[Float[Array, "b x y z _"], ...], gradient: Float[Array, "b x y z out"]
) -> Float[Array, "3 3 3 _ out"]:
    """The float32 gradient in the kernel: for each tap, the sum over voxels of shifted volume times gradient.

    It is a convolution itself, of slices [x, y, c, z] with the gradient as the kernel. The sum over x and y
    is the sum over that kernel's taps, and its output has three voxels along both. The sum over z is the sum
    over its channels, with three shifted copies of the gradient as its output channels. So the products are
    large and the copies few: three of the gradient and one of the volume for the 27 taps.
    """
    b, nx, _, nz, _ = parts[0].shape
    out = gradient.shape[-1]
    slices = _slices(parts, max(part.shape[-1] for part in parts) + 3 * out)
    halo = int(slices < nx)  # around a whole volume, the convolution itself pads with zeros

    def add_chunk(n: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        outputs = jnp.pad(chunk(gradient, n, slices)[0], ((0, 0), (0, 0), (1, 1), (0, 0)))
        outputs = outputs.astype(jnp.float32)
        shifted = jnp.concatenate([outputs[:, :, 2 - tap : 2 - tap + nz] for tap in range(3)], axis=-1)
        # Without the delay, XLA makes these copies in the forward pass and keeps them.
        volumes = [delayed(chunk(part, n, slices, halo).swapaxes(3, 4), gradient) for part in parts]
        return [
            total + onednn.convolve(volume.astype(jnp.float32), shifted[:, :, None], (1 - halo, 1, 0))
            for total, volume in zip(totals, volumes, strict=True)
        ]

    zeros = [jnp.zeros((1, 3, 3, part.shape[-1], 3 * out), jnp.float32) for part in parts]
    totals = jax.lax.fori_loop(0, b * nx // slices, add_chunk, zeros)
    of_taps = [jnp.moveaxis(total.reshape(3, 3, -1, 3, out), 3, 2) for total in totals]
    return jnp.concatenate(of_taps, axis=3)


def _kernel_gradient_backward(saved: _Saved, to_kernel: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    # <to_kernel, kernel gradient> = <gradient, convolution of the parts by to_kernel>
    parts, gradient = saved
    kernel = to_kernel.astype(gradient.dtype)
    return _volume_gradients(parts, kernel, gradient), onednn_conv3d(parts, kernel)


_kernel_gradient.defvjp(
    lambda parts, gradient: (_kernel_gradient(parts, gradient), (parts, gradient)), _kernel_gradient_backward
)


def _slices(parts: tuple[jax.Array, ...], channels: int) -> int:
    """Slices in a chunk, for this number of float32 channels."""
    slice_bytes = 4 * channels * math.prod(parts[0].shape[2:4])
    return slices_a_chunk(parts[0].shape, slice_bytes, limit_bytes("onednn_chunk")) or parts[0].shape[1]
