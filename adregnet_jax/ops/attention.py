"""Exact scaled dot-product attention in blocks of keys: never more than one block of logits in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import limit_bytes

# The highest logit, the sums over exponentials of 1 and of the values, and that over logits, of each query.
_Sums = tuple[Array, Array, Array, Array]


def blocked_attention(
    query: Float[AnyArray, "b q d"],
    key: Float[AnyArray, "b k d"],
    value: Float[AnyArray, "b k c"],
    *,
    block: int = 512,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Float[Array, "b q c"], Float[Array, "b q"]]:
    """`softmax(Q K^T / sqrt(d)) V` (eq. 10, 11) and the entropy of its weights.

    The softmax runs online over the blocks, in float32, and each block is computed again in the backward
    pass: memory does not grow with the number of keys. Logits of a few keys need no blocks; how many that
    are, depends on the platform (`ops.cpu.budget`).

    Args:
      query: [b, q, d].
      key: [b, k, d].
      value: [b, k, c].
      block: keys in a block.
      precision: of both products, as for `jnp.einsum`.

    Returns:
      [b, q, c] in the dtype of `value`, and [b, q] in nats.

    Raises:
      ValueError: shapes that don't belong together.

    Examples:
      >>> query, key = jnp.zeros((1, 2, 8)), jnp.zeros((1, 4, 8))  # all keys match alike
      >>> attended, entropy = blocked_attention(query, key, jnp.arange(4.0).reshape(1, 4, 1))
      >>> attended.ravel().tolist(), round(float(entropy[0, 0]), 3)
      ([1.5, 1.5], 1.386)

    Reference:
      Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """
    if query.ndim != 3 or key.shape[:2] != value.shape[:2] or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "query must be [b, q, d], key [b, k, d] and value [b, k, c], "
            f"got {query.shape}, {key.shape} and {value.shape}"
        )
    b, keys, d = key.shape
    if 4 * b * query.shape[1] * keys <= limit_bytes("exact_attention"):
        return _attention(query, key, value, precision)
    multiply = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    block = min(block, keys)
    count = -(-keys // block)

    def in_blocks(array: AnyArray) -> Array:  # [b, k, c] -> [count, b, block, c]
        padded = jnp.pad(array, ((0, 0), (0, count * block - keys), (0, 0)))
        return jnp.moveaxis(padded.reshape(b, count, block, -1), 1, 0)

    # [count, 1, 1, block]
    absent = jnp.where(jnp.arange(count * block) < keys, 0.0, -jnp.inf).reshape(count, 1, 1, block)
    query = query * jnp.asarray(d**-0.5, query.dtype)

    @jax.checkpoint
    def add_block(carry: _Sums, block_of: tuple[Array, Array, Array]) -> tuple[_Sums, None]:
        highest, total, attended, expected = carry
        key, value, absent = block_of
        # [b, q, k]
        logits = multiply("bqd,bkd->bqk", query, key)
        new_highest = jnp.maximum(highest, jax.lax.stop_gradient(jnp.max(logits + absent, axis=-1)))
        weights = jnp.exp(logits + absent - new_highest[..., None])
        rescale = jnp.exp(highest - new_highest)
        products = multiply("bqk,bkc->bqc", weights.astype(value.dtype), value)
        return (
            new_highest,
            total * rescale + jnp.sum(weights, axis=-1),
            attended * rescale[..., None] + products,
            expected * rescale + jnp.sum(weights * logits, axis=-1),
        ), None

    shape = query.shape[:2]
    start = (
        jnp.full(shape, -jnp.inf),
        jnp.zeros(shape),
        jnp.zeros((*shape, value.shape[-1])),
        jnp.zeros(shape),
    )
    blocks = (in_blocks(key), in_blocks(value), absent)
    (highest, total, attended, expected), _ = jax.lax.scan(add_block, start, blocks)
    # H = log(sum exp(l)) - sum(w l)
    entropy = highest + jnp.log(total) - expected / total
    return (attended / total[..., None]).astype(value.dtype), entropy


def _attention(
    query: AnyArray, key: AnyArray, value: AnyArray, precision: jax.lax.PrecisionLike
) -> tuple[Array, Array]:
    """`blocked_attention` with all logits in memory."""
    multiply = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scaled = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    # [b, q, k]
    logits = multiply("bqd,bkd->bqk", scaled, key)
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits)
    # One more channel, 1 everywhere, adds up the weights in the same product.
    ones = jnp.ones_like(value[..., :1])
    products = multiply("bqk,bkc->bqc", weights.astype(value.dtype), jnp.concatenate([value, ones], axis=-1))
    products, total = products[..., :-1], products[..., -1]
    # H = log(sum exp(l)) - sum(w l)
    entropy = jnp.log(total) - jnp.sum(weights * logits, axis=-1) / total
    return (products / total[..., None]).astype(value.dtype), entropy
