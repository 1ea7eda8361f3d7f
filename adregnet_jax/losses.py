"""The terms of the training loss, eq. 16-19: pure functions of batches, each a scalar.

Images and masks are [b, x, y, z, 1], intensities of about [0, 1]; a mask is 1 where the scan is and 0 in
padding. Masked voxels have no part in a term that takes a mask, whatever the images hold there; bending
energy, landmarks and Dice take none, and MIND's features are made before its mask. Every term is a mean over
the batch of what each pair gives alone, and is finite with finite gradients on constant images and empty
masks.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.config import LossConfig
from adregnet_jax.ops.filters import gaussian_filter
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.ops.mind import mind_ssc
from adregnet_jax.ops.ncc import local_squared_ncc
from adregnet_jax.ops.sampling import sample_at_points, warp
from adregnet_jax.ops.slabs import halo, mean_over_slabs, slab_count, slab_start, sum_over_slabs, whole_width

SSIM_C1 = 0.01**2  # the constants of SSIM for intensities of range 1
SSIM_C2 = 0.03**2
SSIM_SIGMA = 1.5  # voxels, SD of the local Gaussian windows


def ncc_loss(
    fixed: jax.Array,
    warped: jax.Array,
    *,
    window: int = 0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """1 - NCC (eq. 17): global (eq. 20), or the mean of the squared NCC in windows around each voxel.

    Both are blind to gain and offset of either image; the local one also where these change slowly. A
    constant image has no correlation: its NCC counts as 0.

    Args:
      fixed: [b, x, y, z, 1].
      warped: [b, x, y, z, 1], the moving image on the grid of the fixed one.
      window: 0 for the global NCC; else the width of cubic windows, an odd number of voxels. What a window
        holds beyond the border or outside the mask does not count.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar: 0 to 2 (global) or 0 to 1 (local).

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1].

    Reference:
      Balakrishnan et al., VoxelMorph, IEEE TMI 2019 (local NCC).
    """
    fixed, warped, mask = _masked_images(fixed, warped, mask)
    # The local NCC does not depend on the means; without them float32 keeps its digits.
    fixed = _centred(fixed, mask)
    warped = _centred(warped, mask)
    if window:
        squared = local_squared_ncc(fixed, warped, window, mask)
        return jnp.mean(1 - _mean(squared, mask))
    covariance = _mean(fixed * warped, mask)
    variances = _mean(fixed**2, mask) * _mean(warped**2, mask)
    # eq. 20. The addend is the product of the variances of two images of SD 0.003: noise has no correlation.
    return jnp.mean(1 - covariance / jnp.sqrt(variances + 1e-10))


def ssim_loss(
    fixed: jax.Array,
    warped: jax.Array,
    *,
    window: int = 0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """1 - SSIM (eq. 17, 22) for intensities of range 1.

    Args:
      fixed: [b, x, y, z, 1].
      warped: [b, x, y, z, 1], the moving image on the grid of the fixed one.
      window: 0 for one global window, as eq. 22 is written; else the mean over Gaussian windows of SD 1.5 and
        this width, an odd number of voxels. 11 is scikit-image's `structural_similarity` with
        `gaussian_weights=True, use_sample_covariance=False`. Windows that reach over the border are left out;
        what a window holds outside the mask does not count.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar, 0 to 2.

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1], or a volume smaller than the window.

    Reference:
      Wang et al., Image quality assessment, IEEE TIP 2004.
    """
    fixed, warped, mask = _masked_images(fixed, warped, mask)
    if window:
        whole = _whole_shape(fixed)
        if min(whole) < window:
            raise ValueError(f"a volume of {whole} is smaller than SSIM windows of {window} voxels")
        ssim = _ssim(fixed, warped, lambda values: _gaussian_mean(values, window, mask))
        r = window // 2
        if slab_count() > 1:
            mask = _inside(fixed, r) * (1 if mask is None else mask)
        along_x = slice(r, whole[0] - r) if slab_count() == 1 else slice(None)
        inside = (slice(None), along_x, *(slice(r, n - r) for n in whole[1:]))
        return jnp.mean(1 - _mean(ssim[inside], None if mask is None else mask[inside]))
    return jnp.mean(1 - _ssim(fixed, warped, lambda values: _mean(values, mask)))


def ssd_loss(
    fixed: jax.Array,
    warped: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Mean squared difference, for scans whose intensities mean the same, or for maps of features.

    Args:
      fixed: [b, x, y, z, c].
      warped: [b, x, y, z, c], on the grid of the fixed one.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar: a sum over channels, a mean over voxels and pairs.

    Raises:
      ValueError: shapes that differ.
    """
    if fixed.ndim != 5 or warped.shape != fixed.shape:
        raise ValueError(f"both must be [b, x, y, z, c] on one grid, got {fixed.shape} and {warped.shape}")
    difference = fixed - warped
    if mask is None:
        return jnp.mean(_mean(jnp.sum(difference**2, axis=-1), None))
    # What is no number outside the mask would come back through the gradient of its square.
    difference = jnp.where(mask > 0, difference, 0)
    valid = (mask[..., 0] > 0).astype(fixed.dtype)
    return jnp.mean(_mean(jnp.sum(difference**2, axis=-1), valid))


