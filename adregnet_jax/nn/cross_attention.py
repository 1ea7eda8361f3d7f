"""Bidirectional cross-attention of one level, section III-B2, eq. 8-12."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.layers import DenseParameters
from adregnet_jax.nn.precision import products, stored
from adregnet_jax.ops.attention import blocked_attention
from adregnet_jax.ops.cpu.budget import limit_bytes, traces_for_cpu
from adregnet_jax.ops.cpu.chunks import map_nearby
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.neighbourhood import attend_slices, attention_bytes
from adregnet_jax.ops.slabs import join_slabs, whole_width

COSINE_SCALE = 10.0  # of the logits at the start, with `cosine_logits`

_Parameters = dict[str, jax.Array]
_Arrays = tuple[jax.Array, jax.Array, jax.Array]


class Match(NamedTuple):
    """What cross-attention says of one level."""

    features: Float[Array, "b x y z c"]  # the A^l of eq. 12
    offset: Float[Array, "b x y z 6"]  # voxels: expected offsets of the matches, fixed -> moving and back
    entropy: Float[Array, "b x y z"]  # nats, of the match of each fixed voxel


class CrossAttention(nn.Module):
    """Attention between the features of two images, in both directions.

    Exact over all voxels where there are at most `config.global_attention_tokens` of them, and over the
    neighbours of each voxel where there are more. The latter goes through large volumes chunk by chunk, so
    that queries, keys and values of whole volumes never exist.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, moving: Float[Array, "b x y z c"], fixed: Float[Array, "b x y z c"]) -> Match:
        """Matches every voxel of one image with those of the other.

        Args:
          moving: [b, x, y, z, c], features of the moving images.
          fixed: [b, x, y, z, c], features of the fixed images.

        Returns:
          A `Match`.
        """
        c = fixed.shape[-1]
        names = ["value_moving", "value_fixed"]
        if self.config.shared_projection:
            # Not in the paper: with maps of their own, it is learned only slowly that like features match.
            names.append("match")
        else:
            names += ["query_moving", "query_fixed", "key_moving", "key_fixed"]
        parameters = {name: DenseParameters(c, c, use_bias=False, name=name)()[0] for name in names}
        scalars = {"alpha": 0.5}
        if self.config.position_aware:
            # Not in the paper: anatomy moves by some voxels, not across the body. How far is learned.
            scalars["locality"] = -2.0
        if self.config.cosine_logits:
            scalars["scale"] = COSINE_SCALE
        for name, initial in scalars.items():
            parameters[name] = self.param(name, nn.initializers.constant(initial), ())

        whole = (whole_width(fixed.shape[1]), *fixed.shape[2:4])
        if math.prod(whole) <= self.config.global_attention_tokens:
            return Match(*self._attend_globally(parameters, moving, fixed))

        def attend(
            first: int | jax.Array, parameters: _Parameters, moving: jax.Array, fixed: jax.Array
        ) -> _Arrays:
            tokens = self._tokens(parameters, moving, fixed)
            radius = self.config.neighbourhood_radius
            return self._match(
                parameters, *attend_slices(*tokens, first=first, radius=radius, whole=whole[0])
            )

        # Both directions; of each voxel, its heads have queries, keys and values of c channels together.
        radius, heads = self.config.neighbourhood_radius, self.config.heads
        of_slice = 2 * heads * attention_bytes(whole[1] * whole[2], radius, c // heads, c // heads)
        return Match(
            *map_nearby(
                attend,
                [moving, fixed],
                reach=radius,
                slice_bytes=of_slice,
                limit_bytes=limit_bytes("attention"),
                shared=parameters,
            )
        )

    def _tokens(self, parameters: _Parameters, moving: jax.Array, fixed: jax.Array) -> _Arrays:
        """Queries, keys and values [2 b heads, x, y, z, c / heads], eq. 8, 9: moving -> fixed, and back."""

        def project(name: str, features: jax.Array) -> jax.Array:
            dtype = stored(self.config.dtype)
            kernel = parameters[name].astype(dtype)
            return jnp.matmul(features.astype(dtype), kernel, precision=products(self.config.dtype))

        # Both directions in one batch: one pass of the attention, and half the program to compile.
        if not (traces_for_cpu() or self.config.shared_projection):
            query, key, value = self._projected_together(parameters, moving, fixed)
            return self._scaled(parameters, query, key, value)
        value = jnp.concatenate([project("value_fixed", fixed), project("value_moving", moving)])
        if self.config.shared_projection:
            query = project("match", jnp.concatenate([moving, fixed]))
            key = jnp.concatenate(jnp.split(query, 2)[::-1])
        else:
            query = jnp.concatenate([project("query_moving", moving), project("query_fixed", fixed)])
            key = jnp.concatenate([project("key_fixed", fixed), project("key_moving", moving)])
        return self._scaled(parameters, query, key, value)

    def _projected_together(self, parameters: _Parameters, moving: jax.Array, fixed: jax.Array) -> _Arrays:
        """Queries, keys and values [2 b, x, y, z, c] by one product, with two for its gradients."""
        kernel = jnp.stack(
            [
                jnp.concatenate([parameters[f"{kind}_{of}"] for kind in ("query", "key", "value")], axis=-1)
                for of in ("fixed", "moving")
            ]
        )
        dtype = stored(self.config.dtype)
        projected = jnp.einsum(
            "ibxyzc,icd->ibxyzd",
            jnp.stack([fixed, moving]).astype(dtype),
            kernel.astype(dtype),
            precision=products(self.config.dtype),
        )
        query, key, value = jnp.split(projected, 3, axis=-1)
        query = query[::-1]  # those of the moving image match the keys of the fixed one first
        query, key, value = (array.reshape(-1, *array.shape[2:]) for array in (query, key, value))
        return query, key, value

    def _scaled(self, parameters: _Parameters, query: jax.Array, key: jax.Array, value: jax.Array) -> _Arrays:
        """Heads become a part of the batch; lengths of queries and keys with `cosine_logits`."""
        query, key, value = (self._heads_to_batch(array) for array in (query, key, value))
        if self.config.cosine_logits:
            # Not in the paper: plain products of small features leave the weights close to equal.
            query, key = _unit(query), _unit(key)
            # The attention divides by the root.
            scale = parameters["scale"] * query.shape[-1] ** 0.5
            query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # its gradient is a long sum
        return query, key, value

    def _match(
        self, parameters: _Parameters, attended: jax.Array, offset: jax.Array, entropy: jax.Array
    ) -> _Arrays:
        """What the attention of both directions says: the fields of a `Match`."""
        to_fixed, to_moving = jnp.split(self._batch_to_heads(attended), 2)  # eq. 10, 11
        back, forth = jnp.split(self._head_mean(offset), 2)
        alpha = parameters["alpha"]  # in float32, as is its gradient, a sum over all voxels
        to_fixed, to_moving = to_fixed.astype(jnp.float32), to_moving.astype(jnp.float32)
        if traces_for_cpu():
            blended = alpha * to_fixed + (1 - alpha) * to_moving  # eq. 12
        else:  # the same, with a single sum for the gradient of alpha
            blended = to_moving + alpha * (to_fixed - to_moving)
        features = blended.astype(stored(self.config.dtype))
        both = jnp.concatenate([forth, back], axis=-1)
        return features, both, jnp.split(self._head_mean(entropy), 2)[1]

    def _attend_globally(self, parameters: _Parameters, moving: jax.Array, fixed: jax.Array) -> _Arrays:
        locality = None
        if self.config.position_aware:
            locality = jax.nn.softplus(parameters["locality"])
        tokens = self._tokens(parameters, moving, fixed)
        found = _attend_globally(tokens, locality, self.config.attention_block, products(self.config.dtype))
        return self._match(parameters, *found)

    def _heads_to_batch(self, features: jax.Array) -> jax.Array:
        b, *shape, c = features.shape
        heads = self.config.heads
        split = features.reshape(b, *shape, heads, c // heads)
        return jnp.moveaxis(split, -2, 1).reshape(b * heads, *shape, c // heads)

    def _batch_to_heads(self, features: jax.Array) -> jax.Array:
        heads = self.config.heads
        split = features.reshape(-1, heads, *features.shape[1:])
        return jnp.moveaxis(split, 1, -2).reshape(-1, *features.shape[1:4], heads * features.shape[-1])

    def _head_mean(self, values: jax.Array) -> jax.Array:
        return values.reshape(-1, self.config.heads, *values.shape[1:]).mean(axis=1)


def _unit(features: jax.Array) -> jax.Array:
    """[..., c] divided by their length; zeros stay zeros."""
    squared = jnp.sum(features.astype(jnp.float32) ** 2, axis=-1, keepdims=True)
    return features * jax.lax.rsqrt(squared + 1e-6).astype(features.dtype)


def _attend_globally(
    tokens: _Arrays, locality: jax.Array | None, block: int, precision: jax.lax.Precision
) -> _Arrays:
    query, key, value = tokens
    b, *shape, c = query.shape
    whole = (whole_width(shape[0]), *shape[1:])
    centre = (jnp.array(whole) - 1) / 2
    grid = identity_grid(tuple(shape)) - centre[None, None, None]
    place = jnp.broadcast_to(grid.reshape(1, -1, 3), (b, query[0, ..., 0].size, 3))  # [b, q, 3]
    query, key, value = (array.reshape(b, -1, array.shape[-1]) for array in (query, key, value))
    if locality is not None:
        # -g |p - q|^2 = 2 g p.q - g |q|^2 + (the same for every key), as four more channels of the product.
        ones = jnp.ones_like(place[..., :1])
        scale = (c + 4) ** 0.5  # blocked_attention divides by it
        query = jnp.concatenate([query * (scale / c**0.5), scale * place, scale * ones], axis=-1)
        squared = jnp.sum(place**2, axis=-1, keepdims=True)
        key = jnp.concatenate([key, locality * jnp.concatenate([2 * place, -squared], axis=-1)], axis=-1)
    # In float32: the offset is a small difference of places.
    values = jnp.concatenate([value.astype(jnp.float32), place], axis=-1)
    # The level is coarse: every device can hold all of its keys and values.
    key, values = join_slabs((key, values))
    attended, entropy = blocked_attention(query, key, values, block=block, precision=precision)
    offset = attended[..., c:] - place
    attended = attended[..., :c].astype(value.dtype).reshape(b, *shape, c)
    return attended, offset.reshape(b, *shape, 3), entropy.reshape(b, *shape)
