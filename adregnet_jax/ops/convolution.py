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
            "volume must be [b, x, y, z, c] and kernel [3, 3, 3, c, c'], "
            f"got {volume.shape} and {kernel.shape}"
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
    slices = volume.reshape(b * nx, ny, nz, c)
    padded = jnp.pad(gradient, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))).reshape(b * (nx + 2), ny, nz, out)

    def add_slice(total, n):
        # Planar, [c, y, z]: the nine shifted copies are then contiguous rows of the left factor.
        plane = jnp.moveaxis(jax.lax.dynamic_index_in_dim(slices, n, keepdims=False), -1, 0)
        plane = jnp.pad(plane, ((0, 0), (1, 1), (1, 1)))
        shifted = jnp.stack([plane[:, j : j + ny, k : k + nz] for j in range(3) for k in range(3)])
        # The tap i of slice x meets the output slice x + 1 - i, which is x + 2 - i in the padded volume.
        first = n + 2 * (n // nx)
        outputs = jax.lax.dynamic_slice_in_dim(padded, first, 3)
        outputs = jnp.concatenate([outputs[2], outputs[1], outputs[0]], axis=-1).reshape(ny * nz, 3 * out)
        product = jnp.matmul(shifted.reshape(9 * c, ny * nz), outputs, preferred_element_type=jnp.float32)
        return total + product, None

    total, _ = jax.lax.scan(add_slice, jnp.zeros((9 * c, 3 * out), jnp.float32), jnp.arange(b * nx))
    return jnp.transpose(total.reshape(3, 3, c, 3, out), (3, 0, 1, 2, 4))
