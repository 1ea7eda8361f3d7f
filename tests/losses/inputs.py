"""The grid and the landmarks of the tests of losses."""

import numpy as np

SHAPE = (7, 8, 9)
SPACING_MM = np.array([[1.0, 2.0, 3.0], [0.5, 0.5, 2.5]], np.float32)


def landmarks():
    """Fixed and moving points [b, n, 3] in voxels, and which exist: two of one pair, one of the other."""
    fixed = np.array([[[2, 3, 4], [1, 1, 1], [0, 0, 0]], [[5.5, 2, 3], [0, 0, 0], [0, 0, 0]]], np.float32)
    moving = fixed + np.array([1, -2, 0.5], np.float32)
    return fixed, moving, np.array([[1, 1, 0], [1, 0, 0]], np.float32)
