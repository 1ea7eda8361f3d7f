from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.adregnet import AdRegNet
from adregnet_jax.nn.models import make_model
from adregnet_jax.nn.voxelmorph import ConvLayer, VoxelMorph
from tests.random_parameters import random_parameters

SMALL = VoxelMorph(encoder=(2, 3, 4, 5), decoder=(6, 5, 4, 3, 2, 3, 4))  # no two layers alike
ONE = ModelConfig(architecture="voxelmorph-1")
TWO = ModelConfig(architecture="voxelmorph-2")


def random_pair(*shape, batch=2):
    rng = np.random.default_rng(0)
    return [rng.random((batch, *shape, 1), np.float32) for _ in range(2)]


def abstract_prediction(model, shape):
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), image, image)


def convolution(params, volume, stride=1):
    layout = ("NDHWC", "DHWIO", "NDHWC")
    result = jax.lax.conv_general_dilated(
        volume, params["kernel"], (stride,) * 3, ((1, 1),) * 3, dimension_numbers=layout
    )
    return result + params["bias"][None, None, None, None]


def slow_network(params, moving, fixed):
    """The authors' `unet_core` line by line, in XLA's own convolutions."""

    def layer(name, volume, stride=1):
        return jax.nn.leaky_relu(convolution(params[name]["conv"], volume, stride), 0.2)

    def up(volume, skip):
        for axis in (1, 2, 3):
            volume = jnp.repeat(volume, 2, axis)
        return jnp.concatenate([volume, skip], axis=-1)

    images = jnp.concatenate([moving, fixed], axis=-1)
    half = layer("encoder_0", images, 2)
    quarter = layer("encoder_1", half, 2)
    eighth = layer("encoder_2", quarter, 2)
    volume = layer("encoder_3", eighth, 2)
    volume = up(layer("decoder_0", volume), eighth)
    volume = up(layer("decoder_1", volume), quarter)
    volume = up(layer("decoder_2", volume), half)
    volume = layer("decoder_4", layer("decoder_3", volume))
    volume = layer("decoder_5", up(volume, images))
    return convolution(params["flow"], layer("decoder_6", volume))


def test_network_is_the_published_one_and_odd_sizes_are_padded_by_their_border():
    fixed, moving = random_pair(13, 16, 11)
    params = random_parameters(SMALL, fixed, moving)
    prediction = jax.jit(SMALL.apply)({"params": params}, fixed, moving)
    padding = [(0, 0), (0, 3), (0, 0), (0, 5), (0, 0)]
    padded = [np.pad(image, padding, mode="edge") for image in (moving, fixed)]
    expected = jax.jit(slow_network)(params, *padded)[:, :13, :, :11]
    assert np.abs(expected).mean() > 0.1  # voxels: there is something to compare
    np.testing.assert_allclose(prediction.displacement, expected, atol=1e-5)
    np.testing.assert_array_equal(prediction.pyramid, prediction.displacement[None])
    assert prediction.match_entropy == ()


def test_stride_2_is_the_strided_convolution_of_xla():
    volume = np.random.default_rng(1).normal(size=(2, 4, 5, 6, 2)).astype(np.float32)
    layer = ConvLayer(3, stride=2)
    params = random_parameters(layer, volume)
    result = jax.jit(layer.apply)({"params": params}, volume)
    expected = jax.nn.leaky_relu(convolution(params["conv"], volume, stride=2), 0.2)
    assert result.shape == (2, 2, 3, 3, 3)
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(("config", "total"), [(ONE, 259_675), (TWO, 300_547)])
def test_parameters_are_those_of_the_published_channels(config, total):
    prediction, variables = abstract_prediction(make_model(config), (33, 20, 16))
    assert prediction.displacement.shape == (1, 33, 20, 16, 3)
    encoder = conv(2, 16) + conv(16, 32) + 2 * conv(32, 32)
    decoder = conv(32, 32) + 2 * conv(32 + 32, 32) + conv(32 + 16, 32)
    if config is ONE:
        decoder += conv(32, 8) + conv(8 + 2, 8) + conv(8, 3)
    else:
        decoder += conv(32, 32) + conv(32 + 2, 16) + conv(16, 16) + conv(16, 3)
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == encoder + decoder == total


def conv(c, out):
    """Number of parameters: 3x3x3 kernel and bias."""
    return 27 * c * out + out


def test_training_starts_at_the_identity_and_every_parameter_has_a_say():
    fixed, moving = random_pair(8, 8, 8, batch=1)
    model = VoxelMorph(encoder=(2, 3), decoder=(3, 2, 4, 2))  # quicker to compile
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(model.init)(key, fixed, moving)["params"]
    assert np.std(params["flow"]["kernel"]) == pytest.approx(1e-5, rel=0.2)
    assert not np.any(params["flow"]["bias"])

    @jax.jit
    def displacement_and_gradient(params):
        def loss(params):
            prediction: Any = model.apply({"params": params}, fixed, moving)
            return jnp.mean((prediction.displacement - 1) ** 2), prediction.displacement

        (_, displacement), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return displacement, gradient

    displacement, gradient = displacement_and_gradient(params)
    assert 0 < np.abs(displacement).max() < 1e-2  # voxels
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda value, slope: value - 0.01 * slope, params, gradient)
    assert np.isfinite(displacement_and_gradient(moved)[0]).all()


def test_bfloat16_gives_a_float32_displacement():
    prediction, variables = abstract_prediction(SMALL.clone(dtype="bfloat16"), (16, 16, 16))
    assert prediction.displacement.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


def test_a_large_displacement_is_as_fine_in_bfloat16():
    fixed, moving = np.random.default_rng(0).random((2, 1, 16, 16, 16, 1), np.float32)
    model = SMALL.clone(dtype="bfloat16")
    params = random_parameters(model, fixed, moving)
    params["flow"]["bias"] = np.full(3, 20.0, np.float32)
    params["flow"]["kernel"] = params["flow"]["kernel"] / 100
    prediction: Any = jax.jit(model.apply)({"params": params}, fixed, moving)
    assert len(np.unique(prediction.displacement)) > 2000  # steps of bfloat16 at 20 voxels leave some thirty


def test_networks_are_made_by_name():
    config = ModelConfig(channels=(4, 8))
    assert make_model(config) == AdRegNet(config)
    model = make_model(ModelConfig(architecture="voxelmorph-2", dtype="bfloat16"))
    assert model == VoxelMorph(dtype="bfloat16")


@pytest.mark.usefixtures("unchecked_types")
def test_images_of_another_form_are_refused():
    with pytest.raises(ValueError, match="fixed and moving must be"):
        SMALL.init(jax.random.key(0), jnp.zeros((1, 4, 4, 4, 2)), jnp.zeros((1, 4, 4, 4, 2)))
