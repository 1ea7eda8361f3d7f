import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.backbone import Backbone
from tests.oracles import network as oracle
from tests.random_parameters import random_parameters


@pytest.mark.parametrize("finest_level", [0, 1])
def test_backbone_equals_the_oracle(finest_level):
    config = ModelConfig(channels=(2, 3), finest_level=finest_level)
    backbone = Backbone(config.channels, finest_level)
    images = np.random.default_rng(1).random((2, 6, 4, 8, 1), np.float32)
    params = random_parameters(backbone, images)
    decoded = jax.jit(backbone.apply)({"params": params}, images)
    for b, image in enumerate(images):
        expected = oracle.backbone(params, image.astype(np.float64), config)
        for features, slow in zip(decoded, expected, strict=True):
            np.testing.assert_allclose(features[b], slow, atol=1e-4)


def test_shapes_of_the_five_levels_of_the_paper():
    backbone = Backbone(ModelConfig().channels)
    image = jax.ShapeDtypeStruct((1, 32, 48, 16, 1), jnp.float32)
    decoded, _ = jax.eval_shape(backbone.init_with_output, jax.random.key(0), image)
    assert [features.shape for features in decoded] == [
        (1, 2, 3, 1, 512),
        (1, 4, 6, 2, 256),
        (1, 8, 12, 4, 128),
        (1, 16, 24, 8, 64),
        (1, 32, 48, 16, 32),
    ]
