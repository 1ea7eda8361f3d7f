"""Squared normalised cross-correlation in windows, and how it changes with the displacement."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.cpu.budget import traces_for_cpu
from adregnet_jax.ops.filters import box_sum, window_counts
from adregnet_jax.ops.sampling import warp


def local_squared_ncc(
    fixed: Float[AnyArray, "b x y z"],
    warped: Float[AnyArray, "b x y z"],
    window: int,
    *,
    least_variances: tuple[Float[AnyArray, " b"], Float[AnyArray, " b"]] | None = None,
    mask: Float[AnyArray, "b x y z"] | None = None,
) -> Float[Array, "b x y z"]:
    """The squared NCC of two images in the window around each voxel, 0 to 1; 0 where one of them is flat.

    Args:
      fixed: [b, x, y, z], of means near 0: the NCC is blind to them, but float32 loses digits by them.
      warped: the same shape.
      window: width of the cubic windows, an odd number of voxels. What a window holds beyond the border does
        not count.
      least_variances: [b] of each image, which are added to those in the windows: where they are far above
        the variance in a window, its NCC fades to 0. Their gradient isn't taken. None: next to nothing.
      mask: [b, x, y, z] or None; with it, both images must be 0 where it is 0, which does not count.

    Returns:
      [b, x, y, z].
    """

    if mask is None:
        count = window_counts(fixed.shape[1:], window)[None]
    else:
        count = jnp.maximum(_window_sum(mask, window), 1)
    sums = _five_sums(fixed, warped, window)
    fixed_sum, warped_sum = next(sums), next(sums)
    covariance = next(sums) - fixed_sum * warped_sum / count
    # Rounding can take the variance of a flat window below 0.
    fixed_variance = jnp.maximum(next(sums) - fixed_sum**2 / count, 0)
    warped_variance = jnp.maximum(next(sums) - warped_sum**2 / count, 0)
    if least_variances is not None:
        fixed_least, warped_least = (
            jax.lax.stop_gradient(least)[:, None, None, None] * count for least in least_variances
        )
        fixed_variance, warped_variance = fixed_variance + fixed_least, warped_variance + warped_least
    # VoxelMorph's addend, as there on sums, not means, over the window: flat windows give 0.
    return covariance**2 / (fixed_variance * warped_variance + 1e-5)


def _five_sums(fixed: AnyArray, warped: AnyArray, window: int) -> Iterator[Array]:
    """Sums in windows of both images, of their product and of both squares, each made when it is needed."""
    if traces_for_cpu():
        yield _window_sum(fixed, window)
        yield _window_sum(warped, window)
        yield _window_sum(fixed * warped, window)
        yield _window_sum(fixed**2, window)
        yield _window_sum(warped**2, window)
        return
    # As channels of two volumes, in fewer kernels. Only those of the second one have gradients by the
    # displacement.
    still = box_sum(jnp.stack([fixed, fixed**2], axis=-1), window)
    moved = box_sum(jnp.stack([warped, fixed * warped, warped**2], axis=-1), window)
    yield from (still[..., 0], moved[..., 0], moved[..., 1], still[..., 1], moved[..., 2])


def _window_sum(volume: AnyArray, window: int) -> Array:
    return box_sum(volume[..., None], window)[..., 0]


def ncc_ascent(
    fixed: Float[AnyArray, "b x y z 1"],
    moving: Float[AnyArray, "b x y z 1"],
    displacement: Float[AnyArray, "b x y z 3"],
    window: int,
) -> Float[Array, "b x y z 3"]:
    """Where each voxel would have to go for the images to become more alike.

    The gradient of the sum over all voxels of `local_squared_ncc(fixed, warp(moving, displacement))` by the
    displacement: blind to gain and offset of either image, and to the size of the volume.

    Args:
      fixed: [b, x, y, z, 1], of a mean near 0.
      moving: [b, x, y, z, 1], of a mean near 0.
      displacement: [b, x, y, z, 3] in voxels.
      window: as for `local_squared_ncc`.

    Returns:
      [b, x, y, z, 3], 1/voxel.
    """

    def similarity(displacement: AnyArray) -> Array:
        warped = warp(moving, displacement)
        return jnp.sum(local_squared_ncc(fixed[..., 0], warped[..., 0], window))

    return jax.grad(similarity)(displacement)
