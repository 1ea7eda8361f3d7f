"""Pairs of images and displacements for the tests of all losses."""

import numpy as np
import pytest

from tests.losses.inputs import SHAPE


@pytest.fixture(scope="module")
def images():
    """Two pairs of related images, and a mask that leaves out two faces."""
    rng = np.random.default_rng(0)
    fixed = rng.random((2, *SHAPE, 1)).astype(np.float32)
    warped = (0.6 * fixed + 0.4 * rng.random(fixed.shape)).astype(np.float32)
    mask = np.ones_like(fixed)
    mask[:, :2] = 0
    mask[1, :, :, -1:] = 0
    return fixed, warped, mask


@pytest.fixture(scope="module")
def displacement():
    return np.random.default_rng(1).normal(scale=0.7, size=(2, *SHAPE, 3)).astype(np.float32)
