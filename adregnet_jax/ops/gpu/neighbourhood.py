"""Attention of every voxel to the voxels around it, as few kernels without loops.

The three maps of `ops.neighbourhood`, with the same derivatives, are one sum each here, whose terms exist in
no memory: XLA reads the neighbours by their index in the kernel that adds up.

    correlate(q, k)[p, n] = sum_c q[p, c] k[p + o_n, c]
    gather(w, v)[p, c]    = sum_n w[p, n] v[p + o_n, c]
    scatter(w, s)[p, c]   = sum_n w[p - o_n, n] s[p - o_n, c]

Features are [b, x, y, z, c] and weights [b, x, y, z, n], for the (2r+1)^3 offsets o_n. Sums are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

OUTSIDE = -1e30  # the logit of a neighbour beyond the border: no softmax sees it


@functools.partial(jax.checkpoint, static_argnums=(4, 5))
def attend_slices(
    query: Float[Array, "b x y z d"],
    key: Float[Array, "b x y z d"],
    value: Float[Array, "b x y z c"],
    first: int | Integer[Array, ""],
    radius: int,
    whole: int,
) -> tuple[Float[Array, "b x y z c"], Float[Array, "b x y z 3"], Float[Array, "b x y z"]]:
    """`ops.neighbourhood.attend_slices`; the gradient computes the weights again, where it would keep them.

    Arguments and results are those described there.
    """
    # [b, x, y, z, n]
    logits = _correlate(query, key, radius) * query.shape[-1] ** -0.5
    logits = jnp.where(_is_inside(query.shape, radius, first, whole), logits, OUTSIDE)
    # The maximum keeps exp in range and cancels: no gradient has to pass through it. Without the barrier, XLA
    # would spend half a minute on the search for tiles of a softmax in one kernel.
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    logits = logits - jax.lax.optimization_barrier(highest)
    exponentials = jnp.exp(logits)
    total = jnp.sum(exponentials, axis=-1)
    offset = [jnp.sum(exponentials * o[None, None, None, None], axis=-1) / total for o in _offsets(radius)]
    # H = log(sum exp(l)) - sum(w l); an absent neighbour has weight 0.
    entropy = jnp.log(total) - jnp.sum(exponentials * logits, axis=-1) / total
    attended = _gather(exponentials.astype(value.dtype), value, radius) / total[..., None]
    return attended.astype(value.dtype), jnp.stack(offset, axis=-1), entropy


def _offsets(radius: int) -> Integer[np.ndarray, "3 n"]:
    """Along x, y and z, of each neighbour."""
    return np.indices((2 * radius + 1,) * 3).reshape(3, -1) - radius


def _is_inside(
    shape: tuple[int, ...], radius: int, first: int | Array, whole: int, sign: int = 1
) -> Bool[Array, "1 x y z n"]:
    """Whether each neighbour, at `sign` times its offset, lies in a volume of which there are some slices."""
    _, *sizes, _ = shape
    inside = jnp.ones((1, 1, 1, 1, 1), bool)
    for axis, (offset, limit) in enumerate(zip(_offsets(radius), (whole, *sizes[1:]), strict=True)):
        place = (0 if axis else first) + (np.arange(sizes[axis])[:, None] + sign * offset)  # [x, n]
        along = [sizes[k] if k == axis else 1 for k in range(3)]
        inside = inside & ((place >= 0) & (place < limit)).reshape(1, *along, -1)
    return inside


def _index(shape: tuple[int, ...], radius: int, sign: int) -> tuple[Array, Array]:
    """The place of each neighbour among all voxels of a batch, [b, x, y, z, n], and whether it is there."""
    b, nx, ny, nz, _ = shape
    x, y, z = _offsets(radius)  # [n] each
    own = jax.lax.iota(jnp.int32, b * nx * ny * nz).reshape(b, nx, ny, nz, 1)
    index = own + (sign * ((x * ny + y) * nz + z)).astype(np.int32)[None, None, None, None]
    return jnp.clip(index, 0, b * nx * ny * nz - 1), _is_inside(shape, radius, 0, nx, sign)


def _read(rows: Array, index: Array) -> Array:
    return rows.at[index].get(mode="promise_in_bounds")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _correlate(query: Array, key: Array, radius: int) -> Array:
    """[b, x, y, z, c] twice -> [b, x, y, z, n], float32."""
    index, inside = _index(query.shape, radius, 1)
    neighbours = _read(key.reshape(-1, key.shape[-1]), index).astype(jnp.float32)
    products = query[..., None, :].astype(jnp.float32) * neighbours
    return jnp.where(inside, jnp.sum(products, axis=-1), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gather(weights: Array, value: Array, radius: int) -> Array:
    """[b, x, y, z, n] and [b, x, y, z, c] -> [b, x, y, z, c], float32."""
    index, inside = _index(value.shape, radius, 1)
    neighbours = _read(value.reshape(-1, value.shape[-1]), index).astype(jnp.float32)
    weights = jnp.where(inside, weights, 0).astype(jnp.float32)
    return jnp.sum(weights[..., None] * neighbours, axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter(weights: Array, source: Array, radius: int) -> Array:
    """As `_gather`, transposed: what every voxel sends to its neighbours."""
    index, inside = _index(source.shape, radius, -1)
    count = weights.shape[-1]
    n = jax.lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, count), 4)
    sent = weights.reshape(-1, count).at[index, n].get(mode="promise_in_bounds")
    sent = jnp.where(inside, sent, 0).astype(jnp.float32)
    neighbours = _read(source.reshape(-1, source.shape[-1]), index).astype(jnp.float32)
    return jnp.sum(sent[..., None] * neighbours, axis=-2)


def _defvjp(function: jax.custom_vjp, backward: Callable[..., tuple[Any, Any]]) -> None:
    def pull_back(radius: int, saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
        gradients = backward(*saved, cotangent, radius)
        first, second = (g.astype(s.dtype) for g, s in zip(gradients, saved, strict=True))
        return first, second

    function.defvjp(lambda a, b, radius: (function(a, b, radius), (a, b)), pull_back)


# Weights and their gradients are written to memory in the dtype of the features, and added up in float32.
_defvjp(_correlate, lambda q, k, g, r: (_gather(g.astype(k.dtype), k, r), _scatter(g.astype(q.dtype), q, r)))
_defvjp(_gather, lambda w, v, g, r: (_correlate(g, v, r), _scatter(w, g, r)))
_defvjp(_scatter, lambda w, s, g, r: (_correlate(s, g, r), _gather(w, g, r)))
