"""The 3x3x3 convolution, by the implementation that is fast on the platform it runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu import onednn
from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.ops.cpu.chunks import joined
from adregnet_jax.ops.cpu.folded_convolution import folded_conv3d
from adregnet_jax.ops.cpu.onednn_convolution import onednn_conv3d
from adregnet_jax.ops.slabs import beyond, slab_count

IMPLEMENTATIONS = ("auto", "folded", "onednn", "xla")


def conv3d(
    volume: Float[AnyArray, "b x y z _"] | Sequence[Float[AnyArray, "b x y z _"]],
    kernel: Float[AnyArray, "3 3 3 _ out"],
    *,
    implementation: str = "auto",
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "b x y z out"]:
    """3-D convolution of stride 1, with zero padding that keeps the shape.

    Args:
      volume: [b, x, y, z, c], or several whose channels count as concatenated. Large ones are never
        concatenated as a whole.
      kernel: [3, 3, 3, c, c'].
      implementation: "xla" is `lax.conv_general_dilated`, which is slow in 3-D on CPU. "folded"
        consists of 2-D convolutions (`ops.cpu.folded_convolution`). "onednn" calls oneDNN on CPU
        (`ops.cpu.onednn`), for float32 or bfloat16 only. "auto" is "folded" on CPU and "xla" elsewhere. The
        backward passes of "folded" and "onednn" always compute the gradient in the kernel, and compute it
        before the one in the volume.
      precision: of the products of "xla", as for `lax.conv_general_dilated`; the others are for CPU, which
        has only one.

    Returns:
      [b, x, y, z, c'] in the dtype of the volume.

    Raises:
      ValueError: wrong ranks or channels, an unknown implementation, or dtypes that oneDNN does not convolve.
      UserError: oneDNN where it can't be used.

    Examples:
      >>> sums = conv3d(jnp.ones((1, 4, 4, 4, 1)), jnp.ones((3, 3, 3, 1, 1)))
      >>> float(sums[0, 1, 1, 1, 0]), float(sums[0, 0, 0, 0, 0])
      (27.0, 8.0)
    """
    given = volume if isinstance(volume, Sequence) else (volume,)
    parts, kernel = tuple(map(jnp.asarray, given)), jnp.asarray(kernel)
    channels = sum(part.shape[-1] for part in parts)
    if any(part.ndim != 5 for part in parts) or kernel.shape[:4] != (3, 3, 3, channels):
        raise ValueError(
            "volume must be [b, x, y, z, c] and kernel [3, 3, 3, c, c'], "
            f"got {', '.join(str(part.shape) for part in parts)} and {kernel.shape}"
        )
    direct = functools.partial(_direct, precision=precision)
    result = _implemented(parts, kernel, implementation, direct)
    if slab_count() == 1:
        return result
    # Contributions of the slices beyond a slab are added afterwards, so that the slab is never copied.
    before, after = zip(*(beyond(part, 1, 1) for part in parts), strict=True)
    result = result.at[:, :1].add(_of_one_slice(joined(before), kernel[0], precision))
    return result.at[:, -1:].add(_of_one_slice(joined(after), kernel[2], precision))


def check_implementation(name: str) -> None:
    """Refuses an implementation of `conv3d` that does not exist or can't be used in this process.

    For "onednn" it also turns off JAX's cache of compiled programs on disk (`ops.cpu.onednn.prepare`).

    Args:
      name: of the implementation.

    Raises:
      ValueError: an unknown one.
      UserError: oneDNN where it can't be used.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == "onednn":
        onednn.prepare()


def _implemented(
    parts: tuple[jax.Array, ...],
    kernel: jax.Array,
    implementation: str,
    direct: Callable[[tuple[jax.Array, ...], jax.Array], jax.Array],
) -> jax.Array:
    check_implementation(implementation)
    if implementation == "xla":
        return direct(parts, kernel)
    if implementation == "folded":
        return folded_conv3d(parts, kernel)
    if implementation == "auto":
        if not traces_for_cpu():  # the other branch would be traced for nothing
            return direct(parts, kernel)
        return jax.lax.platform_dependent(parts, kernel, cpu=folded_conv3d, default=direct)
    dtypes = {str(array.dtype) for array in (*parts, kernel)}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise ValueError(
            f"oneDNN convolves float32 or bfloat16 alone, got {', '.join(sorted(dtypes))}:"
            " use one of them for volume and kernel, or implementation='auto'"
        )
    return jax.lax.platform_dependent(parts, kernel, cpu=onednn_conv3d, default=direct)


def _direct(
    parts: tuple[jax.Array, ...], kernel: jax.Array, *, precision: jax.lax.PrecisionLike
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        joined(parts),
        kernel,
        (1, 1, 1),
        "SAME",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=precision,
    )


def _of_one_slice(volume: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """One slice, [b, 1, y, z, c], by the taps of one x, [3, 3, c, c']."""
    result = jax.lax.conv_general_dilated(
        volume[:, 0],
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    return result[:, None]
