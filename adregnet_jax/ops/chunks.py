"""Large volumes chunk by chunk along x, so that intermediates exist for one chunk at a time.

Chunks are equal: their number of slices divides the volume's. A batch is one long row of chunks, whose
results come out in order and need no copy to be a batch again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def slices_a_chunk(shape: Sequence[int], slice_bytes: int, limit_bytes: int) -> int | None:
    """The most slices that divide a volume and whose intermediates stay below a limit, at least one.

    Args:
      shape: [b, x, ...] of the batch.
      slice_bytes: of intermediates for each slice.
      limit_bytes: of intermediates at once.

    Returns:
      Slices in a chunk of one volume, or None if the whole batch stays below the limit.
    """
    b, nx = shape[:2]
    fitting = max(1, limit_bytes // slice_bytes)
    return None if b * nx <= fitting else max(n for n in range(1, min(fitting, nx) + 1) if nx % n == 0)


def chunk(volume: jax.Array, n: jax.Array, slices: int, halo: int = 0) -> jax.Array:
    """Chunk `n` of a batch, with the slices around it; zeros beyond the volume.

    Args:
      volume: [b, x, ...].
      n: index of the chunk in the batch.
      slices: of a chunk; it divides x.
      halo: further slices on either side, of any number.

    Returns:
      [1, slices + 2 * halo, ...].
    """
    nx = volume.shape[1]
    batch, first = n // (nx // slices), n % (nx // slices) * slices
    width = min(slices + 2 * halo, nx)
    # Where the chunk and its halo reach over an end, what is read is shifted inwards, and rolled back.
    start = jnp.clip(first - halo, 0, nx - width)
    read = jax.lax.dynamic_slice(
        volume, (batch, start, *[0] * (volume.ndim - 2)), (1, width, *volume.shape[2:])
    )
    if not halo:
        return read
    index = jnp.arange(slices + 2 * halo) + first - halo  # in the volume
    rolled = jnp.take(read, jnp.clip(index - start, 0, width - 1), axis=1)
    inside = ((index >= 0) & (index < nx)).reshape(1, -1, *[1] * (volume.ndim - 2))
    return jnp.where(inside, rolled, 0)


def map_chunks(
    function: Callable[..., tuple[jax.Array, ...]],
    volumes: Sequence[jax.Array],
    *,
    slices: int,
    halo: int,
    first: int | jax.Array = 0,
) -> tuple[jax.Array, ...]:
    """`function(first, *volumes)` of whole batches, chunk by chunk, where results depend on slices nearby.

    Its derivative goes chunk by chunk as well, and saves the volumes alone.

    Args:
      function: from the index in x of the first slice and chunks [1, slices + 2 * halo, y, z, ...], zeros
        beyond the volume, to results of the same first axes. A result depends on at most `halo` slices on
        either side of it.
      volumes: [b, x, y, z, ...] each.
      slices: of a chunk; it divides x.
      halo: slices on either side.
      first: index in x of the first slice of the volumes, which need not be 0 and may be traced.

    Returns:
      [b, x, y, z, ...] each.
    """
    return _map(function, slices, halo, jnp.asarray(first), *volumes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map(function, slices, halo, first, *volumes):
    return _over_chunks(function, volumes, slices, halo, first)


def _over_chunks(function, volumes, slices, halo, first):
    b, nx = volumes[0].shape[:2]

    def one(n):
        start = first + n % (nx // slices) * slices - halo
        results = function(start, *[chunk(volume, n, slices, halo) for volume in volumes])
        return tuple(result[0, halo : halo + slices] for result in results)

    results = jax.lax.map(one, jnp.arange(b * nx // slices))
    return tuple(result.reshape(b, nx, *result.shape[2:]) for result in results)


def _map_forward(function, slices, halo, first, *volumes):
    return _over_chunks(function, volumes, slices, halo, first), (first, volumes)


def _map_backward(function, slices, halo, saved, cotangents):
    first, volumes = saved

    # What a voxel is told by the results around it depends on what those depend on: a halo twice as wide.
    def pull_back(start, *chunks):
        inputs, outputs = chunks[: len(volumes)], chunks[len(volumes) :]
        return jax.vjp(lambda *a: function(start, *a), *inputs)[1](outputs)

    return None, *_over_chunks(pull_back, [*volumes, *cotangents], slices, 2 * halo, first)


_map.defvjp(_map_forward, _map_backward)
