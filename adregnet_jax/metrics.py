"""Metrics of one registered pair: NumPy or JAX arrays in, NumPy numbers out.

Images, masks and labels are [x, y, z], a displacement is [x, y, z, 3] in voxels. Voxels where a mask is 0
(padding, for instance) don't count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real, Shaped
from scipy import ndimage

from adregnet_jax.losses import mutual_information_loss, ncc_loss, ssim_loss
from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant
from adregnet_jax.ops.sampling import sample

Array = np.ndarray | jax.Array


def _of_pair(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A loss of images and mask [x, y, z], compiled."""

    @functools.partial(jax.jit, static_argnames="window")
    def of_pair(a: jax.Array, b: jax.Array, mask: jax.Array | None, **window: int) -> jax.Array:
        a, b = a[None, ..., None], b[None, ..., None]
        return loss(a, b, mask=None if mask is None else mask[None, ..., None], **window)

    return of_pair


_ncc_loss = _of_pair(ncc_loss)
_ssim_loss = _of_pair(ssim_loss)
_mutual_information_loss = _of_pair(mutual_information_loss)
_jacobian_determinant = jax.jit(lambda displacement: jacobian_determinant(displacement[None])[0])
_folded_volume = jax.jit(
    lambda displacement, mask: folded_volume(displacement[None], mask=None if mask is None else mask[None])[0]
)


def ncc(
    a: Real[Array, "x y z"], b: Real[Array, "x y z"], *, mask: Shaped[Array, "x y z"] | None = None
) -> float:
    """Global normalised cross-correlation, eq. 20: -1 to 1, and 0 if an image is constant."""
    return 1 - float(_ncc_loss(_float32(a), _float32(b), _valid(mask)))


def mutual_information(
    a: Real[Array, "x y z"], b: Real[Array, "x y z"], *, mask: Shaped[Array, "x y z"] | None = None
) -> float:
    """Mutual information in nats, for intensities in [0, 1] (`losses.mutual_information_loss`)."""
    return -float(_mutual_information_loss(_float32(a), _float32(b), _valid(mask)))


def mse(
    a: Real[Array, "x y z"], b: Real[Array, "x y z"], *, mask: Shaped[Array, "x y z"] | None = None
) -> float:
    """Mean squared difference, eq. 21."""
    squared = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2
    return float(np.mean(_inside(squared, mask)))


def ssim(
    a: Real[Array, "x y z"],
    b: Real[Array, "x y z"],
    *,
    window: int = 0,
    mask: Shaped[Array, "x y z"] | None = None,
) -> float:
    """Structural similarity of intensities with a range of 1. Wherever you print it, name the window.

    Args:
      a: [x, y, z].
      b: [x, y, z].
      window: 0 for one global window, eq. 22 as written; otherwise the width of local Gaussian windows with
        SD 1.5. 11 agrees with scikit-image's
        `structural_similarity(gaussian_weights=True, use_sample_covariance=False)`.
      mask: [x, y, z] or None.
    """
    return 1 - float(_ssim_loss(_float32(a), _float32(b), _valid(mask), window=window))


def jacobian(displacement: Float[Array, "x y z 3"]) -> Float[np.ndarray, "x y z"]:
    """Determinant of I + du/dp by central differences: the change of volume; 0 or less is a fold."""
    return np.asarray(_jacobian_determinant(_float32(displacement)))


def jacobian_statistics(
    displacement: Float[Array, "x y z 3"], *, mask: Shaped[Array, "x y z"] | None = None
) -> dict[str, float]:
    """Statistics of `jacobian`: see `determinant_statistics`."""
    return determinant_statistics(jacobian(displacement), mask=mask)


def determinant_statistics(
    determinant: Float[Array, "x y z"], *, mask: Shaped[Array, "x y z"] | None = None
) -> dict[str, float]:
    """Statistics of Jacobian determinants over the voxels of the mask.

    Returns:
      mean, sd, minimum, maximum, and folded_percent, the share of determinants <= 0.
    """
    determinant = _inside(np.asarray(determinant, np.float64), mask)
    return {
        "mean": float(determinant.mean()),
        "sd": float(determinant.std()),
        "minimum": float(determinant.min()),
        "maximum": float(determinant.max()),
        "folded_percent": 100 * float(np.mean(determinant <= 0)),
    }


def sd_log_jacobian(
    displacement: Float[Array, "x y z 3"], *, mask: Shaped[Array, "x y z"] | None = None
) -> float:
    """SDlogJ as Learn2Reg computes it: SD of log(clip(det + 3, 1e-9, 1e9)), 2 voxels inside the border.

    With a mask, the border is that of the mask.

    The 3 comes from the challenge's code and gives folds a logarithm; it makes the value smaller than the SD
    of log(det).

    Raises:
      ValueError: a grid, or a mask, of 4 voxels or fewer along an axis.
    """
    determinant = np.asarray(jacobian(displacement), np.float64)
    scan = np.ones(determinant.shape, bool) if mask is None else np.asarray(mask, bool)
    determinant = determinant[ndimage.binary_erosion(scan, np.ones((5, 5, 5)))]
    if not determinant.size:
        raise ValueError(f"SDlogJ needs 5 voxels or more along each axis, got {np.shape(displacement)}")
    return float(np.std(np.log(np.clip(determinant + 3, 1e-9, 1e9))))


