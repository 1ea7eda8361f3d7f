"""Regional adaptive attention of one level, section III-B3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.layers import DenseParameters
from adregnet_jax.ops.attention import blocked_attention
from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.ops.resampling import resize_axis
from adregnet_jax.ops.slabs import slab_count, slab_start, sum_over_slabs, whole_width


class RegionalAttention(nn.Module):
    """Weighs non-overlapping regions of a feature map by self-attention over their mean features.

    Attributes:
      config: of the model.
      region: width of a region in voxels of this map.
    """

    config: ModelConfig
    region: int

    @nn.compact
    def __call__(
        self, features: Float[Array, "b x y z c"]
    ) -> tuple[Float[Array, "b x y z c"], Float[Array, "b x y z 1"]]:
        """[b, x, y, z, c] -> the weighted features F', same shape, and M^l [b, x, y, z, 1] in [0, 1]."""
        b, *shape, c = features.shape
        # [b, x', y', z', c], of all regions also where the features are a slab
        means = region_means(features.astype(jnp.float32), self.region)
        grid = means.shape[1:4]
        tokens = means.reshape(b, -1, c)
        kernels = [
            DenseParameters(c, c, use_bias=False, name=name)()[0] for name in ("query", "key", "value")
        ]
        if traces_for_cpu():
            query, key, value = (jnp.matmul(tokens, kernel, precision="highest") for kernel in kernels)
        else:
            joined = jnp.matmul(tokens, jnp.concatenate(kernels, axis=-1), precision="highest")
            query, key, value = jnp.split(joined, 3, axis=-1)
        context, _ = blocked_attention(
            query, key, value, block=self.config.attention_block, precision="highest"
        )
        score = nn.Dense(1, precision="highest", name="score")(context)[..., 0]  # [b, n]
        log_weight = jax.nn.log_softmax(score, axis=-1)
        relative = log_weight + math.log(score.shape[-1])  # log(n w): 0 where all regions count alike

        # Without the factor n (as the paper writes it) F' is about 1 / n of the features.
        weight = jnp.exp(relative if self.config.scale_region_weights else log_weight)
        weight = weight.reshape(b, *grid, 1)
        # The paper uses M^l without a definition; here it is the weight, squashed to [0, 1].
        bias = self.param("mask_bias", nn.initializers.constant(2.0), ())
        mask = jax.nn.sigmoid(relative + bias).reshape(b, *grid, 1)
        if traces_for_cpu():
            weight, mask = self._to_voxels(weight, shape), self._to_voxels(mask, shape)
        else:
            both = self._to_voxels(jnp.concatenate([weight, mask], axis=-1), shape)
            weight, mask = jnp.split(both, 2, axis=-1)
        return features * weight.astype(features.dtype), mask

    def _to_voxels(self, values: jax.Array, shape: Sequence[int]) -> jax.Array:
        """One value a region -> one a voxel: constant in the region, or interpolated between the centres."""
        x, y, z = shape
        for axis in (1, 2, 3):
            n = self.region * values.shape[axis]
            if self.config.blend_regions:
                values = resize_axis(values, n, axis=axis)  # every device holds all regions
            else:
                values = jnp.repeat(values, self.region, axis=axis)
            if axis == 1 and slab_count() > 1:
                values = jax.lax.dynamic_slice_in_dim(values, slab_start(x), x, axis=1)
        return values[:, :x, :y, :z]


def region_means(features: Float[Array, "b x y z c"], region: int) -> Float[Array, "b x2 y2 z2 c"]:
    """Means over blocks of `region` voxels a side; the last blocks may be partial.

    [b, x, y, z, c] -> [b, ceil(x / region), ..., c]; of a slab, all of the whole volume.
    """
    width = features.shape[1]
    shape = (whole_width(width), *features.shape[2:4])
    count = [-(-n // region) for n in shape]
    padding = [(0, m * region - n) for m, n in zip(count, shape, strict=True)]
    sums = features
    if slab_count() > 1:
        padding[0] = (0, 0)
        of_block = (slab_start(width) + jnp.arange(width))[None] // region == jnp.arange(count[0])[:, None]
        sums = jnp.einsum("px,bxyzc->bpyzc", of_block.astype(sums.dtype), sums, precision="highest")
    sums = jnp.pad(sums, [(0, 0), *padding, (0, 0)])
    for axis, m in enumerate(count, start=1):  # one axis at a time
        if axis == 1 and slab_count() > 1:
            continue
        sums = sums.reshape(*sums.shape[:axis], m, region, *sums.shape[axis + 1 :]).sum(axis=axis + 1)
    sums = sum_over_slabs(sums)
    voxels = [
        jnp.minimum(region, n - region * jnp.arange(m)) for m, n in zip(count, shape, strict=True)
    ]  # of each block, along each axis
    x, y, z = jnp.ix_(*voxels)
    return sums / (x * y * z)[None, ..., None]
