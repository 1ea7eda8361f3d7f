"""Instance norm: against its definition and autodiff of it, in one chunk and in several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.normalisation import instance_norm

pytestmark = pytest.mark.usefixtures("both_forms")


def by_definition(volume, scale, offset, negative_slope):
    mean = volume.mean(axis=(1, 2, 3), keepdims=True)
    variance = ((volume - mean) ** 2).mean(axis=(1, 2, 3), keepdims=True)
    normalised = (volume - mean) / jnp.sqrt(variance + 1e-5)
    result = (
        normalised * jnp.asarray(scale)[None, None, None, None] + jnp.asarray(offset)[None, None, None, None]
    )
    return jnp.where(result >= 0, result, negative_slope * result)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    volume = 100 + 3 * rng.standard_normal((2, 6, 5, 4, 3)).astype(np.float32)
    return volume, rng.random(3, np.float32) + 0.5, rng.standard_normal(3).astype(np.float32)


@pytest.mark.parametrize("chunk_bytes", [2**26, 1], ids=["one chunk", "a chunk a slice"])
@pytest.mark.parametrize("negative_slope", [1.0, 0.2])
def test_values_and_gradients(arrays, negative_slope, chunk_bytes):
    cotangent = np.random.default_rng(1).standard_normal(arrays[0].shape)
    with budget.override(instance_norm=chunk_bytes):
        normalise = functools.partial(instance_norm, negative_slope=negative_slope)
        result, pull_back = jax.vjp(normalise, *map(jnp.asarray, arrays))
        gradients = pull_back(jnp.asarray(cotangent, jnp.float32))
    # The definition in float64, from which float32 around 100 with SD 3 is some 1e-5 away.
    with jax.enable_x64(True):
        doubles = [jnp.asarray(a, jnp.float64) for a in arrays]
        expected, expected_pull_back = jax.vjp(
            functools.partial(by_definition, negative_slope=negative_slope), *doubles
        )
        expected_gradients = expected_pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(result, expected, atol=1e-4)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_statistics_of_many_voxels_are_as_exact_as_the_numbers():
    # Squares that are added up one after the other in float32 are off by 7e-5 here.
    volume = 1 + np.random.default_rng(0).standard_normal((1, 64, 64, 64, 2)).astype(np.float32)
    result = instance_norm(jnp.asarray(volume), jnp.ones(2), jnp.zeros(2))
    expected = by_definition(volume.astype(np.float64), np.ones(2), np.zeros(2), 1.0)
    np.testing.assert_allclose(result, expected, atol=5e-6)


def test_bfloat16_volume_has_float32_statistics(arrays):
    volume, scale, offset = arrays
    volume = jnp.asarray(volume, jnp.bfloat16)
    result = instance_norm(volume, scale, offset, negative_slope=0.2)
    assert result.dtype == jnp.bfloat16
    expected = by_definition(volume.astype(jnp.float32), scale, offset, 0.2)
    np.testing.assert_allclose(result.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)


def test_constant_volume_gives_the_offset(arrays):
    _, scale, offset = arrays
    value, pull_back = jax.vjp(lambda v: instance_norm(v, scale, offset), jnp.full((1, 4, 4, 4, 3), 7.0))
    np.testing.assert_allclose(value, np.broadcast_to(offset, value.shape), atol=1e-5)
    assert np.isfinite(pull_back(jnp.ones_like(value))[0]).all()
