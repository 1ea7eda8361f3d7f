"""The training loss: the weighted sum of its terms, eq. 16-19."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from adregnet_jax.config import LossConfig
from adregnet_jax.losses.regularity import bending_energy_loss, jacobian_loss, smoothness_loss
from adregnet_jax.losses.similarity import mutual_information_loss, ncc_loss, ssd_loss, ssim_loss
from adregnet_jax.losses.supervision import dice_loss, field_loss, landmark_loss
from adregnet_jax.ops.arrays import AnyArray
from adregnet_jax.ops.mind import mind_ssc


def total_loss(
    batch: Mapping[str, Shaped[AnyArray, "b ..."]],
    displacement: Float[AnyArray, "b x y z 3"],
    warped: Float[AnyArray, "b x y z 1"],
    config: LossConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
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

    Examples:
      >>> image = jnp.linspace(0, 1, 64).reshape(1, 4, 4, 4, 1)
      >>> batch = {"fixed": image, "mask": jnp.ones_like(image), "spacing_mm": jnp.ones((1, 3))}
      >>> still, config = jnp.zeros((1, 4, 4, 4, 3)), LossConfig(ncc_window=0, landmark=0.0)
      >>> loss, terms = total_loss(batch, still, image, config)
      >>> round(float(loss), 3), sorted(terms)
      (0.0, ['jacobian', 'ncc', 'smoothness'])
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
