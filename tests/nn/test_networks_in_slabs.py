"""The networks on volumes in slabs against themselves on whole volumes, with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig, paper_model
from adregnet_jax.errors import UserError
from adregnet_jax.nn.layers import InstanceNorm
from adregnet_jax.nn.models import make_model
from adregnet_jax.nn.regional_attention import RegionalAttention, region_means
from tests.random_parameters import random_parameters
from tests.slabs import check_slabs, in_slabs

RNG = np.random.default_rng(0)


def volume(*shape):
    return jnp.asarray(RNG.random(shape, np.float32))


def check_module(module, *volumes, devices=4, rtol=1e-5, differentiable=(), rngs=None):
    parameters = jax.tree.map(jnp.asarray, random_parameters(module, *volumes))

    def function(*volumes):
        return module.apply({"params": parameters}, *volumes, rngs=rngs)

    check_slabs(function, devices, *volumes, rtol=rtol, differentiable=differentiable)


def test_instance_norm():
    check_module(InstanceNorm(), volume(2, 8, 3, 4, 2), differentiable=(0,), rtol=1e-4)


@pytest.mark.parametrize("region", [1, 3, 16])
def test_regions_that_slabs_cut(region):
    """Slabs of two voxels: regions within them, across them, and over the border of the volume."""
    features = volume(1, 8, 4, 5, 2)
    for blend in (True, False):
        module = RegionalAttention(ModelConfig(blend_regions=blend), region)
        check_module(module, features, differentiable=(0,))

    def means(features):
        return region_means(features, region).reshape(-1)

    check_slabs(means, 4, features, differentiable=(0,))


@pytest.mark.parametrize(
    "config",
    [
        # Exact attention at the coarsest level, where slabs are of one voxel, neighbours at the finest.
        ModelConfig(channels=(2, 4), global_attention_tokens=100, region_size=3, heads=2),
        paper_model(channels=(2, 4), global_attention_tokens=0, finest_level=1, dropout=0.5),
        ModelConfig(channels=(2, 4), stem_stride=2, region_size=4, global_attention_tokens=0),
        ModelConfig(channels=(2, 4), stem_stride=2, region_size=4, ascent_steps=2),
        ModelConfig(architecture="voxelmorph-1"),
    ],
    ids=["ours", "paper", "strided", "ascent", "voxelmorph"],
)
def test_network(config):
    n = 64 if config.architecture == "voxelmorph-1" else 8 * config.stem_stride
    shape = (1, n, 6, 5, 1)  # along y and z, any size
    rngs = {"dropout": jax.random.key(1)} if config.dropout else None
    # Matching compares features of many layers: rounding grows on the way.
    check_module(make_model(config), volume(*shape), volume(*shape), rtol=1e-4, rngs=rngs)


def test_width_that_does_not_split():
    model = make_model(ModelConfig(channels=(2, 4, 4)))
    images = volume(1, 12, 4, 4, 1), volume(1, 12, 4, 4, 1)

    def function(*volumes):
        return model.init(jax.random.key(0), *volumes)

    with pytest.raises(
        UserError, match=r"12 wide along x .* 2 devices .* multiple of 4 .* pad the scans to 16"
    ):
        in_slabs(function, 2, *images)
