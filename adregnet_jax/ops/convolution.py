"""The 3x3x3 convolution, by the route that is fast on the platform it runs on."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adregnet_jax.ops.cpu import onednn
from adregnet_jax.ops.cpu.chunks import joined
from adregnet_jax.ops.cpu.folded_convolution import folded_conv3d
from adregnet_jax.ops.cpu.onednn_convolution import onednn_conv3d
from adregnet_jax.ops.slabs import beyond


def conv3d(
    volume: jax.Array | Sequence[jax.Array], kernel: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """Stride 1, zero padding that keeps the shape.

    On GPU and TPU this is `lax.conv_general_dilated`. XLA's 3-D convolution on CPU is slow: there it is made
    of 2-D ones (`ops.cpu.folded_convolution`), or after `use_onednn`, where all is
    float32 or all is bfloat16, it is oneDNN's (`ops.cpu.onednn_convolution`). On CPU the gradient in the
    volume is the same convolution with the mirrored kernel; the gradient in the kernel is always computed,
    before the other.

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
    dtypes = {array.dtype for array in (*parts, kernel)}
    by_onednn = onednn.used() and dtypes in ({jnp.dtype("float32")}, {jnp.dtype("bfloat16")})
    on_cpu = onednn_conv3d if by_onednn else folded_conv3d
    result = jax.lax.platform_dependent(parts, kernel, cpu=on_cpu, default=_direct)
    if axis_name is None:
        return result
    # What the slices beyond a slab add to its outermost ones comes after: the slab is never copied for them.
    before, after = zip(*(beyond(part, 1, 1, axis_name) for part in parts), strict=True)
    result = result.at[:, :1].add(_of_one_slice(joined(before), kernel[0]))
    return result.at[:, -1:].add(_of_one_slice(joined(after), kernel[2]))


def _direct(parts, kernel):
    return jax.lax.conv_general_dilated(
        joined(parts), kernel, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )


def _of_one_slice(volume, kernel):
    """One slice, [b, 1, y, z, c], by the taps of one x, [3, 3, c, c']."""
    result = jax.lax.conv_general_dilated(
        volume[:, 0], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return result[:, None]
