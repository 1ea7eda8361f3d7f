import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from adregnet_jax.config import ModelConfig
from adregnet_jax.errors import UserError
from adregnet_jax.nn.adregnet import AdRegNet
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration.network import dropout_sd_mm, register, register_sharded
from tests.random_parameters import random_parameters

MODEL = AdRegNet(ModelConfig(channels=(2, 4), region_size=2))
compiled_register = jax.jit(functools.partial(register, model=MODEL))


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    return [rng.random((2, 4, 6, 4, 1), np.float32) for _ in range(2)]


@pytest.fixture(scope="module")
def params(pair):
    return jax.tree.map(jnp.asarray, random_parameters(MODEL, *pair))


def test_warped_is_the_moving_image_warped_once(params, pair):
    registration = compiled_register(params, *pair)
    assert np.abs(registration.displacement).mean() > 0.1
    np.testing.assert_allclose(registration.warped, warp(pair[1], registration.displacement), atol=1e-6)


def test_untrained_network_leaves_images_nearly_as_they_are(pair):
    key = jax.random.key(0, impl="rbg")  # quicker to compile than the default
    params = jax.jit(MODEL.init)(key, *pair)["params"]
    registration = compiled_register(params, *pair)
    # Field heads start at a hundredth of the usual SD.
    assert 0 < np.abs(registration.displacement).max() < 0.1  # voxels
    np.testing.assert_allclose(registration.warped, pair[1], atol=0.2)


def test_volumes_of_several_devices_are_registered_as_on_one(params, pair):
    mesh = jax.make_mesh((2,), ("space",), (AxisType.Auto,), devices=jax.devices()[:2])
    sharded = functools.partial(register_sharded, model=MODEL, mesh=mesh)
    registration = jax.jit(sharded)(params, *pair)
    expected = compiled_register(params, *pair)
    # Matching compares features of many layers, whose sums are in another order: a few 1e-5 of a voxel.
    for ours, theirs in zip(jax.tree.leaves(registration), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert {part.data.shape for part in registration.displacement.addressable_shards} == {(2, 2, 6, 4, 3)}
    with pytest.raises(UserError, match=r"6 wide along x .* pad the scans to 8"):
        sharded(params, *(jnp.pad(image, ((0, 0), (0, 2), *[(0, 0)] * 3)) for image in pair))


def test_the_model_may_be_a_static_argument(params, pair):
    compiled = jax.jit(register, static_argnames="model")
    result = compiled(params, *pair, model=MODEL)
    expected = register(params, *pair, model=MODEL)
    np.testing.assert_allclose(result.displacement, expected.displacement, atol=1e-5)


def test_vmap_over_pairs_is_the_batch(params, pair):
    one_by_one = jax.vmap(lambda fixed, moving: register(params, fixed[None], moving[None], model=MODEL))
    registrations = jax.jit(one_by_one)(*pair)
    together = compiled_register(params, *pair)
    for ours, theirs in zip(jax.tree.leaves(registrations), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(ours[:, 0], theirs, atol=1e-5)


def test_gradient_is_the_slope_of_the_loss(params, pair):
    fixed, moving = pair

    def loss(params, fixed, moving):
        return jnp.mean((register(params, fixed, moving, model=MODEL).displacement) ** 2)

    value_and_gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    _, gradients = value_and_gradients(params, fixed, moving)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0])
        if not np.any(leaf)
    ]
    # Every parameter has a say, but the mask of the coarsest level: nothing is fused there.
    assert silent == ["['level_1']['regional_attention']['mask_bias']"]

    # Along the bias of the finest field the displacement is smooth: no features are aligned by it.
    def moved(step):
        changed = jax.tree.map(np.copy, params)
        changed["level_0"]["head"]["field"]["bias"] += step
        return float(value_and_gradients(changed, fixed, moving)[0])

    slope = (moved(0.05) - moved(-0.05)) / 0.1
    # The loss is quadratic in it: central differences are exact but for float32.
    expected = float(np.sum(gradients[0]["level_0"]["head"]["field"]["bias"]))
    assert slope == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_scatter_by_dropout_is_the_sample_sd_of_the_drawn_networks(pair):
    settings: dict[str, Any] = {"channels": (3, 4), "cross_attention": False, "regional_attention": False}
    model = AdRegNet(ModelConfig(**settings, dropout=0.4))
    params = random_parameters(model, *pair)
    key, spacing_mm = jax.random.key(7), (1.0, 1.5, 2.5)
    scatter = functools.partial(dropout_sd_mm, model=model, spacing_mm=spacing_mm)
    ours = jax.jit(functools.partial(scatter, samples=4))(params, *pair, key)
    network = jax.jit(model.apply)
    drawn = [
        network({"params": params}, *pair, rngs={"dropout": jax.random.fold_in(key, n)}).displacement
        for n in range(4)
    ]
    sd_mm = np.std(np.array(drawn, np.float64), axis=0, ddof=1) * spacing_mm
    expected = np.linalg.norm(sd_mm, axis=-1)
    assert expected.mean() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="two samples or more, got 1"):
        scatter(params, pair[0], pair[1], key, samples=1)
