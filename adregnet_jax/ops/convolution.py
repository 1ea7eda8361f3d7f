"""The 3x3x3 convolution, by the route that is fast on the platform it runs on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_EIGEN_CHANNELS = 4  # from how many input channels on Eigen on all cores beats YNNPACK on one


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
    # XLA hands a convolution whose result is no larger than its input to YNNPACK, which runs on one core. A
    # column too many, cut off again, leaves it to Eigen, which runs on all; with few channels one is faster.
    spare = int(c >= _EIGEN_CHANNELS)
    slices = jax.lax.conv_general_dilated(
        volume.reshape(b * nx, ny, nz, c),
        taps,
        (1, 1),
        ((1, 1), (1, 1 + spare)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[:, :, :nz].reshape(b, nx, ny, nz, 3 * out)
    before, here, after = (slices[..., n * out : (n + 1) * out] for n in range(3))
    return here + _shift_in_x(before[:, :-1], 1, 0) + _shift_in_x(after[:, 1:], 0, 1)


def _shift_in_x(slices, before, after):
    """Zeros before and after: a padding joins the sum that it feeds, an update of a slice would not."""
    return jnp.pad(slices, ((0, 0), (before, after), (0, 0), (0, 0), (0, 0)))


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
        plane = jnp.pad(jax.lax.dynamic_index_in_dim(slices, n, keepdims=False), ((1, 1), (1, 1), (0, 0)))
        shifted = [plane[j : j + ny, k : k + nz] for j in range(3) for k in range(3)]
        # The tap i of slice x meets the output slice x + 1 - i, which is x + 2 - i in the padded volume.
        first = n + 2 * (n // nx)
        outputs = jax.lax.dynamic_slice_in_dim(padded, first, 3)
        product = jax.lax.dot_general(
            jnp.concatenate(shifted, axis=-1),
            jnp.concatenate([outputs[2], outputs[1], outputs[0]], axis=-1),
            (((0, 1), (0, 1)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return total + product, None

    total, _ = jax.lax.scan(add_slice, jnp.zeros((9 * c, 3 * out), jnp.float32), jnp.arange(b * nx))
    return jnp.transpose(total.reshape(3, 3, c, 3, out), (3, 0, 1, 2, 4))
