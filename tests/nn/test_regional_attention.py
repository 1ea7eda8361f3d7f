import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig, paper_model
from adregnet_jax.nn.regional_attention import RegionalAttention, region_means
from tests.oracles import network as oracle
from tests.random_parameters import random_parameters


def random_features(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.usefixtures("both_forms")
# Regions that divide the map, that don't, of one voxel, and larger than the map.
@pytest.mark.parametrize(
    ("shape", "region"),
    [((4, 2, 6), 2), ((5, 3, 4), 2), ((2, 3, 1), 1), ((2, 3, 4), 8)],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_regional_attention_equals_the_oracle(shape, region, scaled):
    config = paper_model(scale_region_weights=scaled)
    features = random_features(2, *shape, 3)
    module = RegionalAttention(config, region)
    params = random_parameters(module, features)
    results = jax.jit(module.apply)({"params": params}, features)
    for b in range(2):
        expected = oracle.regional_attention(params, features[b].astype(np.float64), region, config)
        for ours, slow in zip(results, expected, strict=True):
            np.testing.assert_allclose(ours[b], slow, atol=1e-5)


def test_blended_weights_are_those_of_the_regions_at_their_centres():
    features = random_features(1, 9, 9, 9, 2)
    stepped, blended = (
        RegionalAttention(config, 3) for config in (paper_model(), paper_model(blend_regions=True))
    )
    params = random_parameters(stepped, features)
    _, steps = jax.jit(stepped.apply)({"params": params}, features)
    _, mask = jax.jit(blended.apply)({"params": params}, features)
    centres = (0, slice(1, None, 3), slice(1, None, 3), slice(1, None, 3), 0)
    np.testing.assert_allclose(mask[centres], steps[centres], atol=1e-6)
    # Halfway between the centres of two regions lies no voxel; a third of the way there is one.
    a, b = steps[0, 1, 1, 1, 0], steps[0, 4, 1, 1, 0]
    np.testing.assert_allclose(mask[0, 2, 1, 1, 0], (2 * a + b) / 3, atol=1e-6)


def test_scaled_weights_leave_features_as_they_are_when_regions_count_alike():
    features = random_features(1, 5, 4, 4, 2)
    module = RegionalAttention(ModelConfig(), 2)
    params = random_parameters(module, features)
    params["score"]["kernel"] = np.zeros_like(params["score"]["kernel"])
    weighted, mask = jax.jit(module.apply)({"params": params}, features)
    np.testing.assert_allclose(weighted, features, rtol=1e-5)
    np.testing.assert_allclose(mask, np.full((1, 5, 4, 4, 1), oracle.sigmoid(params["mask_bias"])), rtol=1e-5)


def test_means_of_partial_regions_count_their_own_voxels():
    means = region_means(jnp.ones((1, 5, 4, 3, 2)), 2)
    np.testing.assert_allclose(means, np.ones((1, 3, 2, 2, 2)), rtol=1e-6)
