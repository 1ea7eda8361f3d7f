"""Synthetic pairs of scans: random anatomy, contrast and motion, drawn from a random key."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adregnet_jax.config import SyntheticConfig
from adregnet_jax.data.datasets.synthetic import EASY_SHARE
from adregnet_jax.ops.sampling import warp
from adregnet_jax.synthesis.anatomy import draw_anatomy
from adregnet_jax.synthesis.appearance import acquire, paint, recolour
from adregnet_jax.synthesis.contrast import match_contrast
from adregnet_jax.synthesis.draw import normals
from adregnet_jax.synthesis.motion import draw_motion


class SyntheticPair(NamedTuple):
    """Two synthetic scans on one grid, their labels, and the displacement between them.

    Under `vmap` or `lax.map`, each array has a leading axis.

    Attributes:
      fixed: [x, y, z] float32, intensities in [0, 1].
      moving: [x, y, z] float32, intensities in [0, 1].
      fixed_labels: [x, y, z] int32; 0 is the background.
      moving_labels: [x, y, z] int32.
      displacement: [x, y, z, 3] in voxels of the fixed grid, the truth:
        `fixed_labels(p) = moving_labels(p + u(p))` by nearest neighbour.
      same_contrast: [] bool, whether equal intensities mean equal tissue in both scans.
    """

    fixed: Float[Array, "x y z"]
    moving: Float[Array, "x y z"]
    fixed_labels: Int[Array, "x y z"]
    moving_labels: Int[Array, "x y z"]
    displacement: Float[Array, "x y z 3"]
    same_contrast: Bool[Array, ""]


def synthesise(
    key: PRNGKeyArray, config: SyntheticConfig, *, share: float | Float[Array, ""] = 1.0
) -> SyntheticPair:
    """Draws a pair of synthetic scans with labels and the true displacement.

    A pure function for `jit`, `vmap` and `lax.map`: the same key gives the same pair. Pairs have the
    distribution of `adregnet_jax.data.datasets.synthetic`, where it is described, but not its random numbers.
    A program draws one of three anatomies, one of two motions and one of three contrasts for each pair; under
    `vmap` it draws all of them and selects. So map over the keys of a batch on a CPU, as in the example, and
    use `vmap` on a GPU.

    Args:
      key: random key, `jax.random.key(seed)`.
      config: grid, motion and contrast. Static under `jit`: bind it by `functools.partial`. Its seed and its
        numbers of cases are not used.
      share: difficulty from 0 to 1. The motion is at most this share of `config.largest_motion_mm`, and the
        probability that the contrasts differ grows from 0 at a share of 0.3.

    Returns:
      A pair of volumes of `config.shape`.

    Raises:
      UserError: a setting can't be used.

    Examples:
      >>> import functools
      >>> draw = functools.partial(synthesise, config=SyntheticConfig(shape=(16, 16, 16)))
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> pairs = jax.jit(lambda keys: jax.lax.map(draw, keys))(keys)
      >>> pairs.fixed.shape, pairs.displacement.shape
      ((2, 16, 16, 16), (2, 16, 16, 16, 3))
    """
    config.check()
    anatomy, motion, paint_moving, paint_fixed, scanners, contrast, gamma = jax.random.split(key, 7)
    moving_labels = draw_anatomy(anatomy, config.shape)
    displacement = draw_motion(
        motion, config.shape, spacing_mm=config.spacing_mm, largest_mm=share * config.largest_motion_mm
    )
    fixed_labels = warp(moving_labels[None, ..., None], displacement[None], mode="nearest")[0, ..., 0]
    moving = paint(paint_moving, moving_labels)
    same = warp(moving[None, ..., None], displacement[None])[0, ..., 0]

    differing = jnp.maximum(0.0, share - EASY_SHARE) / (1 - EASY_SHARE) * (1 - config.same_contrast)
    kind = jax.random.uniform(contrast)
    fixed = jax.lax.switch(
        (kind < differing).astype(jnp.int32) + (kind < differing / 2),
        [lambda: same, lambda: recolour(paint_fixed, same), lambda: paint(paint_fixed, fixed_labels)],
    )
    same_contrast = kind >= differing
    exponents = jnp.exp(0.2 * normals(gamma, (2,)))
    exponents = jnp.where(same_contrast, exponents[:1], exponents)
    fixed, moving = jax.vmap(acquire)(jax.random.split(scanners), jnp.stack([fixed, moving]), exponents)
    if config.match_contrast:
        moving = match_contrast(moving, fixed)
    return SyntheticPair(fixed, moving, fixed_labels, moving_labels, displacement, same_contrast)
