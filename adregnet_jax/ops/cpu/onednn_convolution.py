"""The 3x3x3 convolution on CPU by oneDNN, with its derivatives."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from adregnet_jax.ops.cpu import onednn
from adregnet_jax.ops.cpu.budget import limit_bytes
from adregnet_jax.ops.cpu.chunks import chunk, delayed, for_each_chunk, joined, slices_a_chunk, taps_of_parts


@jax.custom_vjp
def onednn_conv3d(parts: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
    """`conv3d` of a tuple of volumes on CPU; all is float32, or all is bfloat16.

    oneDNN convolves bfloat16 slower than float32, so it is turned into float32 chunk by chunk; so are several
    large volumes joined.
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

    def convolved(n):
        volume = joined([chunk(part, n, slices, halo=1) for part in parts])
        return onednn.convolve(volume.astype(jnp.float32), kernel, (0, 1, 1)).astype(dtype)

    result = for_each_chunk(convolved, b * nx // slices, *parts, kernel)
    return result.reshape(b, nx, ny, nz, -1)


def _forward(parts, kernel):
    return onednn_conv3d(parts, kernel), (parts, kernel)


def _backward(saved, gradient):
    parts, kernel = saved
    to_kernel = _kernel_gradient(parts, gradient).astype(kernel.dtype)
    # Only the optimiser waits for the gradient in the kernel: XLA would put it off, and keep the parts.
    return _volume_gradients(parts, delayed(kernel, to_kernel), gradient), to_kernel


onednn_conv3d.defvjp(_forward, _backward)


def _volume_gradients(parts, kernel, gradient):
    mirrored = jnp.flip(kernel, (0, 1, 2))
    return tuple(onednn_conv3d((gradient,), own.swapaxes(3, 4)) for own in taps_of_parts(mirrored, parts))


@jax.custom_vjp
def _kernel_gradient(parts, gradient):
    """[3, 3, 3, c, c'], float32: of each tap the sum over voxels of volume, shifted, times gradient.

    It is a convolution itself, of slices [x, y, c, z] by the gradient as the kernel: the sum over x and y is
    that over its taps, whose output has three voxels along either, and the sum over z is that over its
    channels, for which the gradient lies there three times, shifted. So the products are large, and the
    copies few: three of the gradient and one of the volume, for the 27 taps.
    """
    b, nx, _, nz, _ = parts[0].shape
    out = gradient.shape[-1]
    slices = _slices(parts, max(part.shape[-1] for part in parts) + 3 * out)
    halo = int(slices < nx)  # zeros around a whole volume are of the convolution's own

    def add_chunk(n, totals):
        outputs = jnp.pad(chunk(gradient, n, slices)[0], ((0, 0), (0, 0), (1, 1), (0, 0)))
        outputs = outputs.astype(jnp.float32)
        shifted = jnp.concatenate([outputs[:, :, 2 - tap : 2 - tap + nz] for tap in range(3)], axis=-1)
        # What could be made in the forward pass waits for the gradient: it would be kept.
        volumes = [delayed(chunk(part, n, slices, halo).swapaxes(3, 4), gradient) for part in parts]
        return [
            total + onednn.convolve(volume.astype(jnp.float32), shifted[:, :, None], (1 - halo, 1, 0))
            for total, volume in zip(totals, volumes, strict=True)
        ]

    zeros = [jnp.zeros((1, 3, 3, part.shape[-1], 3 * out), jnp.float32) for part in parts]
    totals = jax.lax.fori_loop(0, b * nx // slices, add_chunk, zeros)
    of_taps = [jnp.moveaxis(total.reshape(3, 3, -1, 3, out), 3, 2) for total in totals]
    return jnp.concatenate(of_taps, axis=3)


def _kernel_gradient_backward(saved, to_kernel):
    # The sum of `to_kernel` times the kernel gradient is that of the gradient times a convolution by it.
    parts, gradient = saved
    kernel = to_kernel.astype(gradient.dtype)
    return _volume_gradients(parts, kernel, gradient), onednn_conv3d(parts, kernel)


_kernel_gradient.defvjp(
    lambda parts, gradient: (_kernel_gradient(parts, gradient), (parts, gradient)), _kernel_gradient_backward
)


def _slices(parts, channels):
    """The slices of a chunk of so many channels, as float32."""
    slice_bytes = 4 * channels * math.prod(parts[0].shape[2:4])
    return slices_a_chunk(parts[0].shape, slice_bytes, limit_bytes("onednn_chunk")) or parts[0].shape[1]
