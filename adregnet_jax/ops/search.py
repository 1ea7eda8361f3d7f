"""Discrete search of large motions: a cost for every displacement of a range, made smooth and consistent."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.composition import compose
from adregnet_jax.ops.filters import box_mean

# Weights of the coupling between the best matches and the smooth field, from loose to tight.
COUPLINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CONSISTENCY_STEPS = 15


def search_displacement(
    fixed: Float[AnyArray, "b x y z c"],
    moving: Float[AnyArray, "b x y z c"],
    radius: Sequence[int],
    *,
    fixed_mask: Shaped[AnyArray, "b x y z 1"] | None = None,
    moving_mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, "b x y z 3"]:
    """The displacement between two feature maps, without a start and without gradients.

    All displacements up to `radius` are tried at every voxel, by the squared difference of the features. The
    best ones are smoothed, the search is repeated with a penalty on the distance from the smooth field, and
    so on with growing penalties: coupled convex regularisation. Done in both directions, the two results are
    made inverse to each other by halves.

    Args:
      fixed: [b, x, y, z, c] features of a coarse grid.
      moving: [b, x, y, z, c].
      radius: (rx, ry, rz) in voxels of this grid; (2 rx + 1)(2 ry + 1)(2 rz + 1) displacements are tried.
      fixed_mask: [b, x, y, z, 1], below a half where the fixed scans don't count, or None.
      moving_mask: [b, x, y, z, 1], likewise of the moving scans. A displacement that leads from or to where a
        scan doesn't count is as good as the mean of the others.

    Returns:
      [b, x, y, z, 3] in voxels.

    Examples:
      >>> moving = jax.random.normal(jax.random.key(0), (1, 8, 8, 8, 4))
      >>> fixed = jnp.roll(moving, -1, axis=1)
      >>> search_displacement(fixed, moving, (1, 1, 1))[0, 4, 4, 4].round(1).tolist()
      [1.0, 0.0, 0.0]

    References:
      Heinrich, Papiez, Schnabel and Handels, Non-parametric discrete registration with convex optimisation,
      WBIR 2014; Siebert, Hansen and Heinrich, Fast 3D registration with accurate optimisation and little
      learning for Learn2Reg 2021.
    """
    reach = [np.arange(-r, r + 1) for r in radius]
    candidates = np.stack(np.meshgrid(*reach, indexing="ij"), axis=-1).reshape(-1, 3)

    def one_way(scans: tuple[Array, Array, Array | None, Array | None]) -> Array:
        return _coupled(_costs(*scans, candidates=candidates), candidates)

    def one_pair(
        fixed: AnyArray, moving: AnyArray, fixed_mask: AnyArray | None, moving_mask: AnyArray | None
    ) -> Array:
        forth = (fixed, moving, fixed_mask, moving_mask)
        back = (moving, fixed, moving_mask, fixed_mask)
        # As two turns of a loop, which compile as one.
        both = jax.tree.map(lambda *ways: jnp.stack(ways), forth, back)
        found = jax.lax.map(one_way, both)
        return _consistent(found[0], found[1])

    if (fixed_mask is None) != (moving_mask is None):
        everywhere = jnp.ones((*fixed.shape[:4], 1), bool)
        fixed_mask, moving_mask = (everywhere if m is None else m for m in (fixed_mask, moving_mask))
    return jax.vmap(one_pair)(fixed, moving, fixed_mask, moving_mask)


def _costs(
    fixed: AnyArray,
    moving: AnyArray,
    fixed_mask: AnyArray | None,
    moving_mask: AnyArray | None,
    candidates: np.ndarray,
) -> Array:
    """[d, x, y, z]: squared difference of the features for each candidate; edges repeat."""
    radius = candidates.max(axis=0)
    starts = jnp.asarray(candidates + radius)

    def padded(volume: AnyArray) -> Array:
        return jnp.pad(volume, (*((r, r) for r in radius), (0, 0)), mode="edge")

    def moved(volume: AnyArray, start: Array) -> Array:
        return jax.lax.dynamic_slice(volume, (*start, 0), (*fixed.shape[:3], volume.shape[-1]))

    moving = padded(moving)
    costs = jax.lax.map(lambda start: jnp.sum((fixed - moved(moving, start)) ** 2, axis=-1), starts)
    if fixed_mask is None or moving_mask is None:
        return costs

    moving_mask = padded(moving_mask)

    def counts(start: Array) -> Array:
        return jnp.logical_and(fixed_mask[..., 0] > 0.5, moved(moving_mask, start)[..., 0] > 0.5)

    counted = jax.lax.map(counts, starts)
    count = jnp.maximum(jnp.sum(counted, axis=0, keepdims=True), 1)
    mean = jnp.sum(costs, axis=0, keepdims=True, where=counted) / count
    return jnp.where(counted, costs, mean)


def _coupled(costs: Array, candidates: np.ndarray) -> Array:
    """[x, y, z, 3]: the smooth field that the best matches and the coupling agree on."""
    displacements = jnp.asarray(candidates, jnp.float32)
    smooth = _smooth(displacements[jnp.argmin(costs, axis=0)])

    def couple(smooth: Array, coupling: Array) -> tuple[Array, None]:
        def compare(
            best: tuple[Array, Array], candidate: tuple[Array, Array]
        ) -> tuple[tuple[Array, Array], None]:
            cost, displacement = candidate
            displacement = displacement[None, None, None]
            energy = cost + coupling * jnp.sum((smooth - displacement) ** 2, axis=-1)
            better = energy < best[0]
            return (
                jnp.where(better, energy, best[0]),
                jnp.where(better[..., None], displacement, best[1]),
            ), None

        start = (jnp.full(smooth.shape[:3], jnp.inf), smooth)
        (_, best), _ = jax.lax.scan(compare, start, (costs, displacements))
        return _smooth(best), None

    return jax.lax.scan(couple, smooth, jnp.array(COUPLINGS))[0]


def _consistent(forth: Array, back: Array) -> Array:
    """`forth`, after both were moved half way towards the inverse of the other, again and again."""

    def meet(fields: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        forth, back = fields
        return (forth - compose(back, forth) / 2, back - compose(forth, back) / 2), None

    return jax.lax.scan(meet, (forth[None], back[None]), length=CONSISTENCY_STEPS)[0][0][0]


def _smooth(displacement: Array) -> Array:
    return box_mean(box_mean(displacement[None], 3), 3)[0]
