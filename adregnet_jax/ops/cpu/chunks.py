"""Processes large volumes chunk by chunk along x, so that intermediates exist for one chunk at a time.

All chunks have the same number of slices, which divides the volume's. A batch is one long row of chunks;
their results come out in order and need no copy to form a batch again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.ops.slabs import beyond, halo, slab_count, slab_start

_Mapped = Callable[..., tuple[jax.Array, ...]]  # (first, shared, *volumes) -> results


def slices_a_chunk(shape: Sequence[int], slice_bytes: int, limit_bytes: int) -> int | None:
    """The largest number of slices that divides a volume and keeps intermediates below a limit, at least 1.

    Args:
      shape: [b, x, ...] of the batch.
      slice_bytes: intermediates of each slice.
      limit_bytes: intermediates that may exist at once.

    Returns:
      Slices in a chunk of one volume, or None if the whole batch stays below the limit.
    """
    b, nx = shape[:2]
    fitting = max(1, limit_bytes // slice_bytes)
    return None if b * nx <= fitting else max(n for n in range(1, min(fitting, nx) + 1) if nx % n == 0)


def chunk(volume: jax.Array, n: jax.Array, slices: int, halo: int = 0) -> jax.Array:
    """Chunk `n` of a batch with the slices around it, and zeros beyond the volume. It has no derivative.

    Args:
      volume: [b, x, ...].
      n: index of the chunk in the batch.
      slices: size of a chunk; it divides x.
      halo: any number of further slices on either side.

    Returns:
      [1, slices + 2 * halo, ...].
    """
    nx = volume.shape[1]
    batch, first = n // (nx // slices), n % (nx // slices) * slices
    width = min(slices + 2 * halo, nx)
    # Where the chunk and its halo extend beyond an end, the slice is read further inwards and rolled back.
    start = jnp.clip(first - halo, 0, nx - width)
    bits = to_bits(volume)
    read = jax.lax.dynamic_slice(
        bits, (batch, start, *[0] * (volume.ndim - 2)), (1, width, *volume.shape[2:])
    )
    if halo:
        index = jnp.arange(slices + 2 * halo) + first - halo  # in the volume
        rolled = jnp.take(read, jnp.clip(index - start, 0, width - 1), axis=1)
        inside = ((index >= 0) & (index < nx)).reshape(1, -1, *[1] * (volume.ndim - 2))
        read = jnp.where(inside, rolled, 0)
    return from_bits(read, volume.dtype)


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """Volumes [b, x, y, z, c] with their channels concatenated."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def taps_of_parts(kernel: jax.Array, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Splits a kernel [..., c, c'] into the taps for each of the volumes that `joined` would concatenate."""
    ends = np.cumsum([part.shape[-1] for part in parts])
    return jnp.split(kernel, ends[:-1], axis=-2)


