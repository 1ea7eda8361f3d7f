"""Windowed sums and means, one voxel after the other."""

import itertools

import numpy as np


def windowed_mean(volume, weights, mask=None):
    """Mean of [x, y, z] under a cube of weights, over the voxels inside the volume and the mask."""
    mask = np.ones(volume.shape) if mask is None else mask
    radius, width = weights.shape[0] // 2, weights.shape[0]
    padded_volume, padded_mask = np.pad(volume * mask, radius), np.pad(mask, radius)
    mean = np.zeros(volume.shape)
    for x, y, z in itertools.product(*map(range, volume.shape)):
        window = slice(x, x + width), slice(y, y + width), slice(z, z + width)
        count = (weights * padded_mask[window]).sum()
        mean[x, y, z] = (weights * padded_volume[window]).sum() / count if count else 0.0
    return mean


def gaussian_weights(sigma, width):
    """Cube of weights that sum to 1."""
    squared = (np.arange(width) - width // 2) ** 2
    distance_squared = squared[:, None, None] + squared[:, None] + squared
    weights = np.exp(-distance_squared / (2 * sigma**2))
    return weights / weights.sum()