def mutual_information_loss(
    fixed: jax.Array,
    warped: jax.Array,
    *,
    bins: int = 32,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Minus the mutual information of the intensities, in nats: for scans of different contrast.

    The joint histogram has cubic B-splines for Parzen windows in both directions, which makes it smooth in
    the intensities. It is made block by block: memory does not grow with voxels times bins.

    Args:
      fixed: [b, x, y, z, 1], intensities in [0, 1]; beyond, they count as 0 or 1.
      warped: [b, x, y, z, 1], on the grid of the fixed one.
      bins: of each intensity.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar, 0 or less; an empty mask gives 0.

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1], or fewer than 5 bins.

    Reference:
      Mattes et al., PET-CT image registration in the chest using free-form deformations, IEEE TMI 2003.
    """
    if bins < 5:
        raise ValueError(f"a histogram with cubic windows has 5 bins or more, got {bins}")
    fixed, warped, mask = _masked_images(fixed, warped, mask)
    weights = jnp.ones_like(fixed) if mask is None else mask

    def information(fixed, warped, weights):
        joint = _joint_histogram(fixed.ravel(), warped.ravel(), weights.ravel(), bins)
        joint = sum_over_slabs(joint)
        joint = joint / jnp.maximum(jnp.sum(joint), 1e-6)
        independent = jnp.sum(joint, axis=0) * jnp.sum(joint, axis=1, keepdims=True)
        tiny = 1e-12  # of a probability: p log p is 0 there
        return jnp.sum(joint * (jnp.log(joint + tiny) - jnp.log(independent + tiny)))

    return -jnp.mean(jax.vmap(information)(fixed, warped, weights))


def smoothness_loss(
    displacement: jax.Array,
    spacing_mm: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Squared gradient of the displacement, the L_smooth of eq. 18, in (mm/mm)^2.

    The sum over the nine derivatives d(u_k mm)/d(x_j mm), each a mean over voxels: the same for a motion
    whatever the grid. Forward differences, because central ones don't see a field that alternates from voxel
    to voxel. (VoxelMorph takes the mean over the nine: its weight 1 is 1/9 here.)

    Args:
      displacement: [b, x, y, z, 3] in voxels.
      spacing_mm: [b, 3].
      mask: [b, x, y, z, 1] or None; a difference counts where both its voxels do.

    Returns:
      Scalar.

    Raises:
      ValueError: wrong shapes.
    """
    _check_displacement(displacement, mask)
    if spacing_mm.shape != (displacement.shape[0], 3):
        raise ValueError(f"spacing_mm must be [b, 3] = {(displacement.shape[0], 3)}, got {spacing_mm.shape}")
    spacing_mm = spacing_mm[:, None, None, None, :]
    displacement_mm = displacement * spacing_mm
    valid = None if mask is None else (mask[..., 0] > 0).astype(displacement.dtype)
    total = jnp.zeros(())
    for j in range(3):
        values, counted = displacement_mm, valid
        if j == 0 and slab_count() > 1:  # the first voxels of the next slab; behind the last, none count
            present = jnp.ones(displacement.shape[:-1]) if valid is None else valid
            values, counted = (halo(array, 0, 1) for array in (values, present))
        n = values.shape[1 + j]
        lower = [slice(0, n - 1) if axis == 1 + j else slice(None) for axis in range(4)]
        upper = [slice(1, n) if axis == 1 + j else slice(None) for axis in range(4)]
        both = None if counted is None else counted[*lower] * counted[*upper]
        difference = (values[*upper] - values[*lower]) / spacing_mm[..., j, None]
        total += jnp.mean(_mean(jnp.sum(difference**2, axis=-1), both))
    return total


