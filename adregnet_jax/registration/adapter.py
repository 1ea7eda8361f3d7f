"""Adapts a pair of scans to the grid, axes and contrast a network was trained on, and maps its field back.

A network is trained on scans of one orientation and one voxel size. Networks trained on synthetic anatomy
don't know millimetres: every body part filled a grid of about the same number of voxels. They match similar
appearance, so a moving scan of another contrast is first matched to the contrast of the fixed one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
from jaxtyping import Float

from adregnet_jax.data.io.images import Image
from adregnet_jax.data.preprocessing import match_contrast, resample
from adregnet_jax.errors import UserError
from adregnet_jax.ops.composition import compose
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration import ladder
from adregnet_jax.registration.field import DisplacementField
from adregnet_jax.weights.trained_network import TrainedNetwork, TrainingDomain

_compose = jax.jit(lambda first, second: compose(first[None], second[None])[0])
_warp = jax.jit(lambda moving, displacement: warp(moving[None, ..., None], displacement[None])[0, ..., 0])


def predict_displacement(
    network: TrainedNetwork,
    fixed: Image,
    moving: Float[np.ndarray, "x y z"],
    *,
    tile: int | None = None,
    runs: int | None = None,
) -> Float[np.ndarray, "x y z 3"]:
    """Predicts the displacement between two scans on one grid, which needn't be like the network's grid.

    The scans are reoriented, resampled, padded and matched in contrast as in training, and the displacement
    is mapped back to their grid.

    Args:
      network: the network and its parameters.
      fixed: intensities in [0, 1].
      moving: [x, y, z] on the grid of the fixed scan, intensities in [0, 1].
      tile: width in voxels of the network's grid of the tiles it gets; None: the whole volume.
      runs: how many of the runs in `network.scans.voxels` to make; None: all.

    Returns:
      [x, y, z, 3] in voxels of the fixed scan.

    Raises:
      UserError: the scan is too small on the network's grid.
    """
    if network.scans.same_contrast:  # at full resolution: averaged voxels mix tissues and background
        moving = match_contrast(moving, fixed.values)
    extent_mm = np.array(fixed.shape) * fixed.spacing_mm
    first, *finer = _spacings_mm(network.scans, extent_mm, fixed.values.size)[:runs]
    displacement = _predict(network, first, fixed, moving, tile)
    for spacing_mm in finer:
        warped = ladder.crop(_warp(ladder.pad(moving), ladder.pad(displacement)), fixed.shape)
        rest = _predict(network, spacing_mm, fixed, warped, tile)
        displacement = ladder.crop(_compose(ladder.pad(displacement), ladder.pad(rest)), fixed.shape)
    return displacement


def _predict(
    network: TrainedNetwork,
    spacing_mm: np.ndarray | None,
    fixed: Image,
    moving: np.ndarray,
    tile: int | None,
) -> np.ndarray:
    """The displacement of one run of the network, on a grid of this spacing or on the scans' own grid."""
    turn = _turn(fixed.affine, network.scans.axes)
    turned = [nib.orientations.apply_orientation(values, turn) for values in (fixed.values, moving)]
    affine = fixed.affine @ nib.orientations.inv_ornt_aff(turn, fixed.shape)
    shape = np.array(turned[0].shape)
    target = shape
    if spacing_mm is not None:
        target = np.maximum(np.rint(shape * nib.affines.voxel_sizes(affine) / spacing_mm), 1).astype(int)
    multiple = network.model.multiple  # type: ignore[attr-defined]  # every network has it
    if target.min() < multiple:
        raise UserError(
            f"{fixed.name}: {' x '.join(map(str, target))} voxels on the grid of {network.name}, which takes"
            f' {multiple} or more along each axis: use method="instance"'
        )
    scale = shape / target
    offset = (scale - 1) / 2
    # To sizes the network would pad to itself: it is compiled for each size, and these are few.
    padding = [(0, -n % multiple) for n in target]
    if (shape != target).any():
        turned = [resample(values, scale, offset, tuple(target.tolist()))[0] for values in turned]
    padded = (np.pad(values, padding, mode="edge")[None, ..., None] for values in turned)
    found = np.asarray(network.displacement(network.params, *map(jnp.asarray, padded), tile=tile))[0]
    to_native = np.diag([*scale, 1.0])
    to_native[:3, 3] = offset
    field = DisplacementField(ladder.crop(found, target.tolist()), (affine @ to_native).astype(np.float32))
    return np.asarray(ladder.resample_field(field, shape=fixed.shape, affine=fixed.affine).displacement)


def _turn(affine: np.ndarray, axes: str | None) -> np.ndarray:
    """nibabel's transform from the nearest orientation of `affine` to the orientation `axes`."""
    here = nib.orientations.io_orientation(affine)
    there = here if axes is None else nib.orientations.axcodes2ornt(axes)
    return nib.orientations.ornt_transform(here, there)


def _spacings_mm(scans: TrainingDomain, extent_mm: np.ndarray, voxels: int) -> list[np.ndarray | None]:
    """Voxel size [3] of the grid of each run of the network; None: that of the scan."""
    if scans.voxels is not None:
        first, *finer = scans.voxels
        wanted = [first, *(more for more in finer if more <= voxels)]
        return [np.full(3, (extent_mm.prod() / count) ** (1 / 3)) for count in wanted]
    return [None if scans.spacing_mm is None else np.asarray(scans.spacing_mm)]
