"""How alike two images are: NCC, SSIM, SSD and mutual information, as losses."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from adregnet_jax.losses._masked import inside_along_x, masked_mean, whole_shape
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.filters import gaussian_filter
from adregnet_jax.ops.ncc import local_squared_ncc
from adregnet_jax.ops.slabs import slab_count, sum_over_slabs

SSIM_C1 = 0.01**2  # the constants of SSIM for intensities of range 1
SSIM_C2 = 0.03**2
SSIM_SIGMA = 1.5  # voxels, SD of the local Gaussian windows


def ncc_loss(
    fixed: Float[AnyArray, "b x y z 1"],
    warped: Float[AnyArray, "b x y z 1"],
    *,
    window: int = 0,
    floor: float = 0.0,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
    """1 - NCC (eq. 17): global (eq. 20), or the mean of the squared NCC in windows around each voxel.

    Both are blind to gain and offset of either image; the local one also where these change slowly. A
    constant image has no correlation: its NCC counts as 0.

    Args:
      fixed: [b, x, y, z, 1].
      warped: [b, x, y, z, 1], the moving image on the grid of the fixed one.
      window: 0 for the global NCC; else the width of cubic windows, an odd number of voxels. What a window
        holds beyond the border or outside the mask does not count.
      floor: with windows, the contrast (SD) below which their NCC fades to 0, as a share of the contrast of
        the whole image: what is nearly flat, such as air, is noise.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar: 0 to 2 (global) or 0 to 1 (local).

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1].

    Examples:
      >>> fixed = jnp.linspace(0, 1, 8).reshape(1, 2, 2, 2, 1)
      >>> bool(abs(ncc_loss(fixed, 0.5 * fixed + 0.1)) < 1e-5)
      True
      >>> round(float(ncc_loss(fixed, 1 - fixed)), 3)
      2.0

    Reference:
      Balakrishnan et al., VoxelMorph, IEEE TMI 2019 (local NCC).
    """
    fixed, warped, mask = _masked_images(fixed, warped, mask)
    # The local NCC does not depend on the means; without them float32 keeps its digits.
    fixed = _centred(fixed, mask)
    warped = _centred(warped, mask)
    if window:
        least = None
        if floor:
            least = (floor**2 * masked_mean(fixed**2, mask), floor**2 * masked_mean(warped**2, mask))
        squared = local_squared_ncc(fixed, warped, window, least_variances=least, mask=mask)
        return jnp.mean(1 - masked_mean(squared, mask))
    covariance = masked_mean(fixed * warped, mask)
    variances = masked_mean(fixed**2, mask) * masked_mean(warped**2, mask)
    # eq. 20. The addend is the product of the variances of two images of SD 0.003: noise has no correlation.
    return jnp.mean(1 - covariance / jnp.sqrt(variances + 1e-10))


def ssim_loss(
    fixed: Float[AnyArray, "b x y z 1"],
    warped: Float[AnyArray, "b x y z 1"],
    *,
    window: int = 0,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
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

    Examples:
      >>> fixed = jnp.linspace(0, 1, 8).reshape(1, 2, 2, 2, 1)
      >>> round(float(ssim_loss(fixed, fixed)), 3), round(float(ssim_loss(fixed, 0.5 * fixed)), 3)
      (0.0, 0.359)

    Reference:
      Wang et al., Image quality assessment, IEEE TIP 2004.
    """
    fixed, warped, mask = _masked_images(fixed, warped, mask)
    if window:
        whole = whole_shape(fixed)
        if min(whole) < window:
            raise ValueError(f"a volume of {whole} is smaller than SSIM windows of {window} voxels")
        ssim = _ssim(fixed, warped, lambda values: _gaussian_mean(values, window, mask))
        r = window // 2
        if slab_count() > 1:
            mask = inside_along_x(fixed, r) * (1 if mask is None else mask)
        along_x = slice(r, whole[0] - r) if slab_count() == 1 else slice(None)
        inside = (slice(None), along_x, *(slice(r, n - r) for n in whole[1:]))
        return jnp.mean(1 - masked_mean(ssim[inside], None if mask is None else mask[inside]))
    return jnp.mean(1 - _ssim(fixed, warped, lambda values: masked_mean(values, mask)))


