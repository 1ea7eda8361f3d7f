"""A network with its parameters and a description of the scans it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
from flax import linen as nn

from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.nn.tiles import predict_in_tiles


@dataclasses.dataclass(frozen=True)
class TrainingDomain:
    """What scans a network was trained on. What is None is taken as a scan has it.

    Attributes:
      axes: where the three axes point to, as "RAS".
      spacing_mm: size of the voxels along each of these axes.
      voxels: instead of a spacing: a scan of any size is brought to about so many isotropic voxels. With more
        than one number, the network runs once for each of them, on what the runs before left over; but not on
        more voxels than the scan has, after the first.
      same_contrast: pairs had one contrast, by and large; False: as those have that the network is for.
    """

    axes: str | None = None
    spacing_mm: tuple[float, ...] | None = None
    voxels: tuple[int, ...] | None = None
    same_contrast: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedNetwork:
    """A network with its parameters, and the scans that they are good for.

    Attributes:
      model: `AdRegNet`, or another with the same inputs and outputs.
      params: its parameters.
      scans: what `predict_displacement` brings others to.
      name: what messages and records call it.
    """

    model: nn.Module
    params: Any
    scans: TrainingDomain = TrainingDomain()
    name: str = "network"

    @functools.cached_property
    def displacement(self) -> Callable[..., jax.Array]:
        """(params, fixed, moving, tile=None) -> [b, x, y, z, 3], compiled once for each shape."""

        def displace(params, fixed, moving, tile=None):
            if tile is not None:
                return predict_in_tiles(self.model, params, fixed, moving, tile=tile)
            return cast(Prediction, self.model.apply({"params": params}, fixed, moving)).displacement

        return jax.jit(displace, static_argnames="tile")
