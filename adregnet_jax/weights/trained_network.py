"""A network with its parameters and a description of the scans it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.nn.tiles import predict_in_tiles


@dataclasses.dataclass(frozen=True)
class TrainingDomain:
    """The grid and contrast of the scans a network was trained on; None leaves a scan as it is.

    Attributes:
      axes: directions of the three axes, such as "RAS".
      spacing_mm: size of the voxels along each of these axes.
      voxels: instead of a spacing, a scan of any size is resampled to about this many isotropic voxels. With
        several numbers the network runs once for each, every run refining the ones before; after the first,
        numbers above that of the scan's voxels are left out.
      same_contrast: the two scans of a pair had about the same contrast.
    """

    axes: str | None = None
    spacing_mm: tuple[float, ...] | None = None
    voxels: tuple[int, ...] | None = None
    same_contrast: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network with its parameters, and the kind of scans it was trained on.

    Attributes:
      model: `AdRegNet`, or another with the same inputs and outputs.
      params: its parameters.
      scans: the grid and contrast that `predict_displacement` adapts other scans to.
      name: its name in messages and records.
    """

    model: nn.Module
    params: PyTree[ArrayLike]
    scans: TrainingDomain = TrainingDomain()
    name: str = "network"

    @functools.cached_property
    def displacement(self) -> Callable[..., Float[Array, "b x y z 3"]]:
        """The function (params, fixed, moving, tile=None) -> [b, x, y, z, 3], compiled per shape."""

        def displace(
            params: PyTree[ArrayLike],
            fixed: Float[Array, "b x y z 1"],
            moving: Float[Array, "b x y z 1"],
            tile: int | None = None,
        ) -> Float[Array, "b x y z 3"]:
            if tile is not None:
                return predict_in_tiles(self.model, params, fixed, moving, tile=tile)
            return cast(Prediction, self.model.apply({"params": params}, fixed, moving)).displacement

        return jax.jit(displace, static_argnames="tile")
