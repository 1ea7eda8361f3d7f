"""What a registration is judged by. One pair at a time, NumPy or JAX arrays in, NumPy numbers out.

Images, masks and labels are [x, y, z], a displacement is [x, y, z, 3] in voxels. A mask leaves out padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from adregnet_jax.losses import ncc_loss, ssim_loss
from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant
from adregnet_jax.ops.sampling import sample

_ncc_loss = jax.jit(ncc_loss)
_ssim_loss = jax.jit(ssim_loss, static_argnames="window")
_jacobian_determinant = jax.jit(jacobian_determinant)
_folded_volume = jax.jit(folded_volume)


def ncc(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Global normalised cross-correlation, eq. 20: -1 to 1, and 0 if an image is constant."""
    return 1 - float(_ncc_loss(_as_batch(a), _as_batch(b), mask=_mask_as_batch(mask)))


def mse(a: ArrayLike, b: ArrayLike, mask: ArrayLike | None = None) -> float:
    """Mean squared difference, eq. 21."""
    squared = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2
    return float(np.mean(_inside(squared, mask)))


def ssim(a: ArrayLike, b: ArrayLike, *, window: int = 0, mask: ArrayLike | None = None) -> float:
    """Structural similarity for intensities of range 1: name the window wherever you print it.

    Args:
      a: [x, y, z].
      b: [x, y, z].
      window: 0 for one global window, eq. 22 as written; else the width of local Gaussian windows of SD 1.5.
        11 is scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.
      mask: [x, y, z] or None.
    """
    return 1 - float(_ssim_loss(_as_batch(a), _as_batch(b), window=window, mask=_mask_as_batch(mask)))


def jacobian_statistics(displacement: ArrayLike, mask: ArrayLike | None = None) -> dict[str, float]:
    """Statistics of det(I + du/dp) by central differences, over the voxels of the mask.

    Returns:
      mean, sd, minimum, and folded_percent, the share of determinants <= 0.
    """
    determinant = np.asarray(
        _jacobian_determinant(jnp.asarray(displacement, jnp.float32)[None])[0], np.float64
    )
    determinant = _inside(determinant, mask)
    return {
        "mean": float(determinant.mean()),
        "sd": float(determinant.std()),
        "minimum": float(determinant.min()),
        "folded_percent": 100 * float(np.mean(determinant <= 0)),
    }


def sd_log_jacobian(displacement: ArrayLike, mask: ArrayLike | None = None) -> float:
    """SDlogJ as Learn2Reg computes it: SD of log(clip(det + 3, 1e-9, 1e9)), 2 voxels inside the border.

    The border is that of the mask, which is False in padding, where there is one.

    The 3 is in the code of the challenge, so that folds have a logarithm; it makes the figure smaller than
    the SD of log(det).

    Raises:
      ValueError: a grid, or a mask, of 4 voxels or fewer along an axis.
    """
    determinant = np.asarray(
        _jacobian_determinant(jnp.asarray(displacement, jnp.float32)[None])[0], np.float64
    )
    scan = np.ones(determinant.shape, bool) if mask is None else np.asarray(mask, bool)
    determinant = determinant[ndimage.binary_erosion(scan, np.ones((5, 5, 5)))]
    if not determinant.size:
        raise ValueError(f"SDlogJ takes 5 voxels or more an axis, got {np.shape(displacement)}")
    return float(np.std(np.log(np.clip(determinant + 3, 1e-9, 1e9))))


def folded_volume_percent(displacement: ArrayLike, mask: ArrayLike | None = None) -> float:
    """The non-diffeomorphic volume by tetrahedra (`ops.jacobian.folded_volume`) in the mask, in percent."""
    inside = None if mask is None else jnp.asarray(mask, bool)[None]
    return 100 * float(_folded_volume(jnp.asarray(displacement, jnp.float32)[None], inside)[0])


def tre_mm(displacement: ArrayLike, fixed: ArrayLike, moving: ArrayLike, spacing_mm: ArrayLike) -> np.ndarray:
    """Target registration error of each landmark, `|(p_F + u(p_F) - p_M) * spacing_mm|`.

    Eq. 23 through the pull-back. For the error before registration give a displacement of zeros.

    Args:
      displacement: [x, y, z, 3] in voxels, sampled trilinearly.
      fixed: [n, 3] in voxels.
      moving: [n, 3] in voxels.
      spacing_mm: [3].

    Returns:
      [n] in mm.
    """
    difference = _map_points(displacement, fixed) - np.asarray(moving, np.float64)
    return np.linalg.norm(difference * np.asarray(spacing_mm, np.float64), axis=-1)


def tre_snapped_mm(
    displacement: ArrayLike,
    fixed: ArrayLike,
    moving: ArrayLike,
    *,
    to_native: Callable[[np.ndarray], np.ndarray],
    native_spacing_mm: ArrayLike,
) -> np.ndarray:
    """Target registration error as DIR-Lab compares: the mapped point snapped to a voxel of the scan first.

    Args:
      displacement: [x, y, z, 3] in voxels of the grid that was registered.
      fixed: [n, 3] in voxels of that grid.
      moving: [n, 3] in voxels of that grid.
      to_native: from voxels of that grid to voxels of the scan as it was on disk: `Pair.to_native`.
      native_spacing_mm: [3] of the scan as it was on disk.

    Returns:
      [n] in mm.
    """
    snapped = np.rint(to_native(_map_points(displacement, fixed)))
    difference = snapped - to_native(np.asarray(moving, np.float64))
    return np.linalg.norm(difference * np.asarray(native_spacing_mm, np.float64), axis=-1)


def dice(labels_a: ArrayLike, labels_b: ArrayLike, labels: Sequence[int]) -> np.ndarray:
    """Dice overlap, 2 |A and B| / (|A| + |B|), of each label.

    Args:
      labels_a: [x, y, z] integers.
      labels_b: [x, y, z] integers.
      labels: the labels to score.

    Returns:
      [len(labels)], NaN for a label absent from both: average with `numpy.nanmean`.
    """
    labels_a, labels_b = np.asarray(labels_a), np.asarray(labels_b)
    if labels_a.shape != labels_b.shape:
        raise ValueError(f"label maps differ in shape: {labels_a.shape} and {labels_b.shape}")
    scores = np.full(len(labels), np.nan)
    for i, label in enumerate(labels):
        in_a, in_b = labels_a == label, labels_b == label
        size = np.count_nonzero(in_a) + np.count_nonzero(in_b)
        if size:
            scores[i] = 2 * np.count_nonzero(in_a & in_b) / size
    return scores


def _map_points(displacement: ArrayLike, points: ArrayLike) -> np.ndarray:
    """`p + u(p)` in float64: [n, 3]."""
    points = np.asarray(points, np.float64)
    moved = sample(jnp.asarray(displacement, jnp.float32), jnp.asarray(points, jnp.float32))
    return points + np.asarray(moved, np.float64)


def _as_batch(image: ArrayLike) -> jax.Array:
    return jnp.asarray(image, jnp.float32)[None, ..., None]


def _mask_as_batch(mask: ArrayLike | None) -> jax.Array | None:
    return None if mask is None else _as_batch(_valid(mask))


def _inside(values: np.ndarray, mask: ArrayLike | None) -> np.ndarray:
    """The values within the mask: [n]."""
    return values.ravel() if mask is None else values[_valid(mask)]


def _valid(mask: ArrayLike) -> np.ndarray:
    valid = np.asarray(mask) > 0
    if not valid.any():
        raise ValueError("the mask is empty: there is no voxel to judge")
    return valid
