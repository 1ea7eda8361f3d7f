"""How smooth the deformation between two scans must be: as smooth as fits what the field didn't see.

A coarse level is cut into blocks like a chessboard. The field is optimised on the blocks of one colour.
On the others it follows by its smoothness alone, and they tell motion from noise: a field that is too
flexible makes the scans more alike where it saw them and nowhere else. This is cross-validation in two folds,
with regions in the place of samples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from adregnet_jax.config import InstanceConfig
from adregnet_jax.losses import ncc_loss
from adregnet_jax.ops.grid import between_voxels
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration import ladder
from adregnet_jax.registration.instance import align_on_rungs, axis_factors
from adregnet_jax.registration.results import Evidence

LADDER = (0.05, 0.15, 0.45, 1.35, 4.05)  # weights of the smoothness that are tried
FIRST = 2  # of the ladder; the neighbours are tried as long as they are better
BLOCK = 6  # voxels of the level: width of the blocks
FEWEST_BLOCKS = 64  # with fewer on the coarsest level, a finer one is used; with a quarter of them, none
STEPS = 40
# Share of the gain in similarity on the seen blocks that must be found on the unseen ones, or there is no
# motion to be believed. Across contrasts, the squared NCC also finds likeness where there is none.
LEAST_SHARE = {"mono": 0.2, "multi": 0.4}
LEAST_GAIN = 0.003  # on the unseen blocks, of a squared NCC: bias fields and noise seem to gain less


def weigh_evidence(
    fixed: Float[np.ndarray, "x y z"],
    moving: Float[np.ndarray, "x y z"],
    *,
    spacing_mm: Sequence[float],
    start: Float[np.ndarray, "x y z 3"] | None = None,
    fixed_mask: Shaped[np.ndarray, "x y z"] | None,
    moving_mask: Shaped[np.ndarray, "x y z"] | None,
    modality: Literal["mono", "multi"],
    config: InstanceConfig,
) -> Evidence | None:
    """Chooses the smoothness of the instance optimisation of a pair.

    Args:
      fixed: [x, y, z], intensities in [0, 1].
      moving: [x, y, z], on the same grid.
      spacing_mm: voxel size along each axis.
      start: [x, y, z, 3] in voxels; None: no displacement.
      fixed_mask: [x, y, z], 0 where the fixed scan doesn't count, or None.
      moving_mask: [x, y, z], likewise.
      modality: whether the scans have one contrast.
      config: settings of the optimisation, whose coarsest level is used; it compares by local NCC.

    Returns:
      The best smoothness and what it gains; None of scans that are too small to be divided.
    """
    voxels = config.factors[0]
    # Of the rungs, so that all scans on the same ones have the same level.
    shape = ladder.rungs(fixed.shape)
    while _blocks(shape, factor := axis_factors(voxels, spacing_mm)) < FEWEST_BLOCKS and voxels > 1:
        voxels = max(1, voxels // 2)
    if _blocks(shape, factor) < FEWEST_BLOCKS / 4:
        return None
    inside = np.ones(fixed.shape, np.float32) if fixed_mask is None else fixed_mask
    counts = pooled(ladder.pad(inside, outside="zeros"), factor) > 0.5
    fixed, moving = (pooled(ladder.pad(scan), factor) for scan in (fixed, moving))
    if moving_mask is not None:
        moving_mask = (pooled(ladder.pad(moving_mask), factor) > 0.5).astype(np.float32)
    if start is not None:
        padded = ladder.pad(start)
        start = np.stack([pooled(padded[..., i], factor) / factor[i] for i in range(3)], axis=-1)
    white = np.sum(np.indices(fixed.shape) // BLOCK, axis=0) % 2 == 0
    parts = [np.asarray(counts & part, np.float32) for part in (white, ~white)]
    within = [part if moving_mask is None else part * moving_mask for part in parts]
    masks = np.stack([ladder.pad(part, outside="zeros") for part in within])
    coarse = dataclasses.replace(
        config,
        search_range_mm=0.0,
        factors=(1,),
        steps=(STEPS,),
        strides=config.strides[:1],
        least_jacobian=0.0,  # it would hide which fields are too flexible
        unfold=False,
    )

    def similarities(displacement: np.ndarray) -> np.ndarray:
        """[2], of the scans in the blocks of either colour."""
        arrays = [ladder.pad(values) for values in (fixed, moving, displacement)]
        return np.asarray(_similarities(*arrays, masks, window=config.ncc_window, floor=config.ncc_floor))

    still = similarities(np.zeros((*fixed.shape, 3), np.float32))

    def gains(smoothness: float) -> tuple[float, float]:
        """Where the field was optimised and elsewhere: means over the two folds."""
        folds = []
        for part in parts:
            displacement, _ = align_on_rungs(
                fixed,
                moving,
                spacing_mm=np.multiply(spacing_mm, factor).tolist(),
                start=start,
                fixed_mask=part,
                moving_mask=moving_mask,
                config=dataclasses.replace(coarse, smoothness=smoothness),
            )
            folds.append(similarities(displacement) - still)
        (white_seen, black_unseen), (white_unseen, black_seen) = np.array(folds).tolist()
        return (white_seen + black_seen) / 2, (white_unseen + black_unseen) / 2

    best, found = FIRST, {FIRST: gains(LADDER[FIRST])}
    for step in (1, -1):
        while 0 <= best + step < len(LADDER) and best + step not in found:
            found[best + step] = gains(LADDER[best + step])
            if found[best + step][1] <= found[best][1]:
                break
            best += step
    smoothness = LADDER[best]
    if best - 1 in found and best + 1 in found:
        # The vertex of the parabola through the three gains, over the rungs.
        below, here, above = (found[n][1] for n in (best - 1, best, best + 1))
        offset = (below - above) / (2 * min(below - 2 * here + above, -1e-9))
        smoothness *= (LADDER[best + 1] / LADDER[best]) ** float(np.clip(offset, -0.5, 0.5))
    seen_gain, unseen_gain = found[best]
    # The weight is relative to a mean over what is seen: with twice as much of it, half the weight.
    smoothness /= 2
    believable = unseen_gain > max(LEAST_GAIN, LEAST_SHARE[modality] * seen_gain)
    return Evidence(smoothness, seen_gain, unseen_gain, believable)


def _blocks(shape: Sequence[int], factor: Sequence[int]) -> float:
    """How many blocks a level has."""
    return math.prod(n / f / BLOCK for n, f in zip(shape, factor, strict=True))


@functools.partial(jax.jit, static_argnames=("window", "floor"))
def _similarities(
    fixed: jax.Array,
    moving: jax.Array,
    displacement: jax.Array,
    masks: jax.Array,
    *,
    window: int,
    floor: float,
) -> jax.Array:
    """[k]: the local squared NCC within each of the masks [k, x, y, z], at points between the voxels."""
    offsets = between_voxels(fixed.shape)[None]
    here = warp(fixed[None, ..., None], offsets)
    there = warp(moving[None, ..., None], displacement[None] + offsets)

    # Where all voxels around a point count, of either colour.
    valid = (warp(jnp.max(masks, axis=0)[None, ..., None], offsets) > 1 - 1e-3).astype(jnp.float32)

    def similarity(mask: jax.Array) -> jax.Array:
        counts = valid * mask[None, ..., None]
        return 1 - ncc_loss(here, there, window=window, floor=floor, mask=counts)

    return jnp.stack([similarity(mask) for mask in masks])


def pooled(values: Shaped[np.ndarray, "x y z"], factor: Sequence[int]) -> Float[np.ndarray, "x2 y2 z2"]:
    """[x, y, z] averaged over blocks of `factor` voxels, as float32; the border repeats."""
    padded = np.pad(values, [(0, -n % f) for n, f in zip(values.shape, factor, strict=True)], mode="edge")
    split = [size for n, f in zip(padded.shape, factor, strict=True) for size in (n // f, f)]
    return padded.reshape(split).mean(axis=(1, 3, 5), dtype=np.float32)
