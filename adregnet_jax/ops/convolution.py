"""The 3x3x3 convolution, by the route that is fast on the platform it runs on."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.ops.chunks import chunk, delayed, for_each_chunk, slices_a_chunk
from adregnet_jax.ops.slabs import beyond

_CHUNK_BYTES = 2**28  # of float32 intermediates that exist at once
_EIGEN_CHANNELS = 4  # from how many input channels on Eigen on all cores beats YNNPACK on one


def conv3d(
    volume: jax.Array | Sequence[jax.Array], kernel: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """Stride 1, zero padding that keeps the shape.

    On GPU and TPU this is `lax.conv_general_dilated`. XLA's 3-D convolution on CPU is slow, so there the taps
    along x become output channels of one 2-D convolution over (y, z), and three of its slices, shifted along
    x, are added. The gradient in the volume is the same convolution with the mirrored kernel; the gradient in
    the kernel is a sum over x of one matrix product a slice, and is always computed, before the other. Large
    volumes go through it chunk by chunk.

    Args:
      volume: [b, x, y, z, c]; or several, whose channels count as if they were concatenated, which of large
        volumes they never are as a whole.
      kernel: [3, 3, 3, c, c'].
      axis_name: see `ops.slabs`.

    Returns:
      [b, x, y, z, c'] in the dtype of the volume.

    Raises:
      ValueError: wrong ranks or channels.
    """
    parts = tuple(volume) if isinstance(volume, Sequence) else (volume,)
    channels = sum(part.shape[-1] for part in parts)
    if any(part.ndim != 5 for part in parts) or kernel.shape[:4] != (3, 3, 3, channels):
        raise ValueError(
            "volume must be [b, x, y, z, c] and kernel [3, 3, 3, c, c'], "
            f"got {', '.join(str(part.shape) for part in parts)} and {kernel.shape}"
        )
    result = jax.lax.platform_dependent(parts, kernel, cpu=_folded, default=_direct)
    if axis_name is None:
        return result
    # What the slices beyond a slab add to its outermost ones comes after: the slab is never copied for them.
    before, after = zip(*(beyond(part, 1, 1, axis_name) for part in parts), strict=True)
    result = result.at[:, :1].add(_of_one_slice(_joined(before), kernel[0]))
    return result.at[:, -1:].add(_of_one_slice(_joined(after), kernel[2]))


def _direct(parts, kernel):
    return jax.lax.conv_general_dilated(
        _joined(parts), kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _of_one_slice(volume, kernel):
    """One slice, [b, 1, y, z, c], by the taps of one x, [3, 3, c, c']."""
    result = jax.lax.conv_general_dilated(
        volume[:, 0], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return result[:, None]


def _joined(parts):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


@jax.custom_vjp
def _folded(parts, kernel):
    b, nx, ny, nz, _ = parts[0].shape
    c, out = kernel.shape[-2:]
    # XLA for CPU makes float32 of what it convolves.
    columns = 3 * out + (c if parts[0].dtype == jnp.bfloat16 else 0)
    slices = slices_a_chunk(parts[0].shape, 4 * ny * nz * columns, _CHUNK_BYTES)
    if slices is None:
        return _folded_chunk(_joined(parts), kernel)

    def convolve(n):
        return _folded_chunk(_joined([chunk(part, n, slices, halo=1) for part in parts]), kernel)[0, 1:-1]

    return for_each_chunk(convolve, b * nx // slices, *parts, kernel).reshape(b, nx, ny, nz, out)


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
    parts, kernel = saved
    to_kernel = _kernel_gradient(parts, gradient).astype(kernel.dtype)
    # Only the optimiser waits for the gradient in the kernel: XLA would put it off, and keep the parts.
    mirrored = delayed(jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4), to_kernel)
    ends = np.cumsum([part.shape[-1] for part in parts])
    to_parts = tuple(_folded((gradient,), own) for own in jnp.split(mirrored, ends[:-1], axis=-1))
    return to_parts, to_kernel


_folded.defvjp(lambda parts, kernel: (_folded(parts, kernel), (parts, kernel)), _folded_backward)


def _kernel_gradient(parts, gradient):
    b, nx, ny, nz, _ = parts[0].shape
    c, out = sum(part.shape[-1] for part in parts), gradient.shape[-1]
    slices = slices_a_chunk(gradient.shape, 4 * ny * nz * (c + out), _CHUNK_BYTES)
    if slices is None:  # XLA would make the planes of the parts in the forward pass, and keep them
        return _chunk_kernel_gradient(delayed(_joined(parts), gradient), _pad_in_x(gradient, 1, 1))

    def add_chunk(n, total):
        volume = _joined([chunk(part, n, slices) for part in parts])
        return total + _chunk_kernel_gradient(volume, chunk(gradient, n, slices, halo=1))

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
