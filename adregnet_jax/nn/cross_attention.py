"""Bidirectional cross-attention of one level, section III-B2, eq. 8-12."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from adregnet_jax.config import ModelConfig
from adregnet_jax.ops.attention import blocked_attention
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.neighbourhood import neighbourhood_attention
from adregnet_jax.ops.slabs import whole_width

COSINE_SCALE = 10.0  # of the logits at the start, with `cosine_logits`


class Match(NamedTuple):
    """What cross-attention says of one level."""

    features: jax.Array  # [b, x, y, z, c], the A^l of eq. 12
    offset: jax.Array  # [b, x, y, z, 6] voxels: expected offsets of the matches, fixed -> moving and back
    entropy: jax.Array  # [b, x, y, z] nats, of the match of each fixed voxel


class CrossAttention(nn.Module):
    """Attention between the features of two images, in both directions.

    Exact over all voxels where there are at most `config.global_attention_tokens` of them, and over the
    neighbours of each voxel where there are more.
    """

    config: ModelConfig
    axis_name: str | None = None

    @nn.compact
    def __call__(self, moving: jax.Array, fixed: jax.Array) -> Match:
        """moving, fixed: [b, x, y, z, c]."""
        c = fixed.shape[-1]

        def project(name, features):
            return nn.Dense(c, use_bias=False, dtype=self.config.dtype, name=name)(features)

        # eq. 8, 9
        value_m, value_f = project("value_moving", moving), project("value_fixed", fixed)
        if self.config.shared_projection:
            # Not in the paper: with maps of their own, it is learned only slowly that like features match.
            query_m, query_f = jnp.split(project("match", jnp.concatenate([moving, fixed])), 2)
            key_m, key_f = query_m, query_f
        else:
            query_m, key_m = (project(f"{role}_moving", moving) for role in ("query", "key"))
            query_f, key_f = (project(f"{role}_fixed", fixed) for role in ("query", "key"))
        locality = None
        if self.config.position_aware:
            # Not in the paper: anatomy moves by some voxels, not across the body. How far is learned.
            locality = jax.nn.softplus(self.param("locality", nn.initializers.constant(-2.0), ()))
        # Both directions in one batch: one pass of the attention, and half the program to compile.
        attended, offset, entropy = self._attend(
            jnp.concatenate([query_m, query_f]),
            jnp.concatenate([key_f, key_m]),
            jnp.concatenate([value_f, value_m]),
            locality,
        )
        to_fixed, to_moving = jnp.split(attended, 2)  # eq. 10, 11
        back, forth = jnp.split(offset, 2)
        alpha = self.param("alpha", nn.initializers.constant(0.5), ()).astype(self.config.dtype)
        features = alpha * to_fixed + (1 - alpha) * to_moving  # eq. 12
        return Match(features, jnp.concatenate([forth, back], axis=-1), jnp.split(entropy, 2)[1])

    def _attend(self, query, key, value, locality):
        """[b, x, y, z, c] three times -> attended values, expected offsets [.., 3] and entropies."""
        query, key, value = (self._heads_to_batch(array) for array in (query, key, value))
        if self.config.cosine_logits:
            # Not in the paper: plain products of small features leave the weights close to equal.
            scale = self.param("scale", nn.initializers.constant(COSINE_SCALE), ())
            query, key = _unit(query), _unit(key)
            scale = scale * query.shape[-1] ** 0.5  # by which the attention divides
            query = query * scale.astype(query.dtype)
        if whole_width(query[0, ..., 0].size, self.axis_name) <= self.config.global_attention_tokens:
            attended, offset, entropy = _attend_globally(
                query, key, value, locality, self.config.attention_block, self.axis_name
            )
        else:
            radius = self.config.neighbourhood_radius
            attended, offset, entropy = neighbourhood_attention(
                query, key, value, radius=radius, axis_name=self.axis_name
            )
        return self._batch_to_heads(attended), self._head_mean(offset), self._head_mean(entropy)

    def _heads_to_batch(self, features):
        b, *shape, c = features.shape
        heads = self.config.heads
        split = features.reshape(b, *shape, heads, c // heads)
        return jnp.moveaxis(split, -2, 1).reshape(b * heads, *shape, c // heads)

    def _batch_to_heads(self, features):
        heads = self.config.heads
        split = features.reshape(-1, heads, *features.shape[1:])
        return jnp.moveaxis(split, 1, -2).reshape(-1, *features.shape[1:4], heads * features.shape[-1])

    def _head_mean(self, values):
        return values.reshape(-1, self.config.heads, *values.shape[1:]).mean(axis=1)


def _unit(features):
    """[..., c] divided by their length; zeros stay zeros."""
    squared = jnp.sum(features.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(squared + 1e-6).astype(features.dtype)


def _attend_globally(query, key, value, locality, block, axis_name):
    b, *shape, c = query.shape
    whole = (whole_width(shape[0], axis_name), *shape[1:])
    grid = identity_grid(tuple(shape), axis_name=axis_name) - (jnp.array(whole) - 1) / 2
    place = jnp.broadcast_to(grid.reshape(1, -1, 3), (b, query[0, ..., 0].size, 3))  # [b, q, 3]
    query, key, value = (array.reshape(b, -1, array.shape[-1]) for array in (query, key, value))
    if locality is not None:
        # -g |p - q|^2 = 2 g p.q - g |q|^2 + (the same for every key), as four more channels of the product.
        ones = jnp.ones_like(place[..., :1])
        scale = (c + 4) ** 0.5  # blocked_attention divides by it
        query = jnp.concatenate([query * (scale / c**0.5), scale * place, scale * ones], axis=-1)
        squared = jnp.sum(place**2, axis=-1, keepdims=True)
        key = jnp.concatenate([key, 2 * locality * place, -locality * squared], axis=-1)
    values = jnp.concatenate([value, place.astype(value.dtype)], axis=-1)
    if axis_name is not None:  # the level is coarse: every device can hold all of its keys and values
        key, values = jax.lax.all_gather((key, values), axis_name, axis=1, tiled=True)
    attended, entropy = blocked_attention(query, key, values, block=block)
    offset = attended[..., c:].astype(jnp.float32) - place
    attended = attended[..., :c].reshape(b, *shape, c)
    return attended, offset.reshape(b, *shape, 3), entropy.reshape(b, *shape)
