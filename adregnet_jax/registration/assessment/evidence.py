"""Evidence on a registration: numbers that neither shrinking nor folding improves.

Everything is computed on a coarse grid of about 80 voxels along each axis, whatever the size of the scan:
distances are compared with its voxels, so that a mouse is a scan like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy import ndimage

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.registration.assessment import rule
from adregnet_jax.registration.assessment.blocks import BlockMatches, match_blocks
from adregnet_jax.registration.evidence import pooled
from adregnet_jax.registration.modality import FOREGROUND, otsu_threshold

VOXELS = 80  # along the edge of a cube as large as the scan
CELL = 4  # voxels of the coarse grid
RADIUS = 3  # voxels of the coarse grid, and of one with voxels of twice the size
FEWEST_VOXELS = 1500  # of the coarse grid, in cells with texture; with fewer there is no verdict, unless
MOST_OUTSIDE = 0.5  # that is so because the moving scan doesn't show so much of the foreground
TEXTURE = 0.3  # share of a block's contrast above the floor, from which on it can be judged
HELD = 1.5  # voxels: a block whose best place is nearer is held by the images
SMOOTH_CELLS = 1.0  # SD of the predicted error's smoothing
FIT_VOXELS = 20_000  # to which the linear part of a field is fitted, at most
DETERMINANTS = (0.05, 20.0)  # beyond, a change of volume isn't anatomy


class Level(NamedTuple):
    """The blocks at one size of voxels."""

    blocks: BlockMatches
    before: BlockMatches
    weights: Float[np.ndarray, "i j k"]  # of the blocks that can be judged, by their texture; else 0
    voxel_mm: float
    cell_voxels: tuple[int, int, int]  # of the scan


class Evidence(NamedTuple):
    """What `gather_evidence` found.

    Attributes:
      numbers: by name, JSON's types; see `gather_evidence`.
      levels: fine and coarse blocks.
      foreground: [i, j, k], share of each fine cell that is foreground of the fixed scan.
      strain: [i, j, k], norm of the gradient of the displacement there, without its mean over the foreground.
    """

    numbers: dict[str, float]
    levels: tuple[Level, Level]
    foreground: Float[np.ndarray, "i j k"]
    strain: Float[np.ndarray, "i j k"]


def gather_evidence(
    fixed: Float[np.ndarray, "x y z"],
    before: Float[np.ndarray, "x y z"],
    warped: Float[np.ndarray, "x y z"],
    displacement: Float[np.ndarray, "x y z 3"],
    jacobian: Float[np.ndarray, "x y z"],
    *,
    spacing_mm: Sequence[float],
    inside: Shaped[np.ndarray, "x y z"],
    seen_before: Shaped[np.ndarray, "x y z"],
    seen: Shaped[np.ndarray, "x y z"],
    threshold: float,
    signed: bool,
    voxels: int = VOXELS,
) -> Evidence:
    """Compares two scans before and after their registration, on the grid of the fixed one.

    Args:
      fixed: [x, y, z], intensities in [0, 1].
      before: [x, y, z], the moving scan where its header puts it, in [0, 1].
      warped: [x, y, z], the moving scan pulled back by the field, in [0, 1].
      displacement: [x, y, z, 3] in voxels, the whole field.
      jacobian: [x, y, z], its determinant.
      spacing_mm: voxel size along each axis.
      inside: [x, y, z], 1 where the fixed scan counts; 0 in padding.
      seen_before: [x, y, z], 1 where `before` comes from within the moving scan and its mask.
      seen: [x, y, z], likewise of `warped`.
      threshold: intensity from which on the moving scan is foreground.
      signed: whether the scans have one contrast.
      voxels: of the coarse grid, along the edge of a cube as large as the scan.

    Returns:
      The evidence; only "textured_voxels" where they are too few for a verdict.
    """
    factor = _factors(fixed.shape, spacing_mm, voxels)
    count = pooled(inside, factor) > 0.5
    sees, saw = (count & (pooled(mask, factor) > 0.5) for mask in (seen, seen_before))
    images = [pooled(image, factor) for image in (fixed, before, warped)]
    masks = (count, saw, sees)
    spacing = np.multiply(spacing_mm, factor)
    fine = _level(images, masks, spacing, factor, signed=signed)
    twice = [
        2 if n >= 4 * CELL and mm < 1.5 * min(spacing) else 1
        for n, mm in zip(count.shape, spacing, strict=True)
    ]
    coarse = _level(
        [pooled(image, twice) for image in images],
        tuple(pooled(mask, twice) > 0.5 for mask in masks),
        spacing * twice,
        np.multiply(factor, twice).tolist(),
        signed=signed,
    )
    size = math.prod(fine.cell_voxels) // math.prod(factor)
    textured = int(np.count_nonzero(fine.weights)) * size
    foreground = _foreground(images[0], count)
    overlaps = _overlaps(images, masks, foreground, threshold)
    of_cells = pooled(foreground, np.floor_divide(fine.cell_voxels, factor).tolist())
    strain = _strain(displacement, of_cells, fine.cell_voxels, spacing_mm)
    if textured < FEWEST_VOXELS and overlaps["outside"] < MOST_OUTSIDE:
        return Evidence({"textured_voxels": textured}, (fine, coarse), of_cells, strain)
    numbers = {
        **_likeness(fine, "fine"),
        **_likeness(coarse, "coarse"),
        **overlaps,
        **_plausibility(displacement, jacobian, foreground, factor, spacing_mm),
        "voxel_mm": fine.voxel_mm,
        "textured_voxels": textured,
    }
    return Evidence(numbers, (fine, coarse), of_cells, strain)


def _factors(shape: Sequence[int], spacing_mm: Sequence[float], voxels: int) -> tuple[int, int, int]:
    """Voxels of the scan along each axis of a voxel of the coarse grid."""
    wanted_mm = (math.prod(shape) * math.prod(spacing_mm)) ** (1 / 3) / voxels
    x, y, z = (max(1, round(wanted_mm / size)) for size in spacing_mm)
    return x, y, z


def _level(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    spacing_mm: np.ndarray,
    factor: Sequence[int],
    *,
    signed: bool,
) -> Level:
    finest = float(np.min(spacing_mm))
    steps = [max(1, round(CELL * finest / mm)) for mm in spacing_mm]
    cell = tuple(min(step, max(1, n // CELL)) for step, n in zip(steps, images[0].shape, strict=True))
    radius = tuple(
        min(max(1, round(RADIUS * finest / mm)), (n - 1) // 2)
        for mm, n in zip(spacing_mm, images[0].shape, strict=True)
    )
    padded = [
        np.pad(array, [(0, -n % c) for n, c in zip(array.shape, cell, strict=True)]).astype(np.float32)
        for array in (*images, *masks)
    ]
    fixed, before, warped, count, saw, sees = padded
    spacing = np.asarray(spacing_mm / finest, np.float32)

    def matched(image: np.ndarray, mask: np.ndarray) -> BlockMatches:
        found = match_blocks(fixed, image, count, mask, spacing, cell=cell, radius=radius, signed=signed)
        return BlockMatches(*map(np.asarray, found))

    blocks = matched(warped, sees)
    texture = blocks.texture * (blocks.counts > 0)
    weights = np.where(texture > TEXTURE, texture, 0)
    x, y, z = (int(c * f) for c, f in zip(cell, factor, strict=True))
    return Level(blocks, matched(before, saw), weights, finest, (x, y, z))


def _likeness(level: Level, name: str) -> dict[str, float]:
    blocks, weights = level.blocks, level.weights
    if not weights.any():
        nothing = dict.fromkeys(
            ("similarity", "similarity_before", "elsewhere", "best", "held", "opposite"), 0.0
        )
        nothing |= {"expected": float(RADIUS), "judged": 0.0}
        return {f"{key}_{name}": value for key, value in nothing.items()}

    def mean(values: AnyArray) -> float:
        return float(np.sum(values * weights) / weights.sum())

    distance = np.linalg.norm(blocks.residual, axis=-1)
    before = level.before
    return {
        f"similarity_{name}": mean(blocks.correlation),
        f"similarity_before_{name}": mean(before.correlation * before.counts),
        f"elsewhere_{name}": mean(blocks.elsewhere),
        f"best_{name}": mean(blocks.best),
        f"held_{name}": mean(distance < HELD),
        f"expected_{name}": mean(blocks.expected),
        f"opposite_{name}": mean(blocks.correlation < 0),
        f"judged_{name}": int(np.count_nonzero(weights)) / max(1, int(np.count_nonzero(blocks.counts))),
    }


def _foreground(image: np.ndarray, count: np.ndarray, threshold: float | None = None) -> np.ndarray:
    if threshold is None:
        threshold = FOREGROUND * otsu_threshold(image[count])
    return ndimage.binary_fill_holes((image > threshold) & count)


def _overlaps(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], foreground: np.ndarray, threshold: float
) -> dict[str, float]:
    """Share of the union of both foregrounds that is in both, where both scans see; and what isn't seen."""
    found = {}
    for name, image, mask in zip(("overlap_before", "overlap"), images[1:], masks[1:], strict=True):
        other = _foreground(image, mask, threshold)
        both, either = foreground & other, (foreground & mask) | other
        found[name] = float(both.sum() / max(1, either.sum()))
    size = max(1, int(foreground.sum()))
    found["outside_before"] = 1 - float((foreground & masks[1]).sum() / size)
    found["outside"] = 1 - float((foreground & masks[2]).sum() / size)
    return found


