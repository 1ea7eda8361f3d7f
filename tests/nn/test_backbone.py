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


def test_dropout_is_of_the_decoder_and_goes_on_to_the_finer_level():
    images = np.random.default_rng(1).random((2, 4, 4, 6, 1), np.float32)
    backbone = Backbone((6, 8), dropout=0.5)
    params = random_parameters(backbone, images)
    run = jax.jit(backbone.apply)
    coarse, fine = run({"params": params}, images, rngs={"dropout": jax.random.key(3)})
    whole, _ = run({"params": params}, images)
    kept_coarse, kept_fine = (np.asarray(f[0, 0, 0, 0]) != 0 for f in (coarse, fine))
    assert 0 < kept_coarse.sum() < 8 and 0 < kept_fine.sum() < 6
    np.testing.assert_allclose(coarse, np.where(kept_coarse, 2 * whole, 0), rtol=1e-5)
    for image, below, ours in zip(images, coarse, fine, strict=True):
        encoded = oracle.conv_block(params["encoder_0_a"], image.astype(np.float64))
        encoded = oracle.conv_block(params["encoder_0_b"], encoded)
        features = oracle.upsample(params["up_0"], np.asarray(below, np.float64))
        features = np.concatenate([features, encoded], axis=-1)
        for name in ("decoder_0_a", "decoder_0_b"):
            features = oracle.conv_block(params[name], features)
        np.testing.assert_allclose(ours, np.where(kept_fine, 2 * features, 0), atol=1e-4)
