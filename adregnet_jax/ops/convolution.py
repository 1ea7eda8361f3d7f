"""The 3x3x3 convolution, by the route that is fast on the platform it runs on."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def conv3d(volume: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride 1, zero padding that keeps the shape.

    On GPU and TPU this is `lax.conv_general_dilated`. XLA's 3-D convolution on CPU is slow, so there the taps
    along x become output channels of one 2-D convolution over (y, z), and three of its slices, shifted along
    x, are added. The gradient in the volume is the same convolution with the mirrored kernel; the gradient in
    the kernel is a sum over x of one matrix product a slice.

    Args:
      volume: [b, x, y, z, c].
      kernel: [3, 3, 3, c, c'].

    Returns:
      [b, x, y, z, c'] in the dtype of the volume.

    Raises:
      ValueError: wrong ranks or channels.
    """
    if volume.ndim != 5 or kernel.shape[:4] != (3, 3, 3, volume.shape[-1]):
        raise ValueError(
            f"volume must be [b, x, y, z, c] and kernel [3, 3, 3, c, c'], got {volume.shape} and {kernel.shape}"
        )
    return jax.lax.platform_dependent(volume, kernel, cpu=_folded, default=_direct)


def _direct(volume, kernel):
    return jax.lax.conv_general_dilated(
        volume, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@jax.custom_vjp
def _folded(volume, kernel):
    b, nx, ny, nz, c = volume.shape
    out = kernel.shape[-1]
    # [y taps, z taps, c, x taps * out]
    taps = jnp.transpose(kernel, (1, 2, 3, 0, 4)).reshape(3, 3, c, 3 * out)
    slices = jax.lax.conv_general_dilated(
        volume.reshape(b * nx, ny, nz, c), taps, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(b, nx, ny, nz, 3 * out)
    before, here, after = (slices[..., n * out : (n + 1) * out] for n in range(3))
    here = here.at[:, 1:].add(before[:, :-1])
    return here.at[:, :-1].add(after[:, 1:])


def _folded_backward(saved, gradient):
    volume, kernel = saved
    mirrored = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    return _folded(gradient, mirrored), _kernel_gradient(volume, gradient).astype(kernel.dtype)


_folded.defvjp(lambda volume, kernel: (_folded(volume, kernel), (volume, kernel)), _folded_backward)


def _kernel_gradient(volume, gradient):
    b, nx, ny, nz, c = volume.shape
    out = gradient.shape[-1]
    # A voxel of slice x meets the tap i in the output slice x + 1 - i.
    padded = jnp.pad(gradient, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    outputs = jnp.concatenate([padded[:, 2:], padded[:, 1:-1], padded[:, :-2]], axis=-1)
    outputs = outputs.reshape(b * nx, ny * nz, 3 * out)
    # Planar slices [c, y, z]: the nine shifted copies are then contiguous rows of the left factor.
    slices = jnp.pad(volume, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    slices = jnp.moveaxis(slices, -1, 2).reshape(b * nx, c, ny + 2, nz + 2)

    def add_slice(total, slice_and_outputs):
        plane, output = slice_and_outputs
        shifted = jnp.stack([plane[:, j : j + ny, k : k + nz] for j in range(3) for k in range(3)])
        product = jnp.matmul(shifted.reshape(9 * c, ny * nz), output, preferred_element_type=jnp.float32)
        return total + product, None

    total, _ = jax.lax.scan(add_slice, jnp.zeros((9 * c, 3 * out), jnp.float32), (slices, outputs))
    return jnp.transpose(total.reshape(3, 3, c, 3, out), (3, 0, 1, 2, 4))
