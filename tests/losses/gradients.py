"""Gradients of losses against finite differences."""

import numpy as np


def assert_gradient_is_the_slope(value_and_gradient, array, step=1e-2):
    """The gradient along one direction against the central difference of the values."""
    _, gradient = value_and_gradient(array)
    # Half random, half uphill: along a random direction alone the slope drowns in float32 rounding.
    direction = np.random.default_rng(2).normal(size=array.shape) + gradient / np.std(gradient)
    direction = direction.astype(np.float32)
    above, _ = value_and_gradient(array + step * direction)
    below, _ = value_and_gradient(array - step * direction)
    np.testing.assert_allclose(np.sum(gradient * direction), (above - below) / (2 * step), rtol=1e-2)