def folded_volume_percent(
    displacement: Float[Array, "x y z 3"], *, mask: Shaped[Array, "x y z"] | None = None
) -> float:
    """The non-diffeomorphic volume by tetrahedra (`ops.jacobian.folded_volume`) in the mask, in percent."""
    inside = None if mask is None else jnp.asarray(mask, bool)
    return 100 * float(_folded_volume(_float32(displacement), inside))


def distances_mm(
    points: Real[Array, "n 3"],
    others: Real[Array, "n 3"],
    *,
    spacing_mm: Real[Array, " 3"] | Sequence[float] = (1.0, 1.0, 1.0),
) -> Float[np.ndarray, " n"]:
    """Distances of paired points, in millimetres or, with their spacing, in voxels of one grid."""
    difference = np.asarray(points, np.float64) - np.asarray(others, np.float64)
    return np.linalg.norm(difference * np.asarray(spacing_mm, np.float64), axis=-1)


def tre_mm(
    displacement: Float[Array, "x y z 3"],
    fixed: Real[Array, "n 3"],
    moving: Real[Array, "n 3"],
    spacing_mm: Real[Array, " 3"] | Sequence[float],
) -> Float[np.ndarray, " n"]:
    """Target registration error of each landmark, `|(p_F + u(p_F) - p_M) * spacing_mm|`.

    This is eq. 23 with the pull-back. Before registration, the error is `distances_mm` of the landmarks.

    Args:
      displacement: [x, y, z, 3] in voxels, sampled trilinearly.
      fixed: [n, 3] in voxels.
      moving: [n, 3] in voxels.
      spacing_mm: [3].

    Returns:
      [n] in mm.
    """
    return distances_mm(map_points(displacement, fixed), moving, spacing_mm=spacing_mm)


def tre_snapped_mm(
    displacement: Float[Array, "x y z 3"],
    fixed: Real[Array, "n 3"],
    moving: Real[Array, "n 3"],
    *,
    to_native: Callable[[np.ndarray], np.ndarray],
    native_spacing_mm: Real[Array, " 3"] | Sequence[float],
) -> Float[np.ndarray, " n"]:
    """Target registration error as DIR-Lab measures it: the mapped point is first rounded to a voxel.

    Args:
      displacement: [x, y, z, 3] in voxels of the registered grid.
      fixed: [n, 3] in voxels of that grid.
      moving: [n, 3] in voxels of that grid.
      to_native: maps voxels of that grid to voxels of the original scan, as `Pair.to_native` does.
      native_spacing_mm: [3], spacing of the original scan.

    Returns:
      [n] in mm.
    """
    snapped = np.rint(to_native(map_points(displacement, fixed)))
    return distances_mm(snapped, to_native(np.asarray(moving, np.float64)), spacing_mm=native_spacing_mm)


def dice(
    labels_a: Shaped[Array, ...], labels_b: Shaped[Array, ...], labels: Sequence[int]
) -> Float[np.ndarray, " k"]:
    """Dice overlap, 2 |A and B| / (|A| + |B|), of each label.

    Args:
      labels_a: [x, y, z] integers.
      labels_b: [x, y, z] integers.
      labels: the k labels to score.

    Returns:
      [k], NaN for a label absent from both: average with `numpy.nanmean`.

    Raises:
      ValueError: label maps whose shapes differ.
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


def foreground_labels(*label_maps: Shaped[Array, ...]) -> list[int]:
    """The labels that occur in any of the label maps, in order, without the background 0."""
    found = np.unique(np.concatenate([np.unique(label_map) for label_map in label_maps]))
    return [label for label in found.tolist() if label != 0]


def dice_by_label(
    fixed: Shaped[Array, "x y z"],
    moving: Shaped[Array, ...],
    warped: Mapping[str, Shaped[Array, "x y z"]],
) -> dict[str, dict[int, float]]:
    """Dice of every foreground label, for each of several ways to bring the moving labels to the fixed grid.

    Args:
      fixed: [x, y, z] integers.
      moving: integers on any grid. Labels that warping removes count with 0.
      warped: [x, y, z] integers by name.

    Returns:
      Dice by label, by the names of `warped`.
    """
    labels = foreground_labels(fixed, moving)
    return {
        name: dict(zip(labels, dice(fixed, label_map, labels).tolist(), strict=True))
        for name, label_map in warped.items()
    }


def map_points(displacement: Float[Array, "x y z 3"], points: Real[Array, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """`p + u(p)` in float64."""
    points = np.asarray(points, np.float64)
    moved = sample(jnp.asarray(displacement, jnp.float32), jnp.asarray(points, jnp.float32))
    return points + np.asarray(moved, np.float64)


def _float32(values: Array) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def _valid(mask: Array | None) -> jax.Array | None:
    return None if mask is None else _float32(_nonempty(mask))


def _inside(values: np.ndarray, mask: Array | None) -> np.ndarray:
    """The values within the mask: [n]."""
    return values.ravel() if mask is None else values[_nonempty(mask)]


def _nonempty(mask: Array) -> np.ndarray:
    valid = np.asarray(mask) > 0
    if not valid.any():
        raise ValueError("the mask is empty: there is no voxel to measure")
    return valid
