"""Attention of every voxel to the voxels around it, without copies of the features.

Three bilinear maps carry it, and the derivatives of each are the other two:

    correlate(q, k)[n](p) = sum_c q(p, c) k(p + o_n, c)
    gather(w, v)(p, c)    = sum_n w[n](p) v(p + o_n, c)
    scatter(w, s)(p, c)   = sum_n w[n](p - o_n) s(p - o_n, c)

where o_n runs over the (2r+1)^3 offsets and everything outside the grid is zero. Autodiff of the padded
slices would instead write one padded copy of the features for each offset.

How it is laid out is dictated by XLA on CPU, where it is ten to a hundred times faster than the same sums as
reductions over an axis:
  - arrays are planar, `[b, x, y, z]` with z innermost, and the sums over channels and over the offsets in z
    are written out, so that each becomes one vectorised loop;
  - the offsets in x and y are the steps of a `lax.scan`. A loop's results are written to memory, whereas
    written-out sums that feed each other are fused and computed again for every one of their uses. It also
    keeps the program, and so its compilation, short.
Large volumes go chunk by chunk, so that memory grows by the features and not by the weights.
Weights are lists over the 2r+1 offsets in z, of arrays `[(2r+1)^2, b, x, y, z]`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import limit_bytes, traces_for_cpu
from adregnet_jax.ops.cpu.chunks import map_nearby
from adregnet_jax.ops.gpu import neighbourhood as gpu
from adregnet_jax.ops.gpu.neighbourhood import OUTSIDE
from adregnet_jax.ops.slabs import whole_width

_GROUP = 8  # channels in one written-out sum


def neighbourhood_attention(
    query: Float[AnyArray, "b x y z d"],
    key: Float[AnyArray, "b x y z d"],
    value: Float[AnyArray, "b x y z c"],
    *,
    radius: int = 1,
) -> tuple[Float[Array, "b x y z c"], Float[Array, "b x y z 3"], Float[Array, "b x y z"]]:
    """Scaled dot-product attention over the (2r+1)^3 voxels around each query voxel (eq. 10, restricted).

    Args:
      query: [b, x, y, z, d].
      key: [b, x, y, z, d].
      value: [b, x, y, z, c].
      radius: r in voxels, at least 1. Neighbours outside the grid don't take part.

    Returns:
      attended: [b, x, y, z, c], the weighted mean of the values.
      offset: [b, x, y, z, 3], the weighted mean of the neighbours' offsets, in voxels.
      entropy: [b, x, y, z], of the weights, in nats.

    Raises:
      ValueError: shapes that don't belong together.

    Examples:
      >>> features = jnp.zeros((1, 4, 4, 4, 8))  # all neighbours match alike
      >>> attended, offset, entropy = neighbourhood_attention(features, features, features)
      >>> offset[0, 0, 1, 1].tolist(), round(float(entropy[0, 1, 1, 1]), 3)
      ([0.5, 0.0, 0.0], 3.296)
    """
    if query.ndim != 5 or query.shape != key.shape or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "query and key must be [b, x, y, z, d] and value [b, x, y, z, c], "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    _, _, ny, nz, d = query.shape
    whole = whole_width(query.shape[1])
    attended, offset, entropy = map_nearby(
        lambda first, _, *arrays: attend_slices(*arrays, first=first, radius=radius, whole=whole),
        [jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)],
        reach=radius,
        slice_bytes=attention_bytes(ny * nz, radius, d, value.shape[-1]),
        limit_bytes=limit_bytes("attention"),
    )
    return attended, offset, entropy


def attention_bytes(voxels: int, radius: int, d: int, c: int) -> int:
    """Bytes of the intermediates of `attend_slices`.

    Args:
      voxels: how many there are.
      radius: of the neighbourhood, in voxels.
      d: channels of the queries.
      c: channels of the values.

    Returns:
      The number of bytes.
    """
    return 4 * voxels * (2 * (2 * radius + 1) ** 3 + 2 * d + 2 * c)


def attend_slices(
    query: Float[Array, "b x y z d"],
    key: Float[Array, "b x y z d"],
    value: Float[Array, "b x y z c"],
    *,
    first: int | Integer[Array, ""],
    radius: int,
    whole: int,
) -> tuple[Float[Array, "b x y z c"], Float[Array, "b x y z 3"], Float[Array, "b x y z"]]:
    """`neighbourhood_attention` within some slices of a volume.

    Args:
      query: [b, x, y, z, d].
      key: [b, x, y, z, d].
      value: [b, x, y, z, c].
      first: index along x, in the whole volume, of the first slice; it may be traced.
      radius: of the neighbourhood, in voxels.
      whole: how many slices the whole volume has.

    Returns:
      As `neighbourhood_attention`.
    """
    if not traces_for_cpu():
        return gpu.attend_slices(query, key, value, first, radius, whole)
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    logits = _correlate(_planar(scaled), _planar(key), radius)
    # The softmax runs in float32 whatever the dtype of the features.
    biases = _border_biases(first, query.shape[1:4], whole, radius)
    logits = [logit.astype(jnp.float32) + bias for logit, bias in zip(logits, biases, strict=True)]

    # The maximum keeps exp in range and cancels: no gradient has to pass through it.
    highest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, [x for logit in logits for x in logit]))
    zero = jnp.zeros_like(highest)
    (total, *offset), exponentials = jax.lax.scan(
        functools.partial(_exponentials, highest),
        [zero, zero, zero, zero],
        (jnp.asarray(_xy_offsets(radius), jnp.float32), logits),
    )
    scale = 1 / total
    attended = _gather([e.astype(value.dtype) for e in exponentials], _planar(value), radius)
    attended = jnp.moveaxis(attended, 0, -1) * scale[..., None].astype(value.dtype)
    expected_offset = jnp.stack([o * scale for o in offset], axis=-1)
    # H = log(sum exp(l)) - sum(w l); an absent neighbour has weight 0.
    expected = _add(
        e * (logit - highest)
        for all_e, all_logits in zip(exponentials, logits, strict=True)
        for e, logit in zip(all_e, all_logits, strict=True)
    )
    return attended, expected_offset, jnp.log(total) - expected * scale


def _exponentials(
    highest: Array, sums: list[Array], xy_and_logits: tuple[Array, list[Array]]
) -> tuple[list[Array], list[Array]]:
    """A step of the softmax: the exponentials, and the sums over them of 1 and of the offsets."""
    xy, logits = xy_and_logits
    total, along_x, along_y, along_z = sums
    exponentials = [jnp.exp(logit - highest) for logit in logits]
    here = _add(exponentials)
    radius = len(logits) // 2
    z = _add(float(n - radius) * e for n, e in enumerate(exponentials) if n != radius)
    return [total + here, along_x + xy[0] * here, along_y + xy[1] * here, along_z + z], exponentials


def _xy_offsets(radius: int) -> np.ndarray:
    return np.array(list(itertools.product(range(-radius, radius + 1), repeat=2)))


def _border_biases(first: int | Array, shape: Sequence[int], whole: int, radius: int) -> list[Array]:
    """For each z offset, [(2r+1)^2, 1, x, y, z]: 0 where the neighbour is in the volume, or OUTSIDE."""

    def outside(place: AnyArray, n: int) -> Array:
        return jnp.where((place >= 0) & (place < n), jnp.float32(0), jnp.float32(OUTSIDE))

    slices, ny, nz = shape
    offsets = _xy_offsets(radius)
    along_x = outside(first + (np.arange(slices) + offsets[:, :1]), whole)[:, None, :, None, None]
    along_y = outside(np.arange(ny) + offsets[:, 1:], ny)[:, None, None, :, None]
    # Sums of vectors, broadcast when they are added: a whole volume of constants would be in the program.
    along_z = [outside(np.arange(nz) + o, nz)[None, None, None, None] for o in range(-radius, radius + 1)]
    return [along_x + along_y + z for z in along_z]


def _planar(features: Array) -> Array:
    """[b, x, y, z, c] -> [c, b, x, y, z]."""
    return jnp.moveaxis(features, -1, 0)


def _groups(planes: Array) -> Array:
    """[c, ...] -> [g, c / g, ...], at most _GROUP channels in each; zeros fill up the last."""
    channels = planes.shape[0]
    count = -(-channels // _GROUP)
    size = -(-channels // count)
    padded = jnp.pad(planes, [(0, count * size - channels)] + [(0, 0)] * (planes.ndim - 1))
    return padded.reshape(count, size, *planes.shape[1:])


def _add(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


def _pad(planes: Array, radius: int) -> Array:
    return jnp.pad(planes, [(0, 0)] * (planes.ndim - 3) + 3 * [(radius, radius)])


def _shift(padded: Array, shape: Sequence[int], xy: Array, k: int) -> Array:
    """The block of `shape` of a padded plane [b, x', y', z'] from index (*xy, k); xy may be traced."""
    b, nx, ny, nz = shape
    return jax.lax.dynamic_slice(padded, (0, xy[0], xy[1], k), (b, nx, ny, nz))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(query: Array, key: Array, radius: int) -> list[Array]:
    """[c, b, x, y, z] twice -> list over z offsets of [(2r+1)^2, b, x, y, z]."""
    shape = query.shape[1:]
    starts = jnp.asarray(_xy_offsets(radius) + radius)

    def group(total: list[Array], query_and_key: tuple[Array, Array]) -> tuple[list[Array], None]:
        query, key = query_and_key

        def step(_: None, xy_and_total: tuple[Array, list[Array]]) -> tuple[None, list[Array]]:
            xy, total = xy_and_total
            return None, [
                t + _add(q * _shift(k, shape, xy, n) for q, k in zip(query, key, strict=True))
                for n, t in enumerate(total)
            ]

        return jax.lax.scan(step, None, (starts, total))[1], None

    zero = [jnp.zeros((len(starts), *shape), query.dtype) for _ in range(2 * radius + 1)]
    return jax.lax.scan(group, zero, (_groups(query), _groups(_pad(key, radius))))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather(weights: list[Array], value: Array, radius: int) -> Array:
    """Weights and [c, b, x, y, z] -> [c, b, x, y, z]."""
    shape = value.shape[1:]
    starts = jnp.asarray(_xy_offsets(radius) + radius)

    def group(value: Array) -> Array:
        def step(total: list[Array], xy_and_weights: tuple[Array, list[Array]]) -> tuple[list[Array], None]:
            xy, weights = xy_and_weights
            return [
                t + _add(w * _shift(v, shape, xy, n) for n, w in enumerate(weights))
                for t, v in zip(total, value, strict=True)
            ], None

        zero = [jnp.zeros(shape, value.dtype) for _ in range(value.shape[0])]
        return jnp.stack(jax.lax.scan(step, zero, (starts, weights))[0])

    return _per_group(group, _pad(value, radius), value.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter(weights: list[Array], source: Array, radius: int) -> Array:
    """As `_gather`, transposed: what every voxel sends to its neighbours."""
    shape = source.shape[1:]
    starts = jnp.asarray(radius - _xy_offsets(radius))  # p - o, in the padded plane
    weights = [_pad(w, radius) for w in weights]

    def group(source: Array) -> Array:
        def step(total: list[Array], xy_and_weights: tuple[Array, list[Array]]) -> tuple[list[Array], None]:
            xy, weights = xy_and_weights
            sent = [_shift(w, shape, xy, 2 * radius - n) for n, w in enumerate(weights)]
            return [
                t + _add(w * _shift(s, shape, xy, 2 * radius - n) for n, w in enumerate(sent))
                for t, s in zip(total, source, strict=True)
            ], None

        zero = [jnp.zeros(shape, source.dtype) for _ in range(source.shape[0])]
        return jnp.stack(jax.lax.scan(step, zero, (starts, weights))[0])

    return _per_group(group, _pad(source, radius), source.shape)


def _per_group(function: Callable[[Array], Array], padded: Array, shape: Sequence[int]) -> Array:
    """`function` of each group of channels of the padded planes, put together to `shape`."""
    result = jax.lax.map(function, _groups(padded))
    return result.reshape(-1, *shape[1:])[: shape[0]]


def _defvjp(function: jax.custom_vjp, backward: Callable[..., tuple[Any, Any]]) -> None:
    function.defvjp(
        lambda a, b, radius: (function(a, b, radius), (a, b)),
        lambda radius, saved, cotangent: backward(*saved, cotangent, radius),
    )


_defvjp(_correlate, lambda q, k, g, r: (_gather(g, k, r), _scatter(g, q, r)))
_defvjp(_gather, lambda w, v, g, r: (_correlate(g, v, r), _scatter(w, g, r)))
_defvjp(_scatter, lambda w, s, g, r: (_correlate(s, g, r), _gather(w, g, r)))
