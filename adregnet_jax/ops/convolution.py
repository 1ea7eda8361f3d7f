"""The 3x3x3 convolution, by the route that is fast on the platform it runs on."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adregnet_jax.ops.chunks import chunk, slices_a_chunk
from adregnet_jax.ops.slabs import halo

_CHUNK_BYTES = 2**28  # of float32 intermediates that exist at once
_EIGEN_CHANNELS = 4  # from how many input channels on Eigen on all cores beats YNNPACK on one


def conv3d(volume: jax.Array, kernel: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Stride 1, zero padding that keeps the shape.

    On GPU and TPU this is `lax.conv_general_dilated`. XLA's 3-D convolution on CPU is slow, so there the taps
    along x become output channels of one 2-D convolution over (y, z), and three of its slices, shifted along
    x, are added. The gradient in the volume is the same convolution with the mirrored kernel; the gradient in
    the kernel is a sum over x of one matrix product a slice. Large volumes go through it chunk by chunk.

    Args:
      volume: [b, x, y, z, c].
      kernel: [3, 3, 3, c, c'].
      axis_name: see `ops.slabs`.

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
    if axis_name is not None:
        return conv3d(halo(volume, 1, 1, axis_name), kernel)[:, 1:-1]
    return jax.lax.platform_dependent(volume, kernel, cpu=_folded, default=_direct)


def _direct(volume, kernel):
    return jax.lax.conv_general_dilated(
        volume, kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


@jax.custom_vjp
def _folded(volume, kernel):
    b, nx, ny, nz, _ = volume.shape
    out = kernel.shape[-1]
    slices = slices_a_chunk(volume.shape, 4 * ny * nz * 3 * out, _CHUNK_BYTES)
    if slices is None:
        return _folded_chunk(volume, kernel)

    def convolve(n):
        return _folded_chunk(chunk(volume, n, slices, halo=1), kernel)[0, 1:-1]

    return jax.lax.map(convolve, jnp.arange(b * nx // slices)).reshape(b, nx, ny, nz, out)


def _folded_chunk(volume, kernel):
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
    return here + _pad_in_x(before[:, :-1], 1, 0) + _pad_in_x(after[:, 1:], 0, 1)


def _pad_in_x(slices, before, after):
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
    slices = slices_a_chunk(volume.shape, 4 * ny * nz * (c + out), _CHUNK_BYTES)
    if slices is None:
        return _chunk_kernel_gradient(volume, _pad_in_x(gradient, 1, 1))

    def add_chunk(n, total):
        return total + _chunk_kernel_gradient(chunk(volume, n, slices), chunk(gradient, n, slices, halo=1))

    zeros = jnp.zeros((3, 3, 3, c, out), jnp.float32)
    return jax.lax.fori_loop(0, b * nx // slices, add_chunk, zeros)


def _chunk_kernel_gradient(volume, gradient):
    """A sum over the slices x of one product: nine shifted copies of the slice by three of the gradient.

    Planar, [c, y, z]: the copies are long runs of memory, and the three slices of the gradient are a view.
    The gradient has a slice more on either side.
    """
    b, nx, ny, nz, c = volume.shape
    out = gradient.shape[-1]
    slices = jnp.moveaxis(volume, -1, 2).reshape(b * nx, c, ny, nz)
    slices = jnp.pad(slices, ((0, 0), (0, 0), (1, 1), (1, 1)))
    outputs = jnp.moveaxis(gradient, -1, 2).reshape(b * (nx + 2), out, ny * nz)

    def add_slice(total, n):
        plane = jax.lax.dynamic_index_in_dim(slices, n, keepdims=False)
        shifted = [plane[:, j : j + ny, k : k + nz].reshape(c, ny * nz) for j in range(3) for k in range(3)]
        # Without the barrier XLA copies and concatenates in one loop, number by number.
        rows = jnp.concatenate(jax.lax.optimization_barrier(shifted))
        # The tap i of slice x meets the output slice x + 1 - i, which is x + 2 - i in the padded volume: the
        # three are here in the order of 2 - i.
        columns = jax.lax.dynamic_slice_in_dim(outputs, n + 2 * (n // nx), 3).reshape(3 * out, ny * nz)
        product = jax.lax.dot_general(
            rows, columns, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total + product, None

    total, _ = jax.lax.scan(add_slice, jnp.zeros((9 * c, 3 * out), jnp.float32), jnp.arange(b * nx))
    return jnp.transpose(total.reshape(3, 3, c, 3, out)[:, :, :, ::-1], (3, 0, 1, 2, 4))
