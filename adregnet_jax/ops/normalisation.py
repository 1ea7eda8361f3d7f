"""Instance normalisation and its activation in one pass, with a derivative that saves its input alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import limit_bytes, traces_for_cpu
from adregnet_jax.ops.cpu.chunks import chunk, slices_a_chunk
from adregnet_jax.ops.slabs import slab_count, sum_over_slabs, whole_width

ONE_KERNEL = 16**3  # voxels whose sum XLA for GPUs makes in one stage


def instance_norm(
    volume: Float[AnyArray, "b x y z c"],
    scale: Float[AnyArray, " c"],
    offset: Float[AnyArray, " c"],
    *,
    negative_slope: float = 1.0,
    epsilon: float = 1e-5,
) -> Float[Array, "b x y z c"]:
    """Each channel of each volume to mean 0 and SD 1, then `scale`, `offset` and a leaky ReLU.

    Whatever the dtype of the volume, the arithmetic is float32. Sums of large volumes go chunk by chunk.

    Args:
      volume: [b, x, y, z, c].
      scale: [c].
      offset: [c].
      negative_slope: what negative results are multiplied by; 1 leaves them as they are.
      epsilon: added to the variance.

    Returns:
      [b, x, y, z, c] in the dtype of the volume.

    Examples:
      >>> volume = jnp.array([1.0, 3.0]).reshape(1, 2, 1, 1, 1)
      >>> instance_norm(volume, jnp.ones(1), jnp.zeros(1)).ravel().round(3).tolist()
      [-1.0, 1.0]

    Reference:
      Ulyanov et al., Instance Normalization, arXiv:1607.08022.
    """
    return _instance_norm(jnp.asarray(volume), scale, offset, negative_slope, epsilon)


# Volume, scale and offset, and of each channel the mean and 1 / SD.
_Saved = tuple[Array, AnyArray, AnyArray, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _instance_norm(
    volume: Array, scale: AnyArray, offset: AnyArray, negative_slope: float, epsilon: float
) -> Array:
    return _forward(volume, scale, offset, negative_slope, epsilon)[0]


def _forward(
    volume: Array, scale: AnyArray, offset: AnyArray, negative_slope: float, epsilon: float
) -> tuple[Array, _Saved]:
    mean, variance = _moments(volume)
    reciprocal_sd = jax.lax.rsqrt(variance + epsilon)
    gain = reciprocal_sd * scale[None]
    result = (volume.astype(jnp.float32) - _spread(mean)) * _spread(gain) + _spread(offset[None])
    result = jnp.where(result >= 0, result, negative_slope * result)
    return result.astype(volume.dtype), (volume, scale, offset, mean, reciprocal_sd)


def _moments(volume: Array) -> list[Array]:
    """Mean and variance over the voxels, [b, c] each."""
    voxels = whole_width(volume[0, ..., 0].size)
    if slab_count() == 1 and not traces_for_cpu():
        # In one pass over memory. Differences from a voxel, not from 0, keep the digits of float32: near a
        # corner, it lies in the background, as most voxels do.
        near_corner = tuple(n // 8 for n in volume.shape[1:4])
        pilot = volume[:, *near_corner].astype(jnp.float32)
        sums = _sums(lambda x, pilot: [x - pilot, (x - pilot) ** 2], [volume], [pilot])
        shift, squares = (total / voxels for total in sums)
        return [pilot + shift, jnp.maximum(squares - shift**2, 0)]
    (total,) = sum_over_slabs(_sums(lambda x: [x], [volume]))
    mean = total / voxels
    (squares,) = sum_over_slabs(_sums(lambda x, mean: [(x - mean) ** 2], [volume], [mean]))
    return [mean, squares / voxels]


def _backward(
    negative_slope: float, epsilon: float, saved: _Saved, gradient: Array
) -> tuple[Array, Array, Array]:
    del epsilon
    volume, scale, offset, mean, reciprocal_sd = saved
    voxels = whole_width(volume[0, ..., 0].size)

    def before_activation(x: Array, g: Array, mean: Array, reciprocal_sd: Array) -> tuple[Array, Array]:
        """The normalised volume, and the gradient before scale and offset."""
        normalised = (x - mean) * reciprocal_sd
        activated = normalised * _spread(scale[None]) + _spread(offset[None])
        return normalised, jnp.where(activated >= 0, g, negative_slope * g)

    def terms(x: Array, g: Array, mean: Array, reciprocal_sd: Array) -> list[Array]:
        normalised, g = before_activation(x, g, mean, reciprocal_sd)
        return [g, g * normalised]

    sums = _sums(terms, [volume, gradient], [mean, reciprocal_sd])  # [b, c] each
    whole = sum_over_slabs(sums)
    normalised, g = before_activation(
        volume.astype(jnp.float32), gradient.astype(jnp.float32), _spread(mean), _spread(reciprocal_sd)
    )
    centred = g - _spread(whole[0] / voxels) - normalised * _spread(whole[1] / voxels)
    to_volume = (_spread(reciprocal_sd * scale[None]) * centred).astype(volume.dtype)
    if traces_for_cpu():
        return to_volume, jnp.sum(sums[1], axis=0), jnp.sum(sums[0], axis=0)
    to_offset, to_scale = _summed_together(sums, axis=0)
    return to_volume, to_scale, to_offset


_instance_norm.defvjp(_forward, _backward)


def _spread(values: AnyArray) -> Array:
    """[b, c] -> [b, 1, 1, 1, c]."""
    return jnp.asarray(values)[:, None, None, None]


def _summed_together(arrays: list[Array], *, axis: int) -> list[Array]:
    """The sums of arrays of one shape along an axis, as one reduction, which is one kernel on a GPU."""

    def add(totals: list[Array], values: list[Array]) -> list[Array]:
        return [total + value for total, value in zip(totals, values, strict=True)]

    return list(jax.lax.reduce(arrays, [jnp.float32(0)] * len(arrays), add, (axis,)))


def _sums(
    terms: Callable[..., list[Array]],
    volumes: Sequence[Array],
    statistics: Sequence[Array] = (),
) -> list[Array]:
    """Sums over the voxels of functions of some volumes [b, x, y, z, c] and of [b, c]: [b, c] each.

    Those of large volumes chunk by chunk, so that their terms never exist as whole volumes. Not by products
    with ones, which XLA on CPU adds up one after the other: a sum of 64^3 squares is off by 7e-5 then.
    """
    b, nx, ny, nz, c = volumes[0].shape
    slices = slices_a_chunk(volumes[0].shape, 4 * ny * nz * c, limit_bytes("instance_norm"))

    def sums(parts: Sequence[Array], statistics: Sequence[Array]) -> list[Array]:
        parts = [part.astype(jnp.float32) for part in parts]
        found = terms(*parts, *map(_spread, statistics))
        if traces_for_cpu() or nx * ny * nz <= ONE_KERNEL:
            return [jnp.sum(term, axis=(1, 2, 3)) for term in found]
        # XLA for GPUs adds up this many in two stages, and would have a kernel for each term in the second.
        return _summed_together([jnp.sum(term, axis=(2, 3)) for term in found], axis=1)

    if slices is None:
        return sums(volumes, statistics)

    def add_chunk(n: Array, totals: list[Array]) -> list[Array]:
        batch = n // (nx // slices)
        these = [jax.lax.dynamic_slice_in_dim(values, batch, 1) for values in statistics]
        found = sums([chunk(volume, n, slices) for volume in volumes], these)
        return [total.at[batch].add(new[0]) for total, new in zip(totals, found, strict=True)]

    shapes = jax.eval_shape(lambda: sums(volumes, statistics))
    return jax.lax.fori_loop(0, b * nx // slices, add_chunk, [jnp.zeros(s.shape) for s in shapes])
