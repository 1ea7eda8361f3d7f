"""MIND-SSC beside one voxel and one pair of patches after the other, and its laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.mind import mind_ssc

mind = jax.jit(mind_ssc, static_argnames=("radius", "dilation"))
OPPOSITE = 2.0  # times the dilation: how far opposite neighbours are apart


def oracle(volume, radius, dilation):
    """[x, y, z] -> [x, y, z, 12] in float64, pairs of neighbours in the order of their axes."""
    axes = [sign * unit for unit in np.eye(3, dtype=int) for sign in (-1, 1)]
    pairs = [(a, b) for a, b in itertools.combinations(axes, 2) if np.linalg.norm(a - b) < OPPOSITE]
    assert len(pairs) == 12

    def value(place):
        return volume[tuple(np.clip(place, 0, np.array(volume.shape) - 1))]

    differences = np.zeros((*volume.shape, 12))
    for place in itertools.product(*map(range, volume.shape)):
        for n, (a, b) in enumerate(pairs):
            at_a, at_b = (value(place + dilation * step) for step in (a, b))
            differences[(*place, n)] = (at_a - at_b) ** 2
    distances = np.zeros_like(differences)
    for place in itertools.product(*map(range, volume.shape)):  # patches end where the volume does
        patch = tuple(slice(max(0, p - radius), p + radius + 1) for p in place)
        distances[place] = differences[patch].mean(axis=(0, 1, 2))
    distances -= distances.min(axis=-1, keepdims=True)
    variance = distances.mean(axis=-1, keepdims=True)
    variance = np.clip(variance, 1e-3 * variance.mean(), 1e3 * variance.mean())
    return np.exp(-distances / variance)


@pytest.mark.parametrize(("radius", "dilation"), [(1, 2), (0, 1), (2, 1)])
def test_it_is_the_oracles(radius, dilation):
    volume = np.random.default_rng(0).random((2, 5, 4, 6, 1)).astype(np.float32)
    found = mind(volume, radius=radius, dilation=dilation)
    for ours, values in zip(found, volume[..., 0].astype(np.float64), strict=True):
        np.testing.assert_allclose(ours, oracle(values, radius, dilation), atol=1e-4)


def test_gain_offset_and_sign_do_not_count():
    volume = np.random.default_rng(1).random((1, 5, 6, 4, 1)).astype(np.float32)
    np.testing.assert_allclose(mind(volume), mind(3 - 2 * volume), atol=1e-3)


def test_gradients_of_a_constant_volume_are_numbers():
    volume = np.full((1, 6, 6, 6, 1), 0.3, np.float32)
    other = np.random.default_rng(0).random(volume.shape, np.float32)
    gradient = jax.grad(lambda v: jnp.sum((mind_ssc(v) - mind_ssc(other)) ** 2))(volume)
    assert np.isfinite(gradient).all()


def test_a_constant_volume_is_alike_everywhere():
    np.testing.assert_array_equal(mind(jnp.full((1, 4, 4, 4, 1), 0.3)), np.ones((1, 4, 4, 4, 12)))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(4, 4, 4, 1), (1, 4, 4, 4, 2), (1, 4, 4, 4, 0), (1, 1, 4, 4, 4, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="must be"):
        mind_ssc(jnp.zeros(shape))