def bending_energy_loss(displacement: jax.Array, spacing_mm: jax.Array) -> jax.Array:
    """Squared second derivatives of the displacement, in 1/mm^2: no affine map costs anything.

    The sum over components and pairs of axes, the mixed ones twice, each a mean over the voxels inside.

    Args:
      displacement: [b, x, y, z, 3] in voxels, three voxels or more along each axis.
      spacing_mm: [b, 3].

    Returns:
      Scalar.

    Raises:
      ValueError: wrong shapes.

    Reference:
      Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 1999.
    """
    _check_displacement(displacement, None)
    if min(_whole_shape(displacement)) < 3 or spacing_mm.shape != (displacement.shape[0], 3):
        raise ValueError(
            "bending needs three voxels along each axis and a spacing_mm of [b, 3], "
            f"got {displacement.shape} and {spacing_mm.shape}"
        )
    spacing_mm = spacing_mm[:, None, None, None, :]
    displacement_mm = displacement * spacing_mm
    inside = None
    if slab_count() > 1:
        inside = _inside(displacement[..., 0], 1)[:, :, 1:-1, 1:-1]
        displacement_mm = halo(displacement_mm, 1, 1)

    def moved(steps):
        shifted = (slice(1 + s, n - 1 + s) for s, n in zip(steps, displacement_mm.shape[1:4], strict=True))
        return displacement_mm[(slice(None), *shifted)]

    unit = np.eye(3, dtype=int)
    total = jnp.zeros(())
    for j, k in itertools.combinations_with_replacement(range(3), 2):
        if j == k:
            second = moved(unit[j]) - 2 * moved(0 * unit[j]) + moved(-unit[j])
        else:
            second = moved(unit[j] + unit[k]) - moved(unit[j] - unit[k])
            second = (second - moved(unit[k] - unit[j]) + moved(-unit[j] - unit[k])) / 4
        second = second / (spacing_mm[..., j, None] * spacing_mm[..., k, None])
        total += (1 if j == k else 2) * jnp.mean(_mean(jnp.sum(second**2, axis=-1), inside))
    return total


