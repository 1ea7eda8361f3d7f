"""The terms of the training loss, eq. 16-19: pure functions of batches, each of which returns a scalar.

Images and masks are [b, x, y, z, 1], with intensities of about [0, 1]; a mask is 1 in the scan and 0 in
padding. A term that takes a mask ignores the voxels outside it, whatever the images hold there. Bending
energy, landmarks and Dice take no mask, and MIND computes its features before it applies the mask. Each term
is the mean of its values for the pairs of the batch, and stays finite, with finite gradients, on constant
images and empty masks.
"""

from adregnet_jax.losses.regularity import bending_energy_loss, jacobian_loss, smoothness_loss
from adregnet_jax.losses.similarity import mutual_information_loss, ncc_loss, ssd_loss, ssim_loss
from adregnet_jax.losses.supervision import dice_loss, field_loss, landmark_loss
from adregnet_jax.losses.total import total_loss

__all__ = [
    "bending_energy_loss",
    "dice_loss",
    "field_loss",
    "jacobian_loss",
    "landmark_loss",
    "mutual_information_loss",
    "ncc_loss",
    "smoothness_loss",
    "ssd_loss",
    "ssim_loss",
    "total_loss",
]
