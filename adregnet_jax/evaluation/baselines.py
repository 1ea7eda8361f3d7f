"""What a plain alignment does to the test pairs, to stand between "before" and the network: an affine map.

"Before", the identity, needs no code: every table has it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax import metrics
from adregnet_jax.config import AffineConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration.affine import align_affine
from adregnet_jax.registration.field import field_from_affine
from adregnet_jax.report import tables

_warp = jax.jit(functools.partial(warp, mode="linear"))
_warp_nearest = jax.jit(functools.partial(warp, mode="nearest"))


class AffineScores(NamedTuple):
    """A pair after affine alignment alone."""

    row: tables.Row  # tre_affine_mm, tre_affine_sd_mm and ncc_affine; None where it can't be measured
    dice: dict[int, float]  # by label, of moving labels warped by nearest neighbour; empty without labels


def affine_displacement(pair: Pair, config: AffineConfig) -> np.ndarray:
    """[x, y, z, 3] voxels: the affine map under which the two scans of a pair are most similar.

    Found by the images alone, as `affine.align_affine` does. Padding of either scan doesn't count.
    """
    mask = None if pair.mask is None else jnp.asarray(pair.mask, jnp.float32)
    matrix = align_affine(
        jnp.asarray(pair.fixed, jnp.float32),
        jnp.asarray(pair.moving, jnp.float32),
        pair.affine,
        pair.affine,  # both scans of a pair are on one grid
        fixed_mask=mask,
        moving_mask=mask,
        config=config,
    )
    field = field_from_affine(matrix, pair.fixed.shape, jnp.asarray(pair.affine, jnp.float32))
    return np.asarray(field.displacement)


def affine_scores(pair: Pair, config: AffineConfig) -> AffineScores:
    """TRE, NCC and Dice of a pair after affine alignment alone, measured as `evaluate.case_metrics` does.

    Args:
      pair: the scans and what is known about them.
      config: of the alignment.
    """
    displacement = affine_displacement(pair, config)
    field = jnp.asarray(displacement, jnp.float32)[None]
    warped = np.asarray(_warp(jnp.asarray(pair.moving, jnp.float32)[None, ..., None], field))[0, ..., 0]
    row: tables.Row = {"tre_affine_mm": None, "tre_affine_sd_mm": None}
    if pair.fixed_landmarks is not None and pair.moving_landmarks is not None:
        error_mm = metrics.tre_mm(displacement, pair.fixed_landmarks, pair.moving_landmarks, pair.spacing_mm)
        row["tre_affine_mm"], row["tre_affine_sd_mm"] = tables.mean_and_sd(error_mm)
    row["ncc_affine"] = tables.finite(metrics.ncc(pair.fixed, warped, mask=pair.mask))
    dice: dict[int, float] = {}
    if pair.fixed_labels is not None and pair.moving_labels is not None:
        labels = [n for n in np.union1d(pair.fixed_labels, pair.moving_labels).tolist() if n != 0]
        moved = np.asarray(_warp_nearest(jnp.asarray(pair.moving_labels)[None, ..., None], field))
        scores = metrics.dice(pair.fixed_labels, moved[0, ..., 0], labels)
        dice = dict(zip(labels, scores.tolist(), strict=True))
    return AffineScores(row, dice)
