from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.nn.layers import (
    ChannelDropout,
    Conv,
    ConvBlock,
    Downsample,
    InstanceNorm,
    JoinedDense,
    Upsample,
)
from tests.oracles import network as oracle
from tests.random_parameters import random_parameters


def random_volume(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("layer", "slow_layer"),
    [
        (Conv(3), oracle.convolution),
        (InstanceNorm(), oracle.instance_norm),
        (ConvBlock(3), oracle.conv_block),
        (Downsample(3), oracle.downsample),
        (Upsample(3), oracle.upsample),
    ],
)
def test_layer_equals_the_oracle(layer, slow_layer):
    volume = random_volume(2, 4, 2, 6, 2)
    params = random_parameters(layer, volume)
    result = jax.jit(layer.apply)({"params": params}, volume)
    expected = np.stack([slow_layer(params, v.astype(np.float64)) for v in volume])
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("layer", [Conv(3, dtype="bfloat16"), JoinedDense(3, dtype="bfloat16")])
def test_gradients_of_biases_are_sums_in_float32(layer):
    """In bfloat16 a sum of ones stops at 256: this would be the gradient of each bias."""
    volume = random_volume(1, 16, 16, 16, 2)
    params = random_parameters(layer, volume)

    def total(params):
        return layer.apply({"params": params}, jnp.asarray(volume)).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total))(params)
    np.testing.assert_allclose(gradient["bias"], 16**3, rtol=1e-6)


def test_downsample_is_the_strided_convolution_of_xla():
    volume = random_volume(2, 4, 2, 6, 2)
    params = random_parameters(Downsample(3), volume)["dense"]
    kernel = params["kernel"].reshape(2, 2, 2, 2, 3)
    layout = ("NDHWC", "DHWIO", "NDHWC")
    expected = jax.lax.conv_general_dilated(volume, kernel, (2, 2, 2), "VALID", dimension_numbers=layout)
    result: Any = jax.jit(Downsample(3).apply)({"params": {"dense": params}}, volume)
    np.testing.assert_allclose(result, expected + params["bias"][None, None, None, None], atol=1e-5)


def test_upsample_is_the_transposed_convolution_of_xla():
    volume = random_volume(2, 2, 1, 3, 2)
    params = random_parameters(Upsample(3), volume)["dense"]
    params["bias"] = np.zeros_like(params["bias"])
    kernel = np.moveaxis(params["kernel"].reshape(2, 2, 2, 2, 3), 0, 3)  # [2, 2, 2, c, c']
    layout = ("NDHWC", "DHWIO", "NDHWC")
    # `conv_transpose` correlates: the kernel is laid down mirrored unless it is mirrored first.
    mirrored = kernel[::-1, ::-1, ::-1]
    expected = jax.lax.conv_transpose(volume, mirrored, (2, 2, 2), "VALID", dimension_numbers=layout)
    result: Any = jax.jit(Upsample(3).apply)({"params": {"dense": params}}, volume)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_norm_of_bfloat16_takes_float32_statistics():
    # A mean of 300 with an SD of 1: bfloat16 has steps of 2 there, so the input itself is rounded first.
    volume = jnp.asarray(300 + 40 * random_volume(1, 4, 4, 4, 2), jnp.bfloat16)
    params = {"scale": np.ones(2, np.float32), "offset": np.zeros(2, np.float32)}
    result: Any = InstanceNorm().apply({"params": params}, volume)
    assert result.dtype == jnp.bfloat16
    expected = oracle.instance_norm(params, np.asarray(volume[0], np.float64))
    np.testing.assert_allclose(result[0].astype(np.float32), expected, atol=0.02)  # 2^-8 of numbers up to 3


def test_initialised_norm_gives_mean_0_and_sd_1():
    volume = 5 + 3 * random_volume(2, 4, 3, 5, 2)
    result, _ = InstanceNorm().init_with_output(jax.random.key(0), jnp.asarray(volume))
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), np.zeros((2, 2)), atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(1, 2, 3)), np.ones((2, 2)), atol=1e-5)


def test_dropout_leaves_out_whole_channels_of_all_images_alike():
    volume = 1 + np.abs(random_volume(2, 3, 4, 2, 1000))
    drop = jax.jit(ChannelDropout(0.3).apply)
    dropped = np.asarray(drop({}, volume, rngs={"dropout": jax.random.key(0)}))
    kept = dropped[0, 0, 0, 0] != 0
    np.testing.assert_allclose(dropped, np.where(kept, volume / 0.7, 0), rtol=1e-6)
    # The number of kept channels is binomial: its SD is 14.5, five of them are missed once in two millions.
    assert abs(kept.sum() - 700) < 5 * 14.5


@pytest.mark.parametrize(("rate", "rngs"), [(0.3, None), (0.0, {"dropout": jax.random.key(0)})])
def test_dropout_without_a_key_or_a_rate_changes_nothing(rate, rngs):
    volume = jnp.asarray(random_volume(1, 2, 2, 2, 5))
    np.testing.assert_array_equal(ChannelDropout(rate).apply({}, volume, rngs=rngs), volume)