def _plausibility(
    displacement: np.ndarray,
    jacobian: np.ndarray,
    foreground: np.ndarray,
    factor: Sequence[int],
    spacing_mm: Sequence[float],
) -> dict[str, float]:
    """The linear part of the field and the change of volume in the foreground."""
    inside = np.kron(foreground, np.ones(factor, bool))[tuple(slice(n) for n in jacobian.shape)]
    if inside.sum() < 100:
        inside = np.ones_like(inside)
    determinant = jacobian[inside]
    low, high = np.percentile(determinant, (1, 99))
    # Drawn at random: at equal steps, they can all lie in one slice.
    places = np.flatnonzero(inside)
    places = np.random.default_rng(0).choice(places, min(len(places), FIT_VOXELS))
    chosen = np.stack(np.unravel_index(places, inside.shape), axis=-1)
    points = (chosen - chosen.mean(axis=0)) * np.asarray(spacing_mm)
    moved = points + displacement[tuple(chosen.T)] * np.asarray(spacing_mm)
    design = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    matrix = np.linalg.lstsq(design, moved, rcond=None)[0][:3].T
    stretch = np.linalg.svd(matrix, compute_uv=False)
    linear = float(np.linalg.det(matrix))
    bend = np.log(np.clip(determinant, 1e-3, 1e3)) - np.log(np.clip(linear, 1e-3, 1e3))
    return {
        "linear_determinant": linear,
        "stretch_min": float(stretch[-1]),
        "stretch_max": float(stretch[0]),
        "jacobian_1_percent": float(low),
        "jacobian_99_percent": float(high),
        "sd_log_jacobian": float(np.std(bend)),
        "folded": float(np.mean(determinant <= 0)),
        "implausible": float(np.mean((determinant < DETERMINANTS[0]) | (determinant > DETERMINANTS[1]))),
    }


