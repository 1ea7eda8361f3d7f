"""Whether a stage of a registration does harm: it may not make the scans less alike than they were before.

Likeness is the squared local NCC over the union of both foregrounds, at which neither shrinking nor leaving
the scan gains: where only one scan shows something, it is 0. All of it happens on a coarse grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Real, Shaped
from scipy import ndimage

from adregnet_jax.data.io.images import Image
from adregnet_jax.ops.ncc import local_squared_ncc
from adregnet_jax.registration import ladder
from adregnet_jax.registration.evidence import pooled
from adregnet_jax.registration.modality import FOREGROUND, otsu_threshold
from adregnet_jax.registration.results import StageOutcome

VOXELS = 64  # along the edge of a cube as large as the fixed scan
WINDOW = 5  # voxels of the coarse grid
FLOOR = 0.05  # contrast of a window, as a share of the scan's, below which its NCC fades
BLOCK = 6  # voxels: likeness is averaged over blocks of this width
FEWEST_BLOCKS = 27  # with fewer, their spread says too little, and nothing is taken back for its likeness
BEYOND_CHANCE = 3.0  # standard errors by which likeness must fall
DETERMINANTS = (0.05, 20.0)  # beyond, a change of volume isn't anatomy
MOST_IMPLAUSIBLE = 0.05  # share of the union


class CoarseScans(NamedTuple):
    """Two scans on coarse grids of their own, padded behind their last voxels."""

    fixed: Float[np.ndarray, "x y z"]
    fixed_counts: Bool[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]
    factor: tuple[int, int, int]  # voxels of the fixed scan
    moving: Float[np.ndarray, "x2 y2 z2"]
    moving_counts: Float[np.ndarray, "x2 y2 z2"]
    moving_affine: Float[np.ndarray, "4 4"]
    threshold: float  # intensity from which on the moving scan is foreground


class Likeness(NamedTuple):
    """How alike two scans are under a map.

    Attributes:
      squared_ncc: around each voxel, 0 outside the union and where only one scan can be seen.
      union: of both foregrounds.
      implausible: share of it where the determinant is beyond `DETERMINANTS`.
    """

    squared_ncc: Float[np.ndarray, "x y z"]
    union: Bool[np.ndarray, "x y z"]
    implausible: float

    @property
    def mean(self) -> float:
        """Over the union."""
        return float(self.squared_ncc.sum() / max(1, self.union.sum()))


def coarse_scans(
    pair: tuple[Image, Image],
    scans: Sequence[Float[np.ndarray, "_x _y _z"]],
    masks: Sequence[Shaped[np.ndarray, "_x _y _z"] | None],
) -> CoarseScans:
    """The scans on coarse grids.

    Args:
      pair: fixed and moving, of which only the grids are used.
      scans: their intensities in [0, 1].
      masks: 0 where a scan doesn't count, or None.
    """
    extents_mm = np.multiply(ladder.rungs(pair[0].shape), pair[0].spacing_mm)
    wanted_mm = math.prod(extents_mm) ** (1 / 3) / VOXELS
    coarse = []
    for image, values, mask in zip(pair, scans, masks, strict=True):
        x, y, z = (max(1, round(wanted_mm / mm)) for mm in image.spacing_mm)
        inside = np.ones(image.shape, np.float32) if mask is None else np.asarray(mask > 0, np.float32)
        counts = pooled(ladder.pad(inside, outside="zeros"), (x, y, z)) > 0.5
        to_scan = np.diag([x, y, z, 1.0])
        to_scan[:3, 3] = [(n - 1) / 2 for n in (x, y, z)]
        coarse.append((pooled(ladder.pad(values), (x, y, z)), counts, image.affine @ to_scan, (x, y, z)))
    (fixed, counts, affine, factor), (moving, moving_counts, moving_affine, _) = coarse
    threshold = FOREGROUND * otsu_threshold(moving[moving_counts]) if moving_counts.any() else 0.0
    return CoarseScans(
        fixed, counts, affine, factor, moving, moving_counts.astype(np.float32), moving_affine, threshold
    )


def likeness(
    scans: CoarseScans, displacement: Float[np.ndarray, "x y z 3"] | None, matrix: Real[np.ndarray, "4 4"]
) -> Likeness:
    """How alike the scans are under a displacement, then a linear map between the worlds.

    Args:
      scans: on coarse grids.
      displacement: [x, y, z, 3] in voxels of the fixed scan; None: nothing is displaced.
      matrix: [4, 4] fixed RAS mm -> moving RAS mm.
    """
    field = ladder.zero_field(scans.fixed.shape, scans.affine)
    if displacement is not None:
        padded = ladder.pad(displacement)
        moved = [pooled(padded[..., i], scans.factor) / scans.factor[i] for i in range(3)]
        field = dataclasses.replace(field, displacement=np.stack(moved, axis=-1))
    field = ladder.after_field(field, matrix)
    seen = ladder.warp_image(field, scans.moving_counts, scans.moving_affine) > 0.5
    warped = ladder.warp_image(field, scans.moving, scans.moving_affine)
    both = scans.fixed_counts & seen
    union = both & _filled(both & (warped > scans.threshold))
    if scans.fixed_counts.any():
        least = FOREGROUND * otsu_threshold(scans.fixed[scans.fixed_counts])
        union |= scans.fixed_counts & _filled(scans.fixed_counts & (scans.fixed > least))
    squared = np.zeros(union.shape, np.float32)
    if both.any():
        arrays = [ladder.pad(values) for values in (scans.fixed, warped)]
        mask = ladder.pad(both.astype(np.float32), outside="zeros")
        squared = ladder.crop(_squared_ncc(*arrays, mask), union.shape) * union * both
    gradient = np.stack(np.gradient(np.asarray(field.displacement), axis=(0, 1, 2)), axis=-1)
    determinant = np.linalg.det(np.eye(3) + gradient)
    beyond = (determinant < DETERMINANTS[0]) | (determinant > DETERMINANTS[1])
    return Likeness(squared, union, float(beyond[union].mean()) if union.any() else 0.0)


def weigh_stage(stage: str, before: Likeness, after: Likeness, *, keep: bool = False) -> StageOutcome:
    """Whether a stage is kept.

    It is taken back if the scans are less alike than before by three standard errors over blocks, or if more
    than a twentieth of the union changes its volume beyond what anatomy does.

    Args:
      stage: its name.
      before: under the map that the stage started from.
      after: under the map that it made.
      keep: keep it in any case.
    """
    reason = None
    if after.implausible > max(MOST_IMPLAUSIBLE, before.implausible):
        reason = f"{after.implausible:.0%} of the volume is folded, or shrinks or grows 20-fold"
    elif _fell(before, after):
        reason = f"the scans were more alike before, {before.mean:.3f} against {after.mean:.3f}"
    return StageOutcome(stage, before.mean, after.mean, None if keep else reason)


class StageKeeper:
    """Weighs each stage of a registration against the map before it.

    Attributes:
      outcomes: of the stages so far.
    """

    def __init__(self, scans: CoarseScans, *, keep: bool) -> None:
        """Starts from where the headers put the scans; with `keep`, every stage is kept."""
        self.outcomes: list[StageOutcome] = []
        self._scans, self._keep = scans, keep
        self._now = likeness(scans, None, np.eye(4))

    def keeps(
        self,
        stage: str,
        displacement: Float[np.ndarray, "x y z 3"] | None,
        matrix: Real[np.ndarray, "4 4"],
        *,
        refused: str | None = None,
    ) -> bool:
        """Whether the map that a stage made is kept: see `likeness` and `weigh_stage`.

        Args:
          stage: its name.
          displacement: as for `likeness`.
          matrix: as for `likeness`.
          refused: why this map takes the place of the one that the stage had made first.
        """
        after = likeness(self._scans, displacement, matrix)
        outcome = weigh_stage(stage, self._now, after, keep=self._keep)
        self.outcomes.append(outcome._replace(taken_back=outcome.taken_back or refused))
        if outcome.taken_back:
            return False
        self._now = after
        return True


def _fell(before: Likeness, after: Likeness) -> bool:
    change = after.squared_ncc / max(1, after.union.sum()) - before.squared_ncc / max(1, before.union.sum())
    blocks = _block_sums((before.union | after.union).astype(np.float32)) > 0
    if blocks.sum() < FEWEST_BLOCKS:
        return False
    changes = _block_sums(change)[blocks]
    return bool(changes.sum() < -BEYOND_CHANCE * np.sqrt(len(changes)) * changes.std(ddof=1))


def _block_sums(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, [(0, -n % BLOCK) for n in values.shape])
    split = [size for n in padded.shape for size in (n // BLOCK, BLOCK)]
    return padded.reshape(split).sum(axis=(1, 3, 5))


def _filled(foreground: np.ndarray) -> np.ndarray:
    return np.asarray(ndimage.binary_fill_holes(foreground))


@jax.jit
def _squared_ncc(fixed: jax.Array, warped: jax.Array, mask: jax.Array) -> jax.Array:
    total = jnp.maximum(jnp.sum(mask), 1)
    images = [(values - jnp.sum(values * mask) / total) * mask for values in (fixed, warped)]
    fixed_least, warped_least = (FLOOR**2 * jnp.sum(values**2)[None] / total for values in images)
    fixed, warped = (values[None] for values in images)
    return local_squared_ncc(
        fixed, warped, WINDOW, least_variances=(fixed_least, warped_least), mask=mask[None]
    )[0]
