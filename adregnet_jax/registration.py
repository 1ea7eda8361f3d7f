"""Registration of a batch of pairs as one pure function."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
from flax import linen as nn

from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.ops.sampling import warp


class Registration(NamedTuple):
    """A registered batch."""

    displacement: jax.Array  # [b, x, y, z, 3] voxels, fixed grid: warped(p) = moving(p + u(p))
    warped: jax.Array  # [b, x, y, z, 1], the moving images on the fixed grid
    pyramid: tuple[jax.Array, ...]  # displacements of the levels, coarse to fine, in voxels of each
    match_entropy: tuple[jax.Array, ...]  # [b, x_l, y_l, z_l] nats, coarse to fine


def register(params: Any, fixed: jax.Array, moving: jax.Array, *, model: nn.Module) -> Registration:
    """Aligns moving images with fixed images by the network, and warps them once.

    Pure: it goes under `jit` (with `model` static or closed over), `vmap` and `grad`.

    Args:
      params: parameters of `model`.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      model: the network: `AdRegNet`, or another with the same inputs and outputs.

    Returns:
      A `Registration`.

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1].

    Example:
      >>> model = AdRegNet(ModelConfig(channels=(8, 16, 32, 64)))
      >>> params = model.init(jax.random.key(0), fixed, moving)["params"]
      >>> warped = jax.jit(functools.partial(register, model=model))(params, fixed, moving).warped
    """
    prediction = cast(Prediction, model.apply({"params": params}, fixed, moving))
    return Registration(
        displacement=prediction.displacement,
        warped=warp(moving, prediction.displacement),  # eq. 1: the only warp of the image
        pyramid=prediction.pyramid,
        match_entropy=prediction.match_entropy,
    )