def _strain(
    displacement: np.ndarray, foreground: np.ndarray, cell: Sequence[int], spacing_mm: Sequence[float]
) -> np.ndarray:
    """[i, j, k] of the displacement of cells, which has voxels as unit."""
    cells_mm = [pooled(displacement[..., i], cell) * mm for i, mm in enumerate(spacing_mm)]
    lengths_mm = np.multiply(cell, spacing_mm)
    gradient = np.zeros((*foreground.shape, 3, 3), np.float32)
    for i, j in np.ndindex(3, 3):
        if foreground.shape[j] > 1:
            gradient[..., i, j] = np.gradient(cells_mm[i], lengths_mm[j], axis=j)
    if foreground.any():
        gradient -= np.average(gradient, axis=(0, 1, 2), weights=foreground)
    return np.linalg.norm(gradient, axis=(-2, -1))


def predict_error_mm(evidence: Evidence, shape: Sequence[int]) -> Float[np.ndarray, "x y z"]:
    """[x, y, z] mm: how far the field is expected to miss, from the blocks, smooth between them.

    Blocks without texture have the error of their neighbours.
    """
    fine = evidence.levels[0]
    error = predicted_error(error_marks(evidence)) * fine.voxel_mm
    step = 1 / np.asarray(fine.cell_voxels)
    places = ndimage.affine_transform(error, step, (step - 1) / 2, tuple(shape), order=1, mode="nearest")
    return places.astype(np.float32)


def mean_error_mm(evidence: Evidence) -> float:
    """The predicted error in the foreground, or everywhere if there is none."""
    error = predicted_error(error_marks(evidence)) * evidence.levels[0].voxel_mm
    weights = evidence.foreground if evidence.foreground.any() else np.ones_like(error)
    return float(np.average(error, weights=weights))


def error_marks(evidence: Evidence) -> dict[str, Float[np.ndarray, "i j k"]]:
    """What the error of a block is predicted from; more of each is worse.

    Returns:
      "distance": from its place, that its matches expect, in voxels of the fine level. "offset": to its best
      place, after those of neighbours have been averaged as vectors, likewise. "strain": of the field.
    """
    fine = evidence.levels[0]
    weights = fine.weights + 1e-9  # far from all texture it is the mean of all

    def smooth(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        mean = ndimage.gaussian_filter(values * weights, SMOOTH_CELLS, truncate=8)
        return mean / ndimage.gaussian_filter(weights, SMOOTH_CELLS, truncate=8)

    residual = np.asarray(fine.blocks.residual)
    offsets = [smooth(residual[..., i], weights) for i in range(3)]
    return {
        "distance": np.exp(smooth(np.log(fine.blocks.expected), weights)),
        "offset": np.linalg.norm(offsets, axis=0),
        "strain": np.sqrt(smooth(evidence.strain**2, np.ones_like(weights))),
    }


def predicted_error(marks: Mapping[str, Float[np.ndarray, "*places"]]) -> Float[np.ndarray, "*places"]:
    """In voxels of the fine level: a product of powers, none of them negative, of `error_marks`."""
    logarithm = sum(power * np.log(marks[name] + rule.ERROR_FLOOR) for name, power in rule.ERROR.items())
    return np.asarray(rule.ERROR_SCALE * np.exp(logarithm))