def ssd_loss(
    fixed: Float[AnyArray, "b x y z c"],
    warped: Float[AnyArray, "b x y z c"],
    *,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
    """Mean squared difference, for scans whose intensities mean the same, or for maps of features.

    Args:
      fixed: [b, x, y, z, c].
      warped: [b, x, y, z, c], on the grid of the fixed one.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar: a sum over channels, a mean over voxels and pairs.

    Raises:
      ValueError: shapes that differ.

    Examples:
      >>> fixed = jnp.zeros((1, 2, 2, 2, 1))
      >>> float(ssd_loss(fixed, fixed + 0.5))
      0.25
    """
    if fixed.ndim != 5 or warped.shape != fixed.shape:
        raise ValueError(f"both must be [b, x, y, z, c] on one grid, got {fixed.shape} and {warped.shape}")
    difference = fixed - warped
    if mask is None:
        return jnp.mean(masked_mean(jnp.sum(difference**2, axis=-1), None))
    # What is no number outside the mask would come back through the gradient of its square.
    difference = jnp.where(mask > 0, difference, 0)
    valid = (mask[..., 0] > 0).astype(fixed.dtype)
    return jnp.mean(masked_mean(jnp.sum(difference**2, axis=-1), valid))


def mutual_information_loss(
    fixed: Float[AnyArray, "b x y z 1"],
    warped: Float[AnyArray, "b x y z 1"],
    *,
    bins: int = 32,
    normalised: bool = False,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
    """Minus the mutual information of the intensities, in nats: for scans of different contrast.

    The joint histogram has cubic B-splines for Parzen windows in both directions, which makes it smooth in
    the intensities. It is made block by block: memory does not grow with voxels times bins.

    Args:
      fixed: [b, x, y, z, 1], intensities in [0, 1]; beyond, they count as 0 or 1.
      warped: [b, x, y, z, 1], on the grid of the fixed one.
      bins: of each intensity.
      normalised: divide by the joint entropy, which depends less on how much the scans overlap.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar, 0 or less, normalised also -1 or more; an empty mask gives 0.

    Raises:
      ValueError: shapes that differ or are not [b, x, y, z, 1], or fewer than 5 bins.

    Examples:
      >>> fixed = jnp.linspace(0, 1, 64).reshape(1, 4, 4, 4, 1)
      >>> inverted, constant = 1 - fixed, jnp.ones_like(fixed)
      >>> bool(mutual_information_loss(fixed, inverted) < mutual_information_loss(fixed, constant))
      True

    Reference:
      Mattes et al., PET-CT image registration in the chest using free-form deformations, IEEE TMI 2003;
      Studholme et al., An overlap invariant entropy measure of 3D medical image alignment, Pattern
      Recognition 1999 (normalised: their measure minus 1).
    """
    if bins < 5:
        raise ValueError(f"a histogram with cubic windows has 5 bins or more, got {bins}")
    fixed, warped, mask = _masked_images(fixed, warped, mask)
    weights = jnp.ones_like(fixed) if mask is None else mask

    def information(fixed: AnyArray, warped: AnyArray, weights: AnyArray) -> Array:
        joint = _joint_histogram(fixed.ravel(), warped.ravel(), weights.ravel(), bins)
        joint = sum_over_slabs(joint)
        joint = joint / jnp.maximum(jnp.sum(joint), 1e-6)
        independent = jnp.sum(joint, axis=0, keepdims=True) * jnp.sum(joint, axis=1, keepdims=True)
        tiny = 1e-12  # of a probability: p log p is 0 there
        shared = jnp.sum(joint * (jnp.log(joint + tiny) - jnp.log(independent + tiny)))
        if not normalised:
            return shared
        return shared / jnp.maximum(-jnp.sum(joint * jnp.log(joint + tiny)), 1e-6)

    return -jnp.mean(jax.vmap(information)(fixed, warped, weights))


def _joint_histogram(
    fixed: AnyArray, warped: AnyArray, weights: AnyArray, bins: int, block: int = 1 << 15
) -> Array:
    """[bins, bins]: weighted counts of pairs of intensities [n]."""
    block = min(block, max(len(fixed), 1))
    short = -len(fixed) % block
    # What fills the last block has no weight.
    blocks = [jnp.pad(values, (0, short)).reshape(-1, block) for values in (fixed, warped, weights)]

    @jax.checkpoint  # the gradient makes a block's windows again, where it would keep those of all
    def count(joint: Array, values: list[Array]) -> tuple[Array, None]:
        fixed, warped, weights = values
        windows = _parzen_windows(fixed, bins) * weights[:, None]
        both = jnp.matmul(windows.T, _parzen_windows(warped, bins), precision="highest")
        return joint + both, None

    return jax.lax.scan(count, jnp.zeros((bins, bins)), blocks)[0]


def _parzen_windows(intensities: AnyArray, bins: int) -> Array:
    """[n, bins]: what each intensity gives to each bin, cubic B-splines that sum to 1."""
    # The outermost bins take the tails of 0 and 1.
    position = 1 + jnp.clip(intensities, 0, 1) * (bins - 3)
    distance = jnp.abs(position[:, None] - jnp.arange(bins)[None])
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    far = (2 - distance) ** 3 / 6
    return jnp.where(distance < 1, near, jnp.where(distance < 2, far, 0))


def _ssim(fixed: AnyArray, warped: AnyArray, mean: Callable[[AnyArray], Array]) -> Array:
    """Eq. 22 with the given mean: over all voxels, or over the window of each."""
    mean_f, mean_w = mean(fixed), mean(warped)
    variance_f = mean(fixed**2) - mean_f**2
    variance_w = mean(warped**2) - mean_w**2
    covariance = mean(fixed * warped) - mean_f * mean_w
    return ((2 * mean_f * mean_w + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_f**2 + mean_w**2 + SSIM_C1) * (variance_f + variance_w + SSIM_C2)
    )


def _gaussian_mean(values: AnyArray, width: int, mask: AnyArray | None) -> Array:
    """Gaussian means of [b, x, y, z] over the voxels of the mask, where `values` is 0 outside it."""

    def smooth(array: AnyArray) -> Array:
        return gaussian_filter(array[..., None], SSIM_SIGMA, width=width)[..., 0]

    # At a voxel of the mask the weight of the mask is over 0.01; elsewhere the result is not used.
    return smooth(values) if mask is None else smooth(values) / jnp.maximum(smooth(mask), 1e-3)


def _centred(values: AnyArray, mask: AnyArray | None) -> AnyArray:
    """Minus the mean of each image, and 0 outside the mask."""
    centred = values - masked_mean(values, mask)[:, None, None, None]
    return centred if mask is None else centred * mask


def _masked_images(
    fixed: AnyArray, warped: AnyArray, mask: AnyArray | None
) -> tuple[AnyArray, AnyArray, AnyArray | None]:
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
