"""Registration of a batch of pairs by a network, as one pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Real, Shaped

from adregnet_jax.config import InstanceConfig
from adregnet_jax.nn.prediction import Prediction, check_images, check_width
from adregnet_jax.nn.tiles import predict_in_tiles
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.sampling import warp
from adregnet_jax.ops.slabs import SPACE
from adregnet_jax.registration.instance import align
from adregnet_jax.registration.results import Registration


def register(
    params: PyTree[AnyArray],
    fixed: Float[AnyArray, "b x y z 1"],
    moving: Float[AnyArray, "b x y z 1"],
    *,
    model: nn.Module,
    tile: int | None = None,
    instance: InstanceConfig | None = None,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    fixed_mask: Shaped[AnyArray, "b x y z 1"] | None = None,
    moving_mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Registration:
    """Registers moving images to fixed images by a network, optionally refined by instance optimisation.

    `align` registers without a network. Pure: it works under `jit` (with the keyword arguments static or
    closed over, except the masks), `vmap` and, unless `instance` has a tolerance, `grad`.

    Args:
      params: parameters of `model`.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      model: `AdRegNet`, or another network with the same inputs and outputs.
      tile: width in voxels of overlapping tiles, which the network gets one at a time to save memory
        (`adregnet_jax.nn.tiles`). None: the whole volume.
      instance: settings of the instance optimisation, which starts from the network's displacement. None: no
        such optimisation.
      spacing_mm: voxel size along each axis, for the instance optimisation.
      fixed_mask: [b, x, y, z, 1], 0 where the fixed images don't count; for the instance optimisation.
      moving_mask: [b, x, y, z, 1], 0 where the moving images don't count; likewise.

    Returns:
      A `Registration`. With tiles, its pyramid and match_entropy are empty.

    Raises:
      ValueError: inconsistent shapes or settings.

    Examples:
      >>> model = AdRegNet(ModelConfig(channels=(8, 16, 32, 64)))
      >>> params = model.init(jax.random.key(0), fixed, moving)["params"]
      >>> warped = jax.jit(functools.partial(register, model=model))(params, fixed, moving).warped
    """
    if tile is None:
        prediction = cast(Prediction, model.apply({"params": params}, fixed, moving))
    else:
        prediction = Prediction(predict_in_tiles(model, params, fixed, moving, tile=tile), (), ())
    displacement, pyramid, match_entropy = prediction
    if instance is None:
        warped = warp(moving, displacement)  # eq. 1: the only warp of the image
        return Registration(displacement, warped, pyramid, match_entropy)
    refined = align(
        fixed,
        moving,
        spacing_mm=spacing_mm,
        start=displacement,
        fixed_mask=fixed_mask,
        moving_mask=moving_mask,
        config=instance,
    )
    return refined._replace(pyramid=pyramid, match_entropy=match_entropy)


def register_sharded(
    params: PyTree[AnyArray],
    fixed: Float[AnyArray, "b x y z 1"],
    moving: Float[AnyArray, "b x y z 1"],
    *,
    model: nn.Module,
    mesh: Mesh,
) -> Registration:
    """`register` for volumes too large for one device: each device holds a slab along x.

    Pure: it works under `jit` (with `model` and `mesh` static or closed over).

    Args:
      params: parameters of `model`.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      model: `AdRegNet` or `VoxelMorph`.
      mesh: its axis `space` holds the devices that share a volume; other axes repeat the computation.

    Returns:
      A `Registration` whose arrays are sharded along x.

    Raises:
      UserError: the volumes' width doesn't divide into slabs the network accepts.
      ValueError: shapes that differ or are not [b, x, y, z, 1].

    Examples:
      >>> mesh = jax.make_mesh((4,), ("space",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> in_slabs = functools.partial(register_sharded, model=model, mesh=mesh)
      >>> displacement = jax.jit(in_slabs)(params, fixed, moving).displacement
    """
    check_images(fixed, moving)
    check_width(fixed.shape[1], mesh.shape[SPACE], model.multiple)

    def register_slab(params: PyTree[AnyArray], fixed: AnyArray, moving: AnyArray) -> Registration:
        prediction = cast(Prediction, model.apply({"params": params}, fixed, moving))
        warped = warp(moving, prediction.displacement)
        return Registration(prediction.displacement, warped, prediction.pyramid, prediction.match_entropy)

    slab = PartitionSpec(None, SPACE)
    return jax.shard_map(
        register_slab, mesh=mesh, in_specs=(PartitionSpec(), slab, slab), out_specs=slab, check_vma=False
    )(params, fixed, moving)


def dropout_sd_mm(
    params: PyTree[AnyArray],
    fixed: Float[AnyArray, "b x y z 1"],
    moving: Float[AnyArray, "b x y z 1"],
    key: PRNGKeyArray,
    *,
    model: nn.Module,
    samples: int,
    spacing_mm: Sequence[float] | Real[AnyArray, " 3"],
) -> Float[Array, "b x y z"]:
    """Standard deviation of the displacement over networks drawn by dropout (Monte-Carlo dropout).

    The samples are computed one after the other into running sums: the memory is that of two samples.
    Gal and Ghahramani, "Dropout as a Bayesian Approximation", ICML 2016; the running sums are Welford's.

    Args:
      params: parameters of `model`, trained with dropout.
      fixed: [b, x, y, z, 1], intensities in [0, 1].
      moving: [b, x, y, z, 1], on the same grid.
      key: random key of the dropout; the same key draws the same networks for every pair.
      model: the network, with a dropout rate above 0: at 0, the result is 0 everywhere.
      samples: how many networks are drawn, 2 or more.
      spacing_mm: voxel size along each axis.

    Returns:
      [b, x, y, z] mm: the length of the vector of the three components' sample SDs.

    Raises:
      ValueError: fewer than two samples.
    """
    if samples < 2:
        raise ValueError(f"an SD takes two samples or more, got {samples}")

    def add(n: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mean, squares = sums
        rngs = {"dropout": jax.random.fold_in(key, n)}
        prediction = cast(Prediction, model.apply({"params": params}, fixed, moving, rngs=rngs))
        change = prediction.displacement - mean
        mean = mean + change / (n + 1)
        return mean, squares + change * (prediction.displacement - mean)

    zeros = jnp.zeros((*fixed.shape[:4], 3))
    _, squares = jax.lax.fori_loop(0, samples, add, (zeros, zeros))
    spacing_mm2 = jnp.asarray(spacing_mm, jnp.float32)[None, None, None, None] ** 2
    variance_mm2 = squares / (samples - 1) * spacing_mm2
    return jnp.sqrt(variance_mm2.sum(axis=-1))
