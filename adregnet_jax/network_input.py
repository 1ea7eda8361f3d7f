"""The door of a trained network: any pair of scans goes in as the network knows scans, its field comes back.

A network has seen scans of one orientation and of voxels of one size. Those trained on synthetic anatomy know
no millimetres: whatever the body part, it filled a grid of so many voxels. They match what looks alike, so
that a moving scan of another contrast is brought to that of the fixed one first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from flax import linen as nn

from adregnet_jax.data.images import Image
from adregnet_jax.data.preprocessing import match_contrast, resample
from adregnet_jax.errors import UserError
from adregnet_jax.fields import DisplacementField, resample_field
from adregnet_jax.ops.composition import compose
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration import register

_compose = jax.jit(compose)
_warp = jax.jit(warp)
_resample_field = jax.jit(resample_field, static_argnames="shape")


@dataclasses.dataclass(frozen=True)
class TrainedScans:
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
    scans: TrainedScans = TrainedScans()
    name: str = "network"

    @functools.cached_property
    def displacement(self) -> Callable[..., jax.Array]:
        """(params, fixed, moving, tile=None) -> [b, x, y, z, 3], compiled once for each shape."""

        def displace(params, fixed, moving, tile=None):
            return register(params, fixed, moving, model=self.model, tile=tile).displacement

        return jax.jit(displace, static_argnames="tile")


def predict_displacement(
    network: TrainedNetwork,
    fixed: Image,
    moving: np.ndarray,
    *,
    tile: int | None = None,
    runs: int | None = None,
) -> jax.Array:
    """What a network says of two scans on one grid, which need not be a grid that it knows.

    Scans are turned, resampled, padded and brought to one contrast, as it knows them, and the displacement is
    brought back.

    Args:
      network: with its parameters.
      fixed: intensities in [0, 1].
      moving: [x, y, z] on the grid of the fixed scan, intensities in [0, 1].
      tile: width in voxels, of the network's grid, of the tiles that it gets, or None for the whole volume.
      runs: of those that `network.scans.voxels` asks for, the first so many; None: all.

    Returns:
      [x, y, z, 3] in voxels of the fixed scan.

    Raises:
      UserError: on the network's grid, the scan is smaller than what the network halves to one voxel.
    """
    if network.scans.same_contrast:  # at full resolution: mixed, tissues and background can't be told apart
        moving = match_contrast(moving, fixed.values)
    extent_mm = np.array(fixed.shape) * fixed.spacing_mm
    first, *finer = _spacings_mm(network.scans, extent_mm, fixed.values.size)[:runs]
    displacement = _predict(network, first, fixed, moving, tile)
    for spacing_mm in finer:
        warped = np.asarray(_warp(moving[None, ..., None], displacement[None]))[0, ..., 0]
        rest = _predict(network, spacing_mm, fixed, warped, tile)
        displacement = _compose(displacement[None], rest[None])[0]
    return displacement


def _predict(network: TrainedNetwork, spacing_mm: np.ndarray | None, fixed: Image, moving, tile) -> jax.Array:
    """What one run of the network says, on a grid of this spacing or on that of the scans."""
    turn = _turn(fixed.affine, network.scans.axes)
    turned = [nib.orientations.apply_orientation(values, turn) for values in (fixed.values, moving)]
    affine = fixed.affine @ nib.orientations.inv_ornt_aff(turn, fixed.shape)
    shape = np.array(turned[0].shape)
    target = shape
    if spacing_mm is not None:
        target = np.maximum(np.rint(shape * nib.affines.voxel_sizes(affine) / spacing_mm), 1).astype(int)
    multiple = network.model.multiple  # type: ignore[attr-defined]  # of every network
    if target.min() < multiple:
        raise UserError(
            f"{fixed.name}: {' x '.join(map(str, target))} voxels on the grid of {network.name}, which takes"
            f" {multiple} or more along each axis: register by --method instance"
        )
    scale = shape / target
    offset = (scale - 1) / 2
    # Sizes that the network would pad to anyhow: it is compiled for each of them, and these are few.
    padding = [(0, -n % multiple) for n in target]
    if (shape != target).any():
        turned = [resample(values, scale, offset, tuple(target.tolist()))[0] for values in turned]
    padded = (np.pad(values, padding, mode="edge")[None, ..., None] for values in turned)
    found = network.displacement(network.params, *map(jnp.asarray, padded), tile=tile)[0]
    found = found[tuple(slice(0, n) for n in target)]
    to_native = np.diag([*scale, 1.0])
    to_native[:3, 3] = offset
    field = DisplacementField(found, jnp.asarray(affine @ to_native, jnp.float32))
    on_fixed = jnp.asarray(fixed.affine, jnp.float32)
    return _resample_field(field, shape=fixed.shape, affine=on_fixed).displacement


def _turn(affine: np.ndarray, axes: str | None) -> np.ndarray:
    """The orientation change, as nibabel writes it, to the nearest one whose axes point to `axes`."""
    here = nib.orientations.io_orientation(affine)
    there = here if axes is None else nib.orientations.axcodes2ornt(axes)
    return nib.orientations.ornt_transform(here, there)


def _spacings_mm(scans: TrainedScans, extent_mm: np.ndarray, voxels: int) -> list[np.ndarray | None]:
    """Of the grid of each run of the network, [3], or None: that of the scan, so wide, of so many voxels."""
    if scans.voxels is not None:
        first, *finer = scans.voxels
        wanted = [first, *(more for more in finer if more <= voxels)]
        return [np.full(3, (extent_mm.prod() / count) ** (1 / 3)) for count in wanted]
    return [None if scans.spacing_mm is None else np.asarray(scans.spacing_mm)]
