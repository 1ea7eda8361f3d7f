"""How regular a displacement is: smoothness, bending energy and folds, as losses."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from adregnet_jax.losses._masked import check_displacement, inside_along_x, masked_mean, whole_shape
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.jacobian import jacobian_determinant
from adregnet_jax.ops.slabs import halo, slab_count


def smoothness_loss(
    displacement: Float[AnyArray, "b x y z 3"],
    spacing_mm: Float[AnyArray, "#b 3"],
    *,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
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

    Examples:
      >>> stretch = 0.1 * jnp.stack(jnp.mgrid[:4, :4, :4], axis=-1)[None]  # by a tenth along each axis
      >>> round(float(smoothness_loss(stretch, jnp.ones((1, 3)))), 3)
      0.03
    """
    check_displacement(displacement, mask)
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
        total += jnp.mean(masked_mean(jnp.sum(difference**2, axis=-1), both))
    return total


def bending_energy_loss(
    displacement: Float[AnyArray, "b x y z 3"], spacing_mm: Float[AnyArray, "#b 3"]
) -> Float[Array, ""]:
    """Squared second derivatives of the displacement, in 1/mm^2: no affine map costs anything.

    The sum over components and pairs of axes, the mixed ones twice, each a mean over the voxels inside.

    Args:
      displacement: [b, x, y, z, 3] in voxels, three voxels or more along each axis.
      spacing_mm: [b, 3].

    Returns:
      Scalar.

    Raises:
      ValueError: wrong shapes.

    Examples:
      >>> affine = jnp.stack(jnp.mgrid[:4, :4, :4], axis=-1)[None].astype(float)
      >>> float(bending_energy_loss(affine, jnp.ones((1, 3))))
      0.0
      >>> float(bending_energy_loss(affine**2, jnp.ones((1, 3))))  # (d2/dx2 x^2)^2 along each axis
      12.0

    Reference:
      Rueckert et al., Nonrigid registration using free-form deformations, IEEE TMI 1999.
    """
    check_displacement(displacement, None)
    if min(whole_shape(displacement)) < 3 or spacing_mm.shape != (displacement.shape[0], 3):
        raise ValueError(
            "bending needs three voxels along each axis and a spacing_mm of [b, 3], "
            f"got {displacement.shape} and {spacing_mm.shape}"
        )
    spacing_mm = spacing_mm[:, None, None, None, :]
    displacement_mm = displacement * spacing_mm
    inside = None
    if slab_count() > 1:
        inside = inside_along_x(displacement[..., 0], 1)[:, :, 1:-1, 1:-1]
        displacement_mm = halo(displacement_mm, 1, 1)

    def moved(steps: np.ndarray) -> AnyArray:
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
        total += (1 if j == k else 2) * jnp.mean(masked_mean(jnp.sum(second**2, axis=-1), inside))
    return total


def jacobian_loss(
    displacement: Float[AnyArray, "b x y z 3"],
    *,
    least: float = 0.0,
    mask: Shaped[AnyArray, "b x y z 1"] | None = None,
) -> Float[Array, ""]:
    """Mean of max(0, least - det(I + du/dp)) over voxels; with 0, the L_jac of eq. 18: only folds cost.

    Args:
      displacement: [b, x, y, z, 3] in voxels.
      least: the determinant below which a voxel costs as much as it falls short; above 0, nearly collapsed
        voxels cost as well.
      mask: [b, x, y, z, 1] or None.

    Returns:
      Scalar.

    Raises:
      ValueError: wrong shapes.

    Examples:
      >>> mirror = jnp.zeros((1, 4, 4, 4, 3)).at[..., 0].set(-2 * jnp.arange(4.0)[None, :, None, None])
      >>> float(jacobian_loss(mirror)), float(jacobian_loss(0.4 * mirror))
      (1.0, 0.0)
    """
    check_displacement(displacement, mask)
    short = jax.nn.relu(least - jacobian_determinant(displacement))
    valid = None if mask is None else (mask[..., 0] > 0).astype(short.dtype)
    return jnp.mean(masked_mean(short, valid))
