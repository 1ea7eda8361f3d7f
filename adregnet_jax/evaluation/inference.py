"""The trained network of a run as a function of a pair: its displacement, timed, and its uncertainties."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from adregnet_jax.config import Config
from adregnet_jax.data.pair import Pair
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation.uncertainty import dropout_scatter
from adregnet_jax.registration.network import register


class RegisteredPair(NamedTuple):
    """The registration of a pair by the network: NumPy arrays without the batch axis."""

    displacement: np.ndarray  # [x, y, z, 3] voxels
    warped: np.ndarray  # [x, y, z]
    pyramid: tuple[np.ndarray, ...]  # [x_l, y_l, z_l, 3] voxels of the level, coarse to fine
    match_entropy: tuple[np.ndarray, ...]  # [x_l, y_l, z_l] nats, coarse to fine
    seconds: float  # of the network, without compilation
    dropout_sd_mm: np.ndarray | None = None  # [x, y, z], of the network's displacement


def abstract_parameters(model: nn.Module, pair: Pair) -> Any:
    """Shapes and dtypes of the network's parameters, without computing them."""
    image = jax.ShapeDtypeStruct((1, *pair.fixed.shape, 1), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image, image)["params"]


def timed_network(
    model: nn.Module, params: Any, config: Config, *, instance: bool, mc_dropout: int
) -> Callable[[Pair], RegisteredPair]:
    """The network as a function of a pair, compiled once for each shape.

    Args:
        model: the network.
        params: its parameters.
        config: settings of the instance optimisation, and the seed for dropout.
        instance: refines each displacement on the two images.
        mc_dropout: number of networks to draw by dropout for `dropout_sd_mm`; 0 for none.
    """
    scatter = dropout_scatter(model, params, samples=mc_dropout, seed=config.seed) if mc_dropout else None

    @functools.cache
    def compiled(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> Any:
        @jax.jit
        def network(params: Any, fixed: jax.Array, moving: jax.Array, mask: jax.Array) -> Any:
            return register(
                params,
                fixed,
                moving,
                model=model,
                instance=config.instance if instance else None,
                spacing_mm=spacing_mm,
                fixed_mask=mask,
            )

        image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
        return network.lower(params, image, image, image).compile()

    def registered(pair: Pair) -> RegisteredPair:
        spacing_mm = tuple(np.round(pair.spacing_mm, 4).tolist()) if instance else (1.0, 1.0, 1.0)
        program = compiled(pair.fixed.shape, spacing_mm)
        mask = np.ones(pair.fixed.shape) if pair.mask is None else pair.mask
        scans = [jnp.asarray(s, jnp.float32)[None, ..., None] for s in (pair.fixed, pair.moving, mask)]
        scans = jax.block_until_ready(scans)
        start = time.perf_counter()
        registration = jax.block_until_ready(program(params, *scans))
        seconds = time.perf_counter() - start
        one = jax.tree.map(lambda x: np.asarray(x[0]), registration)
        if not np.isfinite(one.displacement).all():
            raise UserError(
                f"the displacement of {pair.name} is not finite: the checkpoint diverged, train again"
            )
        return RegisteredPair(
            one.displacement,
            one.warped[..., 0],
            one.pyramid,
            one.match_entropy,
            seconds,
            scatter(pair) if scatter else None,
        )

    return registered