def jacobian_loss(displacement: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Mean of max(0, -det(I + du/dp)) over voxels, the L_jac of eq. 18: only folds cost, by their depth.

    Args:
      displacement: [b, x, y, z, 3] in voxels.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar.

    Raises:
      ValueError: wrong shapes.
    """
    _check_displacement(displacement, mask)
    folding = jax.nn.relu(-jacobian_determinant(displacement))
    valid = None if mask is None else (mask[..., 0] > 0).astype(folding.dtype)
    return jnp.mean(_mean(folding, valid))


def landmark_loss(
    displacement: jax.Array,
    fixed_points: jax.Array,
    moving_points: jax.Array,
    valid: jax.Array,
    spacing_mm: jax.Array,
) -> jax.Array:
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
    displacement: jax.Array,
    truth: jax.Array,
    spacing_mm: jax.Array,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
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
    """
    _check_displacement(displacement, mask)
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
    return jnp.mean(_mean(distance_mm, valid))


def dice_loss(
    fixed_labels: jax.Array,
    moving_labels: jax.Array,
    displacement: jax.Array,
    labels: Sequence[int],
) -> jax.Array:
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
    """
    if fixed_labels.shape != (*displacement.shape[:-1], 1) or not labels:
        raise ValueError(
            f"fixed_labels must be {(*displacement.shape[:-1], 1)} and labels not empty, "
            f"got {fixed_labels.shape} and {labels}"
        )
    chosen = jnp.asarray(labels)
    fixed = (fixed_labels == chosen).astype(jnp.float32)  # [b, x, y, z, label]
    warped = warp((moving_labels == chosen).astype(jnp.float32), displacement)
    overlap = jnp.sum(fixed * warped, axis=(1, 2, 3))
    size = jnp.sum(fixed, axis=(1, 2, 3)) + jnp.sum(warped, axis=(1, 2, 3))
    overlap, size = sum_over_slabs((overlap, size))
    return jnp.mean(1 - (2 * overlap + 1e-5) / (size + 1e-5))


def total_loss(
    batch: Mapping[str, jax.Array],
    displacement: jax.Array,
    warped: jax.Array,
    config: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss, eq. 16-18, and its terms.

    Args:
      batch: fixed and mask [b, x, y, z, 1], spacing_mm [b, 3], fixed_landmarks and moving_landmarks
        [b, n, 3], landmark_valid [b, n]; for the Dice term fixed_labels and moving_labels [b, x, y, z, 1];
        for the field term displacement [b, x, y, z, 3] in voxels. Where there is same_contrast [b], ncc and
        ssim have gradients from the pairs with 1 alone.
      displacement: [b, x, y, z, 3] in voxels.
      warped: [b, x, y, z, 1], the moving images warped by it.
      config: the weights.

    Returns:
      The weighted sum, and each term before it is weighted, by name: ncc, ssim, mind,
      mutual_information, smoothness, jacobian, bending, landmark, field, dice. A term of weight 0 is not
      computed and not returned.
    """
    mask = batch["mask"] if config.masked else None
    common: dict[str, Any] = {"mask": mask}
    of_one_contrast = common
    if "same_contrast" in batch:  # an empty mask has no gradient: the other pairs add a constant
        counts = jnp.ones_like(batch["mask"]) if mask is None else mask
        of_one_contrast = common | {"mask": counts * batch["same_contrast"][:, None, None, None, None]}
    candidates = {
        # eq. 17
        "ncc": (
            config.similarity * config.ncc,
            lambda: ncc_loss(batch["fixed"], warped, window=config.ncc_window, **of_one_contrast),
        ),
        "ssim": (
            config.similarity * config.ssim,
            lambda: ssim_loss(batch["fixed"], warped, window=config.ssim_window, **of_one_contrast),
        ),
        # For scans of different contrast, not in the paper.
        "mind": (
            config.similarity * config.mind,
            lambda: ssd_loss(*(mind_ssc(image) for image in (batch["fixed"], warped)), **common),
        ),
        "mutual_information": (
            config.similarity * config.mutual_information,
            lambda: mutual_information_loss(batch["fixed"], warped, **common),
        ),
        # eq. 18
        "smoothness": (
            config.regularisation * config.smoothness,
            lambda: smoothness_loss(displacement, batch["spacing_mm"], **common),
        ),
        "jacobian": (
            config.regularisation * config.jacobian,
            lambda: jacobian_loss(displacement, **common),
        ),
        "bending": (
            config.regularisation * config.bending,
            lambda: bending_energy_loss(displacement, batch["spacing_mm"]),
        ),
        # eq. 19
        "landmark": (
            config.landmark,
            lambda: landmark_loss(
                displacement,
                batch["fixed_landmarks"],
                batch["moving_landmarks"],
                batch["landmark_valid"],
                batch["spacing_mm"],
            ),
        ),
        "field": (
            config.field,
            lambda: field_loss(displacement, batch["displacement"], batch["spacing_mm"], **common),
        ),
        "dice": (
            config.dice,
            lambda: dice_loss(
                batch["fixed_labels"],
                batch["moving_labels"],
                displacement,
                config.dice_labels,
            ),
        ),
    }
    terms = {name: term() for name, (weight, term) in candidates.items() if weight}
    # eq. 16
    total = sum((candidates[name][0] * value for name, value in terms.items()), jnp.zeros(()))
    return total, terms


def _joint_histogram(fixed, warped, weights, bins, block=1 << 15):
    """[bins, bins]: weighted counts of pairs of intensities [n]."""
    block = min(block, max(len(fixed), 1))
    short = -len(fixed) % block
    # What fills the last block has no weight.
    blocks = [jnp.pad(values, (0, short)).reshape(-1, block) for values in (fixed, warped, weights)]

    @jax.checkpoint  # the gradient makes a block's windows again, where it would keep those of all
    def count(joint, values):
        fixed, warped, weights = values
        windows = _parzen_windows(fixed, bins) * weights[:, None]
        return joint + windows.T @ _parzen_windows(warped, bins), None

    return jax.lax.scan(count, jnp.zeros((bins, bins)), blocks)[0]


def _parzen_windows(intensities, bins):
    """[n, bins]: what each intensity gives to each bin, cubic B-splines that sum to 1."""
    # The outermost bins take the tails of 0 and 1.
    position = 1 + jnp.clip(intensities, 0, 1) * (bins - 3)
    distance = jnp.abs(position[:, None] - jnp.arange(bins))
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    far = (2 - distance) ** 3 / 6
    return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))


