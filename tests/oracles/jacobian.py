"""Derivatives and determinants, one voxel after the other."""

import itertools

import numpy as np


def derivative(array, position, axis):
    """d array / d axis at one voxel: central inside, one-sided on the border."""
    lower, upper = list(position), list(position)
    lower[axis] = max(position[axis] - 1, 0)
    upper[axis] = min(position[axis] + 1, array.shape[axis] - 1)
    return (array[tuple(upper)] - array[tuple(lower)]) / (upper[axis] - lower[axis])


def jacobian_determinant(displacement):
    """det(I + du/dp) of [x, y, z, 3]."""
    determinant = np.zeros(displacement.shape[:3])
    for position in itertools.product(*map(range, determinant.shape)):
        matrix = np.eye(3)
        for j in range(3):
            matrix[:, j] += derivative(displacement, position, j)
        determinant[position] = np.linalg.det(matrix)
    return determinant
