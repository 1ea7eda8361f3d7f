"""How far a displacement is from known landmarks, fields and labels, as losses."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from adregnet_jax.losses._masked import check_displacement, masked_mean
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.sampling import sample_at_points, warp
from adregnet_jax.ops.slabs import sum_over_slabs


def landmark_loss(
    displacement: Float[AnyArray, "b x y z 3"],
    fixed_points: Float[AnyArray, "b n 3"],
    moving_points: Float[AnyArray, "b n 3"],
    valid: Shaped[AnyArray, "b n"],
    spacing_mm: Float[AnyArray, "b 3"],
) -> Float[Array, ""]:
    """Mean distance in mm between mapped fixed landmarks and moving landmarks.

    Eq. 19 through the pull-back: |(p_F + u(p_F) - p_M) * spacing|, where the paper writes T(p_M) - p_F, the
    same distance through the inverse map. A pair without landmarks gives 0.

    Args:
      displacement: [b, x, y, z, 3] in voxels.
      fixed_points: [b, n, 3] in voxels.
      moving_points: [b, n, 3] in voxels.
      valid: [b, n], 1 for a landmark and 0 for padding.
      spacing_mm: [b, 3].

    Returns:
      Scalar: the mean over each pair's landmarks, then over all pairs of the batch.

    Raises:
      ValueError: wrong shapes.

    Examples:
      >>> fixed_points = jnp.array([[[1.0, 1, 1]]])
      >>> moving_points = jnp.array([[[2.0, 1, 1]]])
      >>> still, spacing_mm = jnp.zeros((1, 4, 4, 4, 3)), jnp.array([[2.5, 1, 1]])
      >>> float(landmark_loss(still, fixed_points, moving_points, jnp.ones((1, 1)), spacing_mm))
      2.5
    """
    b, n = valid.shape
    if fixed_points.shape != (b, n, 3) or moving_points.shape != (b, n, 3) or spacing_mm.shape != (b, 3):
        raise ValueError(
            f"with valid {valid.shape}, landmarks are {(b, n, 3)} and spacing_mm {(b, 3)}; "
            f"got {fixed_points.shape}, {moving_points.shape} and {spacing_mm.shape}"
        )
    # [b, n, 3]
    mapped = fixed_points + sample_at_points(displacement, fixed_points)
    squared = jnp.sum(((mapped - moving_points) * spacing_mm[:, None]) ** 2, axis=-1)  # [b, n]
    # The root has no gradient at 0: a landmark that is met exactly, or is padding, is left out before it.
    apart = (valid > 0) & (squared > 0)
    distance_mm = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
    return jnp.mean(jnp.sum(distance_mm, axis=1) / jnp.maximum(jnp.sum(valid > 0, axis=1), 1))


def field_loss(
    displacement: Float[AnyArray, "b x y z 3"],
    truth: Float[AnyArray, "b x y z 3"],
    spacing_mm: Float[AnyArray, "b 3"],
    *,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
    """Mean distance in mm between a displacement and the true one, where it is known. Not in the paper.

    Args:
      displacement: [b, x, y, z, 3] in voxels.
      truth: [b, x, y, z, 3] in voxels.
      spacing_mm: [b, 3].
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar: a mean over voxels and pairs.

    Raises:
      ValueError: wrong shapes.

    Examples:
      >>> still, spacing_mm = jnp.zeros((1, 4, 4, 4, 3)), jnp.array([[2.5, 1, 1]])
      >>> truth = still.at[..., 0].set(1)
      >>> round(float(field_loss(still, truth, spacing_mm)), 3)
      2.5
    """
    check_displacement(displacement, mask)
    if truth.shape != displacement.shape or spacing_mm.shape != (displacement.shape[0], 3):
        raise ValueError(
            "both displacements must be of one shape and spacing_mm [b, 3], got"
            f" {displacement.shape}, {truth.shape} and {spacing_mm.shape}"
        )
    error_mm = (displacement - truth) * spacing_mm[:, None, None, None]
    if mask is not None:
        error_mm = jnp.where(mask > 0, error_mm, 0)
    # A micrometre, so that the root has a gradient at 0.
    distance_mm = jnp.sqrt(jnp.sum(error_mm**2, axis=-1) + 1e-6)
    valid = None if mask is None else (mask[..., 0] > 0).astype(distance_mm.dtype)
    return jnp.mean(masked_mean(distance_mm, valid))


def dice_loss(
    fixed_labels: Int[AnyArray, "b x y z 1"],
    moving_labels: Int[AnyArray, "b x y z 1"],
    displacement: Float[AnyArray, "b x y z 3"],
    labels: Sequence[int],
) -> Float[Array, ""]:
    """1 minus the soft Dice of labels, each warped trilinearly as an image of 0 and 1.

    Args:
      fixed_labels: [b, x, y, z, 1], integers.
      moving_labels: [b, x, y, z, 1], integers.
      displacement: [b, x, y, z, 3] in voxels.
      labels: those that count.

    Returns:
      Scalar in [0, 1]: the mean over labels and batch. A label that neither image has counts as 0.

    Raises:
      ValueError: wrong shapes, or no labels.

    Examples:
      >>> labels = jnp.array([0, 5, 5, 0]).reshape(1, 4, 1, 1, 1)
      >>> still = jnp.zeros((1, 4, 1, 1, 3))
      >>> round(float(dice_loss(labels, labels, still, [5])), 3)
      0.0
      >>> round(float(dice_loss(labels, labels, still.at[..., 0].set(1), [5])), 3)
      0.5
    """
    if fixed_labels.shape != (*displacement.shape[:-1], 1) or not labels:
        raise ValueError(
            f"fixed_labels must be {(*displacement.shape[:-1], 1)} and labels not empty, "
            f"got {fixed_labels.shape} and {labels}"
        )
    chosen = jnp.asarray(labels)[None, None, None, None]
    fixed = (fixed_labels == chosen).astype(jnp.float32)  # [b, x, y, z, label]
    warped = warp((moving_labels == chosen).astype(jnp.float32), displacement)
    overlap = jnp.sum(fixed * warped, axis=(1, 2, 3))
    size = jnp.sum(fixed, axis=(1, 2, 3)) + jnp.sum(warped, axis=(1, 2, 3))
    overlap, size = sum_over_slabs((overlap, size))
    return jnp.mean(1 - (2 * overlap + 1e-5) / (size + 1e-5))