def to_bits(array: jax.Array) -> jax.Array:
    """The bits of bfloat16 as integers: XLA for CPU converts a whole array to float32 to copy part of it."""
    return jax.lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(array: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `to_bits`, for an array that had `dtype`."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)


def for_each_chunk(function: Callable[[jax.Array], Any], count: int, *inputs: jax.Array) -> Any:
    """Stacks `function(n)` for n = 0, ..., count - 1: `lax.map` without a derivative, in less memory.

    `lax.map` writes into zeros, which XLA makes long before they are needed, once for all loops that need
    the same shape, and copies for each loop. Here the zeros wait for the inputs of the function.
    """
    shapes = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    start = jax.tree.map(lambda one: zeros_after((count, *one.shape), one.dtype, *inputs), shapes)

    def write(n: jax.Array, written: Any) -> Any:
        return jax.tree.map(
            lambda total, new: jax.lax.dynamic_update_index_in_dim(total, to_bits(new), n, 0),
            written,
            function(n),
        )

    written = jax.lax.fori_loop(0, count, write, jax.tree.map(to_bits, start))
    return jax.tree.map(lambda bits, one: from_bits(bits, one.dtype), written, shapes)


def zeros_after(shape: Sequence[int], dtype: Any, *inputs: jax.Array) -> jax.Array:
    """Zeros that XLA can't make before the inputs are there.

    They are a sum of one number of each input, as integers, clipped to [0, 0]. XLA does not see that this is
    a constant, and no input makes it anything else, infinities and NaN included.
    """
    first = (array[(0,) * array.ndim].astype(jnp.int32) for array in inputs)
    return jnp.full(shape, jnp.clip(sum(first, jnp.int32(0)), 0, 0).astype(dtype))


def delayed(value: jax.Array, *inputs: jax.Array) -> jax.Array:
    """`value` plus `zeros_after`, so that XLA can't use it before the inputs are there.

    XLA for CPU schedules operations early, even where their results are not needed until much later. Results
    of a delayed value take no memory before the inputs are there.

    With jaxlib 0.10.2, `jax.lax.optimization_barrier` does not hold this order. A training step of the
    default network on 64x64x64 voxels has 2966 MiB of temporaries with it, and 2254 MiB with the sum; one on
    32x32x32 voxels, with channels 16, 32 and 64 and `remat`, has 240 and 182 MiB. With jaxlib 0.12.0 the
    latter has 174 MiB with either, so the barrier can replace the sum once older versions are no longer
    supported. On other platforms it is the barrier, which costs nothing there.

    Args:
      value: of any shape and dtype.
      inputs: arrays of at least one number.
    """
    if not traces_for_cpu():
        return jax.lax.optimization_barrier((value, *inputs))[0]
    return value + zeros_after((), value.dtype, *inputs)


def map_nearby(
    function: _Mapped,
    volumes: Sequence[jax.Array],
    *,
    reach: int,
    slice_bytes: int,
    limit_bytes: int,
    shared: Any = (),
) -> tuple[jax.Array, ...]:
    """Applies `function(first, shared, *volumes)`, whose results depend on nearby slices, to slabs or chunks.

    Args:
      function: maps the index of the first slice in the whole volume, `shared`, and slices [b, x, y, z, ...]
        of the volumes to results with the same leading axes. A result depends on at most `reach` slices on
        either side of it. Slices beyond the whole volume are 0 if they are passed at all.
      volumes: [b, x, y, z, ...] each.
      reach: slices on either side.
      slice_bytes: intermediates of each slice of one volume.
      limit_bytes: intermediates that may exist at once. Above it, the function and its derivative go chunk by
        chunk.
      shared: a tree of arrays that all slices need, such as parameters.

    Returns:
      [b, x, y, z, ...] each.
    """
    slices = slices_a_chunk(volumes[0].shape, slice_bytes, limit_bytes)
    if slab_count() == 1:
        if slices is None:
            return tuple(function(0, shared, *volumes))
        return map_chunks(function, volumes, slices=slices, halo=reach, shared=shared)

    width = volumes[0].shape[1]
    start = slab_start(width)
    if slices is None or width < 2 * reach:
        wide = [halo(volume, reach, reach) for volume in volumes]
        results = function(start - reach, shared, *wide)
        return tuple(result[:, reach : reach + width] for result in results)

    # A large slab isn't copied to append its neighbours: its outermost slices are computed again with them.
    inside = map_chunks(function, volumes, slices=slices, halo=reach, first=start, shared=shared)
    if not reach:
        return inside
    sides = [beyond(volume, reach, reach) for volume in volumes]
    ends = [
        jnp.concatenate([before, volume[:, : 2 * reach], volume[:, -2 * reach :], after], axis=1)
        for volume, (before, after) in zip(volumes, sides, strict=True)
    ]
    heads = function(start - reach, shared, *[end[:, : 3 * reach] for end in ends])
    tails = function(start + width - 2 * reach, shared, *[end[:, 3 * reach :] for end in ends])
    return tuple(
        result.at[:, :reach].set(head[:, reach:-reach]).at[:, -reach:].set(tail[:, reach:-reach])
        for result, head, tail in zip(inside, heads, tails, strict=True)
    )


def map_chunks(
    function: _Mapped,
    volumes: Sequence[jax.Array],
    *,
    slices: int,
    halo: int,
    first: int | jax.Array = 0,
    shared: Any = (),
) -> tuple[jax.Array, ...]:
    """Applies `function(first, shared, *volumes)` to whole batches chunk by chunk, and so its derivative.

    The derivative saves the volumes and `shared` alone.

    Args:
      function: from the index in x of the first slice, `shared` and chunks [1, slices + 2 * halo, y, z, ...],
        zeros beyond the volume, to results of the same first axes. A result depends on at most `halo` slices
        on either side of it.
      volumes: [b, x, y, z, ...] each.
      slices: size of a chunk; it divides x.
      halo: slices on either side.
      first: index in x of the first slice of the volumes, which may be traced.
      shared: a tree of arrays that all chunks need.

    Returns:
      [b, x, y, z, ...] each.
    """
    return _map(function, slices, halo, jnp.asarray(first), shared, *volumes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map(
    function: _Mapped, slices: int, halo: int, first: jax.Array, shared: Any, *volumes: jax.Array
) -> tuple[jax.Array, ...]:
    b, nx = volumes[0].shape[:2]

    def one(n: jax.Array) -> tuple[jax.Array, ...]:
        start = first + n % (nx // slices) * slices - halo
        results = function(start, shared, *[chunk(volume, n, slices, halo) for volume in volumes])
        return tuple(result[0, halo : halo + slices] for result in results)

    results = for_each_chunk(one, b * nx // slices, *volumes, *jax.tree.leaves(shared))
    return tuple(result.reshape(b, nx, *result.shape[2:]) for result in results)


_Saved = tuple[jax.Array, Any, tuple[jax.Array, ...]]


def _map_forward(
    function: _Mapped, slices: int, halo: int, first: jax.Array, shared: Any, *volumes: jax.Array
) -> tuple[tuple[jax.Array, ...], _Saved]:
    return _map(function, slices, halo, first, shared, *volumes), (first, shared, volumes)


def _map_backward(
    function: _Mapped, slices: int, halo: int, saved: _Saved, cotangents: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    first, shared, volumes = saved
    b, nx = volumes[0].shape[:2]

    def add_chunk(n: jax.Array, totals: tuple[Any, list[jax.Array]]) -> tuple[Any, list[jax.Array]]:
        start = n % (nx // slices) * slices
        chunks = [chunk(volume, n, slices, halo) for volume in volumes]
        pull_back = jax.vjp(functools.partial(function, first + start - halo), shared, *chunks)[1]
        # The cotangents of this chunk alone; their gradients in the slices around it are added there.
        around = [(0, 0), (halo, halo)]
        of_shared, *of_volumes = pull_back(
            tuple(
                jnp.pad(chunk(cotangent, n, slices), around + [(0, 0)] * (cotangent.ndim - 2))
                for cotangent in cotangents
            )
        )
        to_shared, to_volumes = totals
        place = (n // (nx // slices), start)
        return (
            jax.tree.map(jnp.add, to_shared, of_shared),
            [_add_at(total, new, place) for total, new in zip(to_volumes, of_volumes, strict=True)],
        )

    wide = [
        to_bits(zeros_after((b, nx + 2 * halo, *volume.shape[2:]), volume.dtype, *cotangents))
        for volume in volumes
    ]
    nothing = (jax.tree.map(jnp.zeros_like, shared), wide)
    to_shared, to_volumes = jax.lax.fori_loop(0, b * nx // slices, add_chunk, nothing)
    to_volumes = [
        from_bits(total[:, halo : halo + nx], volume.dtype)
        for total, volume in zip(to_volumes, volumes, strict=True)
    ]
    return None, to_shared, *to_volumes


def _add_at(total: jax.Array, new: jax.Array, place: tuple[Any, ...]) -> jax.Array:
    """`total`, as `to_bits` has it, with `new` added from index `place` of its first two axes."""
    start = (*place, *[0] * (total.ndim - 2))
    there = from_bits(jax.lax.dynamic_slice(total, start, new.shape), new.dtype)
    return jax.lax.dynamic_update_slice(total, to_bits(there + new), start)


_map.defvjp(_map_forward, _map_backward)
