"""Affine alignment of the test pairs: the baseline between "before" (the identity) and the network."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from adregnet_jax import metrics
from adregnet_jax.config import AffineConfig
from adregnet_jax.data.pair import Pair
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration.affine import align_affine
from adregnet_jax.registration.field import field_from_affine
from adregnet_jax.registration.measure import landmark_errors_mm
from adregnet_jax.report import tables

_warp = jax.jit(functools.partial(warp, mode="linear"))
_warp_nearest = jax.jit(functools.partial(warp, mode="nearest"))


class AffineScores(NamedTuple):
    """A pair after affine alignment alone."""

    row: tables.Row  # tre_affine_mm, tre_affine_sd_mm and ncc_affine; None if it can't be measured
    dice: dict[int, float]  # by label, with moving labels warped by nearest neighbour; empty without labels


def affine_displacement(pair: Pair, *, config: AffineConfig) -> Float[np.ndarray, "x y z 3"]:
    """The affine map that makes the two scans of a pair most similar (`align_affine`), in voxels.

    Padding of either scan is ignored.
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
    field = field_from_affine(matrix, shape=pair.fixed.shape, affine=jnp.asarray(pair.affine, jnp.float32))
    return np.asarray(field.displacement)


def affine_scores(pair: Pair, *, config: AffineConfig) -> AffineScores:
    """TRE, NCC and Dice of a pair after affine alignment alone, measured as `registration.measure` does.

    Args:
      pair: the scans with their landmarks and labels.
      config: settings of the alignment.
    """
    displacement = affine_displacement(pair, config=config)
    field = jnp.asarray(displacement, jnp.float32)[None]
    warped = np.asarray(_warp(jnp.asarray(pair.moving, jnp.float32)[None, ..., None], field))[0, ..., 0]
    _, error_mm = landmark_errors_mm(pair, displacement)
    tre_mm, tre_sd_mm = tables.mean_and_sd([] if error_mm is None else error_mm)
    row: tables.Row = {"tre_affine_mm": tre_mm, "tre_affine_sd_mm": tre_sd_mm}
    row["ncc_affine"] = tables.finite(metrics.ncc(pair.fixed, warped, mask=pair.mask))
    if pair.fixed_labels is None or pair.moving_labels is None:
        return AffineScores(row, {})
    moved = np.asarray(_warp_nearest(jnp.asarray(pair.moving_labels)[None, ..., None], field))[0, ..., 0]
    scores = metrics.dice_by_label(pair.fixed_labels, pair.moving_labels, {"dice": moved})
    return AffineScores(row, scores["dice"])
