"""Instance optimisation: a displacement refined on its own pair, by the images alone."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from adregnet_jax.config import LossConfig, RefinementConfig
from adregnet_jax.losses import total_loss
from adregnet_jax.ops.resampling import resize_displacement
from adregnet_jax.ops.sampling import warp


def refine(
    fixed: jax.Array,
    moving: jax.Array,
    displacement: jax.Array,
    spacing_mm: jax.Array,
    *,
    mask: jax.Array | None = None,
    loss: LossConfig,
    config: RefinementConfig,
) -> jax.Array:
    """Adds the correction that lowers the image terms of eq. 16-18 on this pair, found by Adam.

    The correction lives on a grid that is `config.stride` times coarser and is interpolated, which keeps it
    smooth. Landmarks and labels have no part in it, whatever their weights in `loss`. Pure: it goes under
    `jit`, with `loss` and `config` closed over.

    Args:
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      displacement: [b, x, y, z, 3] in voxels: where to start, zeros for nothing known.
      spacing_mm: [b, 3].
      mask: [b, x, y, z, 1], 0 in padding, or None.
      loss: the weights of the other terms and the windows.
      config: steps, learning rate, stride and smoothness.

    Returns:
      [b, x, y, z, 3] in voxels.

    Raises:
      ValueError: shapes that don't belong together.
    """
    if displacement.shape != (*fixed.shape[:4], 3) or fixed.shape != moving.shape:
        raise ValueError(
            "fixed and moving must be [b, x, y, z, 1] and displacement [b, x, y, z, 3], "
            f"got {fixed.shape}, {moving.shape} and {displacement.shape}"
        )
    shape = displacement.shape[1:4]
    images_only = dataclasses.replace(loss, smoothness=config.smoothness, landmark=0.0, dice=0.0)
    batch = {
        "fixed": fixed,
        "spacing_mm": spacing_mm,
        "mask": jnp.ones_like(fixed) if mask is None else mask,
    }
    optimiser = optax.adam(config.learning_rate)

    def corrected(correction):
        return displacement + resize_displacement(correction, shape)

    def loss_of(correction):
        field = corrected(correction)
        return total_loss(batch, field, warp(moving, field), images_only)[0]

    def step(carry, _):
        correction, state = carry
        updates, state = optimiser.update(jax.grad(loss_of)(correction), state)
        return (optax.apply_updates(correction, updates), state), None

    coarse = jnp.zeros((fixed.shape[0], *(-(-n // config.stride) for n in shape), 3))
    (correction, _), _ = jax.lax.scan(step, (coarse, optimiser.init(coarse)), length=config.steps)
    return corrected(correction)
