"""AD-RegNet: backbone, cross-attention, regional attention and field synthesis, coarse to fine."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.ascent import AscentStep
from adregnet_jax.nn.backbone import Backbone
from adregnet_jax.nn.cross_attention import CrossAttention
from adregnet_jax.nn.deformation import FieldHead, Fusion
from adregnet_jax.nn.layers import Conv, JoinedDense, space_to_depth
from adregnet_jax.nn.precision import stored
from adregnet_jax.nn.prediction import Prediction, check_images, pad_to_multiple
from adregnet_jax.nn.regional_attention import RegionalAttention
from adregnet_jax.nn.remat import recomputed
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.resampling import resize_displacement
from adregnet_jax.ops.sampling import warp

HEAD_SHARE = 0.1  # with `match_residual`: a step of the optimiser else moves all of the coarse levels about


class AdRegNet(nn.Module):
    """The network of the paper; which reading of it, `config` says (`config.paper_model` for the letter).

    Any input size: volumes are padded at the high end to a multiple of 2^(levels - 1), times
    `config.stem_stride`, by repeating the border, and the displacement is cropped back.

    With `config.dropout`, a call with `rngs={"dropout": key}` leaves out channels at random; without a key
    the network is what it is without dropout.

    Where devices share volumes (`ops.slabs`), each slab must be such a multiple of voxels wide.
    """

    config: ModelConfig

    @property
    def multiple(self) -> int:
        """The sizes of what the stem and the levels can halve are multiples of it."""
        return self.config.stem_stride * 2 ** (len(self.config.channels) - 1)

    @nn.compact
    def __call__(
        self, fixed: Float[AnyArray, "b x y z 1"], moving: Float[AnyArray, "b x y z 1"]
    ) -> Prediction:
        """Estimates the displacement that warps `moving` onto `fixed` (eq. 2).

        Args:
          fixed: [b, x, y, z, 1], intensities in [0, 1].
          moving: [b, x, y, z, 1], on the same grid.

        Returns:
          A `Prediction`.

        Raises:
          ValueError: shapes that differ or are not [b, x, y, z, 1].
        """
        check_images(fixed, moving)
        config = self.config
        b, nx, ny, nz, _ = fixed.shape
        # One pass for both images: the backbone is shared.
        images = jnp.concatenate([fixed, moving])
        images = pad_to_multiple(images, self.multiple)
        whole = images.shape[1:4]
        backbone = Backbone(
            config.channels,
            config.finest_level,
            dropout=config.dropout,
            dtype=config.dtype,
            convolution=config.convolution,
            remat=config.remat,
            name="backbone",
        )
        features = backbone(space_to_depth(images, config.stem_stride).astype(stored(config.dtype)))
        levels = list(reversed(range(config.finest_level, len(config.channels))))
        if not config.multi_resolution:
            features, levels = features[-1:], levels[-1:]

        displacement: jax.Array | None = None
        pyramid, entropies = [], []
        for level, both in zip(levels, features, strict=True):
            module = Level(config, level, name=f"level_{level}")
            call = functools.partial(recomputed, module) if config.remat else module
            refined, entropy = call(both[:b], both[b:], displacement)
            if displacement is not None:  # the coarsest level has no fusion, which it would need
                for _ in range(config.refinements - 1):
                    refined, entropy = call(both[:b], both[b:], refined)
            displacement = refined
            pyramid.append(refined)
            if config.cross_attention:
                entropies.append(entropy)
        if config.ascent_steps:
            pyramid[-1] = self._ascended(images, pyramid[-1], features[-1][:b])
        full = resize_displacement(pyramid[-1], whole)
        return Prediction(full[:, :nx, :ny, :nz], tuple(pyramid), tuple(entropies))

    def _ascended(self, images: jax.Array, displacement: jax.Array, fixed: jax.Array) -> jax.Array:
        """The displacement of the finest level after `ascent_steps`; fixed: its features of that image."""
        config, c = self.config, fixed.shape[-1]
        context = Conv(c, dtype=config.dtype, convolution=config.convolution, name="ascent_context")(fixed)
        module = AscentStep(
            c, config.ascent_window, dtype=config.dtype, convolution=config.convolution, name="ascent"
        )
        call = functools.partial(recomputed, module) if config.remat else module
        step = jnp.zeros_like(displacement)
        for _ in range(config.ascent_steps):
            step = call(images, displacement, step, context)
            displacement = displacement + step
        return displacement


class Level(nn.Module):
    """One level: match the features, weigh the regions, refine the displacement so far."""

    config: ModelConfig
    level: int

    @nn.compact
    def __call__(
        self,
        fixed: Float[Array, "b x y z c"],
        moving: Float[Array, "b x y z c"],
        coarser: Float[Array, "b x2 y2 z2 3"] | None,
    ) -> tuple[Float[Array, "b x y z 3"], Float[Array, "b x y z"]]:
        """fixed, moving: [b, x, y, z, c]; coarser: [b, x', y', z', 3] of the coarser level, or of this
        one as it was refined before, or None at the coarsest level.

        Returns the displacement [b, x, y, z, 3] in voxels of this level, and the match entropy [b, x, y, z].
        """
        config = self.config
        c = fixed.shape[-1]
        if coarser is not None:
            coarser = resize_displacement(coarser, fixed.shape[1:4])
            if config.align_features:  # not in the paper: matching starts where the coarser level ended
                # No gradient through where the features are read, as in RAFT (Teed and Deng, ECCV 2020).
                moving = warp(moving, jax.lax.stop_gradient(coarser))

        inputs, entropy = [], jnp.zeros(fixed.shape[:-1])
        if config.cross_attention:
            match = CrossAttention(config, name="cross_attention")(moving, fixed)
            attended, entropy = match.features, match.entropy
            if config.position_aware:
                inputs.append(match.offset.astype(stored(config.dtype)))
        else:
            attended = JoinedDense(c, dtype=config.dtype, name="projection")(fixed, moving)
        mask = jnp.ones((*fixed.shape[:-1], 1))
        if config.regional_attention:
            region = max(1, config.region_size // (config.stem_stride * 2**self.level))
            regional = RegionalAttention(config, region, name="regional_attention")
            attended, mask = regional(attended)

        inputs.insert(0, attended)
        if config.feature_residual:  # the paper's heads see the attention alone
            inputs += [fixed, moving]
        if len(inputs) > 1:
            inputs = [JoinedDense(c, dtype=config.dtype, name="mix")(*inputs)]
        # A whole displacement in bfloat16 has steps of a sixteenth of a voxel from 8 on.
        field_dtype = config.dtype if config.align_features else "float32"
        head = FieldHead(c, config.dtype, field_dtype, convolution=config.convolution, name="head")
        candidate = head(inputs[0])  # eq. 13
        if config.cross_attention and config.match_residual:
            # Not in the paper, whose heads normalise each instance and so can't tell how far all of it moved.
            # Both ways, the border pulls offsets inwards alike: that cancels, and equal images match at 0.
            forth, back = jnp.split(match.offset, 2, axis=-1)
            candidate = HEAD_SHARE * candidate + (forth - back) / 2
        if coarser is None:
            return candidate, entropy
        if config.align_features:  # what was matched is what the coarser level left over
            candidate = candidate + coarser
        fusion = Fusion(config.dtype, convolution=config.convolution, name="fusion")
        return fusion(candidate, coarser, attended, mask), entropy
