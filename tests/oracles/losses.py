"""The losses of one pair from their equations, in float64. Images and masks are [x, y, z]."""

import itertools

import numpy as np

from tests.oracles.filters import gaussian_weights, windowed_mean
from tests.oracles.jacobian import jacobian_determinant


def ncc(fixed, warped, mask):
    """Eq. 20."""
    f, w = fixed[mask > 0], warped[mask > 0]
    f, w = f - f.mean(), w - w.mean()
    return (f * w).sum() / np.sqrt((f**2).sum() * (w**2).sum())


def local_squared_ncc(fixed, warped, window, mask):
    """Mean over the mask of the squared NCC within cubic windows cut to the volume and the mask."""
    radius = window // 2
    scores = []
    for position in zip(*np.nonzero(mask), strict=True):
        cube = tuple(slice(max(p - radius, 0), p + radius + 1) for p in position)
        f, w = fixed[cube][mask[cube] > 0], warped[cube][mask[cube] > 0]
        f, w = f - f.mean(), w - w.mean()
        scores.append((f * w).sum() ** 2 / ((f**2).sum() * (w**2).sum() + 1e-5))
    return np.mean(scores)


def local_squared_ncc_by_warped(fixed, warped, window):
    """The derivative of the sum of the squared NCCs by each voxel of the warped image."""
    radius, derivative = window // 2, np.zeros(warped.shape)
    for position in np.ndindex(fixed.shape):
        cube = tuple(slice(max(p - radius, 0), p + radius + 1) for p in position)
        f, w = fixed[cube] - fixed[cube].mean(), warped[cube] - warped[cube].mean()
        covariance, product = (f * w).sum(), (f**2).sum() * (w**2).sum() + 1e-5
        derivative[cube] += 2 * covariance * f / product
        derivative[cube] -= 2 * (covariance / product) ** 2 * (f**2).sum() * w
    return derivative


def ssim(fixed, warped, mask):
    """Eq. 22 over one window."""
    f, w = fixed[mask > 0], warped[mask > 0]
    return _ssim(f.mean(), w.mean(), f.var(), w.var(), ((f - f.mean()) * (w - w.mean())).mean())


def local_ssim(fixed, warped, width, mask):
    """Mean over the voxels of the mask whose Gaussian window lies inside the volume."""

    def mean(values):
        return windowed_mean(values, gaussian_weights(1.5, width), mask)

    f, w = mean(fixed), mean(warped)
    covariance = mean(fixed * warped) - f * w
    scores = _ssim(f, w, mean(fixed**2) - f**2, mean(warped**2) - w**2, covariance)
    radius = width // 2
    inside = tuple(slice(radius, n - radius) for n in fixed.shape)
    return scores[inside][mask[inside] > 0].mean()


def _ssim(mean_f, mean_w, variance_f, variance_w, covariance):
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_f * mean_w + c1) / (mean_f**2 + mean_w**2 + c1)
    return luminance * (2 * covariance + c2) / (variance_f + variance_w + c2)


def smoothness(displacement, spacing_mm, mask):
    """Nine means of squared forward differences, in (mm/mm)^2, summed."""
    squares: dict[tuple[int, int], list[float]] = {(k, j): [] for k in range(3) for j in range(3)}
    for position in itertools.product(*map(range, mask.shape)):
        for j in range(3):
            following = tuple(p + (axis == j) for axis, p in enumerate(position))
            if following[j] < mask.shape[j] and mask[position] and mask[following]:
                for k in range(3):
                    difference = displacement[following][k] - displacement[position][k]
                    squares[k, j].append((difference * spacing_mm[k] / spacing_mm[j]) ** 2)
    return sum(np.mean(values) for values in squares.values())


def jacobian(displacement, mask):
    """Mean of what determinants lack to 0."""
    return np.maximum(-jacobian_determinant(displacement), 0)[mask > 0].mean()