def _ssim(fixed, warped, mean):
    """Eq. 22 with the given mean: over all voxels, or over the window of each."""
    mean_f, mean_w = mean(fixed), mean(warped)
    variance_f = mean(fixed**2) - mean_f**2
    variance_w = mean(warped**2) - mean_w**2
    covariance = mean(fixed * warped) - mean_f * mean_w
    return ((2 * mean_f * mean_w + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_f**2 + mean_w**2 + SSIM_C1) * (variance_f + variance_w + SSIM_C2)
    )


def _gaussian_mean(values, width, mask):
    """Gaussian means of [b, x, y, z] over the voxels of the mask, where `values` is 0 outside it."""

    def smooth(array):
        return gaussian_filter(array[..., None], SSIM_SIGMA, width=width)[..., 0]

    # At a voxel of the mask the weight of the mask is over 0.01; elsewhere the result is not used.
    return smooth(values) if mask is None else smooth(values) / jnp.maximum(smooth(mask), 1e-3)


def _mean(values, mask):
    """Means over [b, x, y, z] within the mask: [b]; 0 where the mask is empty."""
    if mask is None:
        mean = jnp.mean(values, axis=(1, 2, 3))
        return mean_over_slabs(mean)
    total, count = jnp.sum(values * mask, axis=(1, 2, 3)), jnp.sum(mask, axis=(1, 2, 3))
    total, count = sum_over_slabs((total, count))
    return total / jnp.maximum(count, 1)


def _whole_shape(volume):
    """(x, y, z) of the whole volume of a slab [b, x, y, z, ...]."""
    return whole_width(volume.shape[1]), *volume.shape[2:4]


def _inside(values, margin):
    """1 for the voxels of a slab [b, x, y, z] that lie `margin` inside the whole volume along x, else 0."""
    width = values.shape[1]
    place = slab_start(width) + jnp.arange(width)
    inside = (place >= margin) & (place < whole_width(width) - margin)
    return jnp.broadcast_to(inside[:, None, None].astype(values.dtype), values.shape)


def _centred(values, mask):
    """Minus the mean of each image, and 0 outside the mask."""
    centred = values - _mean(values, mask)[:, None, None, None]
    return centred if mask is None else centred * mask


def _masked_images(fixed, warped, mask):
    """Images without their channel, 0 outside the mask, and the mask as 0 and 1: [b, x, y, z] each."""
    if fixed.ndim != 5 or fixed.shape[-1] != 1 or warped.shape != fixed.shape:
        raise ValueError(f"images must be [b, x, y, z, 1] on one grid, got {fixed.shape} and {warped.shape}")
    if mask is None:
        return fixed[..., 0], warped[..., 0], None
    if mask.shape != fixed.shape:
        raise ValueError(f"the mask must have the shape of the images, {fixed.shape}, got {mask.shape}")
    valid = mask[..., 0] > 0
    # Selected, not multiplied: padding may hold anything, NaN included.
    return jnp.where(valid, fixed[..., 0], 0), jnp.where(valid, warped[..., 0], 0), valid.astype(fixed.dtype)


def _check_displacement(displacement, mask):
    if displacement.ndim != 5 or displacement.shape[-1] != 3:
        raise ValueError(f"displacement must be [b, x, y, z, 3], got shape {displacement.shape}")
    if mask is not None and mask.shape != (*displacement.shape[:-1], 1):
        raise ValueError(f"the mask must be {(*displacement.shape[:-1], 1)}, got {mask.shape}")
