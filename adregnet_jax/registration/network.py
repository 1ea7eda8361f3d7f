"""Registration of a batch of pairs as one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from adregnet_jax.config import InstanceConfig
from adregnet_jax.nn.prediction import Prediction, check_images, check_width
from adregnet_jax.nn.tiles import predict_in_tiles
from adregnet_jax.ops.sampling import warp
from adregnet_jax.ops.slabs import SPACE
from adregnet_jax.registration.instance import Alignment, align


class Registration(NamedTuple):
    """A registered batch."""

    displacement: jax.Array  # [b, x, y, z, 3] voxels, fixed grid: warped(p) = moving(p + u(p))
    warped: jax.Array  # [b, x, y, z, 1], the moving images on the fixed grid
    pyramid: tuple[jax.Array, ...]  # the network's displacements, coarse to fine, in voxels of each level
    match_entropy: tuple[jax.Array, ...]  # [b, x_l, y_l, z_l] nats, the network's, coarse to fine
    inverse: jax.Array | None = None  # [b, x, y, z, 3] voxels, the map back; of diffeomorphic runs only


def register(
    params: Any,
    fixed: jax.Array,
    moving: jax.Array,
    *,
    model: nn.Module | None = None,
    tile: int | None = None,
    instance: InstanceConfig | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    fixed_mask: jax.Array | None = None,
    moving_mask: jax.Array | None = None,
) -> Registration:
    """Aligns moving images with fixed images, by the network, by instance optimisation or by both.

    Pure: it goes under `jit` (with what follows the star static or closed over, but for the masks), `vmap`
    and, but for an instance optimisation with a `tolerance`, `grad`.

    Args:
      params: parameters of `model`; None without one.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      model: the network: `AdRegNet`, or another with the same inputs and outputs. None: no network.
      tile: width in voxels of overlapping tiles, which the network gets one at a time, for less memory
        (`adregnet_jax.nn.tiles`). None: the whole volume.
      instance: settings of the instance optimisation, which starts from the network's displacement where
        there is a network. None: no such optimisation.
      spacing_mm: three numbers, of the grid; for the instance optimisation.
      fixed_mask: [b, x, y, z, 1], 0 where the fixed images don't count; for the instance optimisation.
      moving_mask: [b, x, y, z, 1], likewise of the moving images.

    Returns:
      A `Registration`. Without a network, and with tiles, its pyramid and match_entropy are empty.

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1], settings that make no sense, or neither a
        network nor instance optimisation.

    Examples:
      >>> model = AdRegNet(ModelConfig(channels=(8, 16, 32, 64)))
      >>> params = model.init(jax.random.key(0), fixed, moving)["params"]
      >>> warped = jax.jit(functools.partial(register, model=model))(params, fixed, moving).warped

      >>> by_images = functools.partial(register, None, instance=InstanceConfig(), spacing_mm=(1, 1, 2.5))
      >>> displacement = jax.jit(by_images)(fixed, moving).displacement
    """
    prediction = None
    if model is not None and tile is not None:
        prediction = Prediction(predict_in_tiles(model, params, fixed, moving, tile=tile), (), ())
    elif model is not None:
        prediction = cast(Prediction, model.apply({"params": params}, fixed, moving))
    if instance is not None:
        aligned = align(
            fixed,
            moving,
            spacing_mm,
            start=None if prediction is None else prediction.displacement,
            fixed_mask=fixed_mask,
            moving_mask=moving_mask,
            config=instance,
        )
    elif prediction is not None:
        aligned = Alignment(prediction.displacement, inverse=None)
    else:
        raise ValueError("there is nothing to register by: give a model, instance settings or both")
    return Registration(
        displacement=aligned.displacement,
        warped=warp(moving, aligned.displacement),  # eq. 1: the only warp of the image
        pyramid=() if prediction is None else prediction.pyramid,
        match_entropy=() if prediction is None else prediction.match_entropy,
        inverse=aligned.inverse,
    )


def register_sharded(
    params: Any, fixed: jax.Array, moving: jax.Array, *, model: nn.Module, mesh: Mesh
) -> Registration:
    """`register` by a network, of volumes too large for one device: each has a slab along x.

    Pure: it goes under `jit` (with `model` and `mesh` static or closed over).

    Args:
      params: parameters of `model`.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      model: `AdRegNet` or `VoxelMorph`.
      mesh: its axis `space` has the devices that share a volume; along other axes they do the same.

    Returns:
      A `Registration` whose arrays are divided along x.

    Raises:
      UserError: the width of the volumes doesn't split into slabs that the network takes.
      ValueError: shapes that differ or are not [b, x, y, z, 1].

    Examples:
      >>> mesh = jax.make_mesh((4,), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> in_slabs = functools.partial(register_sharded, model=model, mesh=mesh)
      >>> displacement = jax.jit(in_slabs)(params, fixed, moving).displacement
    """
    check_images(fixed, moving)
    check_width(fixed.shape[1], mesh.shape[SPACE], model.multiple)

    def register_slab(params, fixed, moving):
        prediction = cast(Prediction, model.apply({"params": params}, fixed, moving))
        warped = warp(moving, prediction.displacement)
        return Registration(prediction.displacement, warped, prediction.pyramid, prediction.match_entropy)

    slab = PartitionSpec(None, SPACE)
    return jax.shard_map(
        register_slab, mesh=mesh, in_specs=(PartitionSpec(), slab, slab), out_specs=slab, check_vma=False
    )(params, fixed, moving)


def dropout_sd_mm(
    params: Any,
    fixed: jax.Array,
    moving: jax.Array,
    key: jax.Array,
    *,
    model: nn.Module,
    samples: int,
    spacing_mm: Sequence[float] | jax.Array,
) -> jax.Array:
    """How far the displacement scatters over networks drawn by dropout (Monte-Carlo dropout).

    The samples are made one after the other and summed up on the way: the memory is that of two of them.
    Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016; the running sums are Welford's.

    Args:
      params: parameters of `model`, trained with dropout.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      key: of the dropout; the same key draws the same networks for every pair.
      model: the network, with a dropout rate above 0: at 0, the result is 0 everywhere.
      samples: how many networks are drawn, 2 or more.
      spacing_mm: three numbers, of the grid.

    Returns:
      [b, x, y, z] mm: the length of the vector of the three components' sample SDs.

    Raises:
      ValueError: fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"an SD takes two samples or more, got {samples}")

    def add(n, sums):
        mean, squares = sums
        rngs = {"dropout": jax.random.fold_in(key, n)}
        prediction = cast(Prediction, model.apply({"params": params}, fixed, moving, rngs=rngs))
        change = prediction.displacement - mean
        mean = mean + change / (n + 1)
        return mean, squares + change * (prediction.displacement - mean)

    zeros = jnp.zeros((*fixed.shape[:4], 3))
    _, squares = jax.lax.fori_loop(0, samples, add, (zeros, zeros))
    variance_mm2 = squares / (samples - 1) * jnp.asarray(spacing_mm, jnp.float32) ** 2
    return jnp.sqrt(variance_mm2.sum(axis=-1))
