import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from adregnet_jax.config import ModelConfig, paper_model
from adregnet_jax.nn.adregnet import AdRegNet, Level
from adregnet_jax.nn.backbone import Backbone
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.cpu import budget
from tests.oracles import network as oracle
from tests.random_parameters import random_parameters

# Small, and every part is in it: neighbourhood attention above 64 voxels, several regions at each level.
SMALL: dict[str, Any] = {"channels": (2, 3, 4), "global_attention_tokens": 64, "region_size": 4}
TINY: dict[str, Any] = {"channels": (2, 4), "region_size": 2}  # global attention only: quicker to compile


def random_pair(*shape, batch=2):
    rng = np.random.default_rng(0)
    return [rng.random((batch, *shape, 1), np.float32) for _ in range(2)]


def predict(config, params, fixed, moving):
    return jax.jit(AdRegNet(config).apply)({"params": params}, fixed, moving)


def abstract_prediction(config, shape):
    """Prediction and parameters as shapes: nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    return jax.eval_shape(AdRegNet(config).init_with_output, jax.random.key(0), image, image)


def assert_equals_the_oracle(prediction, b, expected):
    displacement, pyramid, entropies = expected
    # 1e-4: some dozens of layers in float32 against float64, of displacements of some voxels.
    np.testing.assert_allclose(prediction.displacement[b], displacement, atol=1e-4)
    for ours, slow in zip(prediction.pyramid, pyramid, strict=True):
        np.testing.assert_allclose(ours[b], slow, atol=1e-4)
    for ours, slow in zip(prediction.match_entropy, entropies, strict=True):
        np.testing.assert_allclose(ours[b], slow, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        paper_model(**SMALL),
        ModelConfig(**SMALL, blend_regions=False),
        ModelConfig(**TINY, blend_regions=False, shared_projection=True, match_residual=True),
        ModelConfig(**TINY, blend_regions=False, refinements=3),
        ModelConfig(**SMALL, finest_level=1, blend_regions=False, ascent_steps=2, ascent_window=3),
    ],
    ids=["paper", "default", "match", "refinements", "ascent"],
)
def test_network_equals_the_oracle_and_pairs_do_not_mix(config):
    fixed, moving = random_pair(8, 8, 8)
    params = random_parameters(AdRegNet(config), fixed, moving)
    prediction = predict(config, params, fixed, moving)
    assert np.abs(prediction.displacement).mean() > 0.1  # voxels: there is something to compare
    expected = oracle.network(params, fixed[0].astype(np.float64), moving[0].astype(np.float64), config)
    assert_equals_the_oracle(prediction, 0, expected)
    exchanged = predict(config, params, fixed[::-1], moving[::-1])
    for ours, theirs in zip(jax.tree.leaves(exchanged), jax.tree.leaves(prediction), strict=True):
        np.testing.assert_allclose(ours, theirs[::-1], atol=1e-5)


def test_an_odd_size_is_padded_by_its_border_and_the_finest_level_may_be_left_out():
    config = paper_model(**TINY, finest_level=1)
    fixed, moving = random_pair(5, 4, 7, batch=1)
    params = random_parameters(AdRegNet(config), fixed, moving)
    prediction = predict(config, params, fixed, moving)
    padded = [np.pad(image[0], [(0, 1), (0, 0), (0, 1), (0, 0)], mode="edge") for image in (fixed, moving)]
    fixed, moving = (image.astype(np.float64) for image in padded)
    displacement, pyramid, entropies = oracle.network(params, fixed, moving, config)
    assert_equals_the_oracle(prediction, 0, (displacement[:5, :4, :7], pyramid, entropies))


@pytest.mark.parametrize("model", [ModelConfig, paper_model])
@pytest.mark.parametrize("finest_level", [0, 1, 2])
def test_any_size_gives_a_displacement_of_that_size(model, finest_level):
    config = model(**SMALL, finest_level=finest_level)
    prediction, _ = abstract_prediction(config, (9, 7, 10))
    assert prediction.displacement.shape == (1, 9, 7, 10, 3)
    levels = [(3, 2, 3), (6, 4, 6), (12, 8, 12)][: 3 - finest_level]
    assert [u.shape for u in prediction.pyramid] == [(1, *shape, 3) for shape in levels]
    assert [e.shape for e in prediction.match_entropy] == [(1, *shape) for shape in levels]


def test_a_strided_stem_makes_every_level_coarser():
    prediction, _ = abstract_prediction(ModelConfig(**SMALL, stem_stride=2), (9, 7, 10))
    assert prediction.displacement.shape == (1, 9, 7, 10, 3)
    assert [u.shape[1:4] for u in prediction.pyramid] == [(2, 1, 2), (4, 2, 4), (8, 4, 8)]


def test_a_strided_stem_is_the_network_of_its_blocks():
    """What the levels see is a volume of half the size, whose eight channels are the voxels of a block."""
    config = ModelConfig(**TINY, stem_stride=2)
    fixed, moving = random_pair(8, 4, 12, batch=1)
    params = random_parameters(AdRegNet(config), fixed, moving)
    prediction = predict(config, params, fixed, moving)
    blocks = [
        np.stack([v[i::2, j::2, k::2, 0] for i in (0, 1) for j in (0, 1) for k in (0, 1)], axis=-1)
        for v in (fixed[0].astype(np.float64), moving[0].astype(np.float64))
    ]
    of_blocks = dataclasses.replace(config, region_size=config.region_size // 2, stem_stride=1)
    params = jax.tree.map(jnp.asarray, params)
    features = Backbone(config.channels).apply({"params": params["backbone"]}, jnp.float32(np.stack(blocks)))
    displacement = None
    for level, both in zip((1, 0), features, strict=True):
        level_of = Level(of_blocks, level)
        displacement, _ = level_of.apply(
            {"params": params[f"level_{level}"]}, both[:1], both[1:], displacement
        )
    np.testing.assert_allclose(prediction.pyramid[-1], displacement, atol=1e-4)
    expected = 2 * ndimage.zoom(displacement[0], (2, 2, 2, 1), order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(prediction.displacement[0], expected, atol=1e-4)


def test_each_component_can_be_switched_off():
    def names(**off):
        prediction, variables = abstract_prediction(ModelConfig(**SMALL, **off), (8, 8, 8))
        assert prediction.displacement.shape == (1, 8, 8, 8, 3)
        return {level: set(parts) for level, parts in variables["params"].items() if level != "backbone"}

    everything = {"cross_attention", "regional_attention", "mix", "head"}
    assert names() == {
        "level_2": everything,
        "level_1": everything | {"fusion"},
        "level_0": everything | {"fusion"},
    }
    assert names(cross_attention=False)["level_1"] == {
        "projection", "regional_attention", "mix", "head", "fusion"
    }  # fmt: skip
    assert names(regional_attention=False)["level_1"] == {"cross_attention", "mix", "head", "fusion"}
    assert names(multi_resolution=False) == {"level_0": everything}
    assert names(multi_resolution=False, finest_level=1) == {"level_1": everything}
    assert names(feature_residual=False, position_aware=False)["level_2"] == everything - {"mix"}


def test_without_attention_the_network_runs():
    config = ModelConfig(**TINY, cross_attention=False, regional_attention=False)
    fixed, moving = random_pair(4, 4, 4, batch=1)
    params = random_parameters(AdRegNet(config), fixed, moving)
    prediction = predict(config, params, fixed, moving)
    assert np.isfinite(prediction.displacement).all()
    assert prediction.match_entropy == ()  # there is no match


def test_programs_for_accelerators_have_no_loops():
    """Each turn of a loop is a launch, and the program waits for it."""
    fixed, moving = random_pair(8, 8, 8, batch=1)
    model = AdRegNet(ModelConfig(**SMALL, remat=True))
    params = random_parameters(model, fixed, moving)

    def loss(params):
        prediction: Any = model.apply({"params": params}, fixed, moving)
        return jnp.mean(prediction.displacement**2)

    with budget.override(platform="gpu"):
        program = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert "stablehlo.while" not in program


def test_programs_for_accelerators_give_the_same():
    fixed, moving = random_pair(8, 8, 8, batch=1)
    config = ModelConfig(**SMALL)
    params = random_parameters(AdRegNet(config), fixed, moving)
    expected = predict(config, params, fixed, moving)
    with budget.override(platform="gpu"):
        found = predict(config, params, fixed, moving)
    # 1e-4: as for the oracle.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_remat_changes_neither_values_nor_gradients():
    # The gradients of cross-attention take long to compile.
    settings = TINY | {"cross_attention": False, "refinements": 2}
    fixed, moving = random_pair(16, 16, 16, batch=1)
    params = random_parameters(AdRegNet(ModelConfig(**settings)), fixed, moving)

    def value_and_gradient(remat):
        model = AdRegNet(ModelConfig(**settings, remat=remat))

        def loss(params):
            prediction: Any = model.apply({"params": params}, fixed, moving)
            return jnp.mean(prediction.displacement**2)

        value, pull_back = jax.vjp(jax.jit(loss), params)
        kept_bytes = sum(array.nbytes for array in jax.tree.leaves(pull_back))
        return kept_bytes, (value, pull_back(jnp.ones(())))

    kept_bytes, kept = value_and_gradient(remat=False)
    fewer_bytes, computed_again = value_and_gradient(remat=True)
    assert fewer_bytes < 0.7 * kept_bytes
    # Compiled as other programs: sums run in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), kept, computed_again)


def test_bfloat16_gives_a_float32_displacement_near_the_exact_one():
    config = ModelConfig(**TINY, blend_regions=False, dtype="bfloat16")
    fixed, moving = random_pair(4, 4, 4, batch=1)
    params = random_parameters(AdRegNet(config), fixed, moving)
    displacement = predict(config, params, fixed, moving).displacement
    assert displacement.dtype == jnp.float32
    expected, _, _ = oracle.network(params, fixed[0].astype(np.float64), moving[0].astype(np.float64), config)
    error = np.abs(displacement[0] - expected).mean() / np.abs(expected).mean()
    # A dozen layers of 8 bits each; float32 would err by less than 1e-5.
    assert 1e-4 < error < 0.1


def test_parameters_and_shapes_of_the_whole_network():
    prediction, variables = abstract_prediction(ModelConfig(), (256, 256, 96))
    assert prediction.displacement.shape == (1, 256, 256, 96, 3)
    assert [u.shape[1:4] for u in prediction.pyramid] == [
        (16, 16, 6), (32, 32, 12), (64, 64, 24), (128, 128, 48), (256, 256, 96)
    ]  # fmt: skip

    channels = (32, 64, 128, 256, 512)
    expected = 0
    for level, c in enumerate(channels):
        finer = channels[level - 1] if level else 1
        if level:
            expected += 8 * finer * c + c  # strided convolution
        expected += conv_block(c if level else 1, c) + conv_block(c, c)  # encoder
        expected += 6 * c * c + 2  # cross-attention: projections, alpha, locality
        expected += 3 * c * c + (c + 1) + 1  # regional attention: projections, score, bias of the mask
        expected += (c + 6 + 2 * c) * c + c  # mixing of attention, offsets and features
        expected += conv_block(c, c) + 27 * c * 3 + 3  # candidate field
        if level < len(channels) - 1:
            coarser = channels[level + 1]
            expected += 8 * coarser * c + 8 * c  # transposed convolution
            expected += conv_block(2 * c, c) + conv_block(c, c)  # decoder
            expected += 27 * (c + 3) + 1  # fusion weight
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected == 42_397_131


def conv_block(c, out):
    """Number of parameters: 3x3x3 kernel, scale and offset of the norm."""
    return 27 * c * out + 2 * out


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("fixed", "moving"),
    [((4, 4, 4, 1), (4, 4, 4, 1)), ((1, 4, 4, 4, 1), (1, 4, 4, 8, 1)), ((1, 4, 4, 4, 2), (1, 4, 4, 4, 2))],
)
def test_images_of_another_form_are_refused(fixed, moving):
    with pytest.raises(ValueError, match="fixed and moving must be"):
        AdRegNet(ModelConfig(**TINY)).init(jax.random.key(0), jnp.zeros(fixed), jnp.zeros(moving))


@pytest.mark.parametrize("architecture", ["adregnet", "voxelmorph-2"])
def test_dropout_is_there_with_a_key_and_only_then(architecture):
    off = {"cross_attention": False, "regional_attention": False}
    settings = TINY | off | {"architecture": architecture}
    fixed, moving = random_pair(4, 4, 4)
    fixed[1], moving[1] = fixed[0], moving[0]
    plain, model = (make_model(ModelConfig(**settings, dropout=rate)) for rate in (0.0, 0.4))
    params = random_parameters(plain, fixed, moving)
    theirs = jax.eval_shape(model.init, jax.random.key(0), fixed, moving)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, theirs)

    run = jax.jit(model.apply)
    without_a_key = run({"params": params}, fixed, moving).displacement
    expected = jax.jit(plain.apply)({"params": params}, fixed, moving).displacement
    np.testing.assert_array_equal(without_a_key, expected)
    one, again, other = (
        run({"params": params}, fixed, moving, rngs={"dropout": jax.random.key(seed)}).displacement
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    for drawn in (one - expected, one - other):
        assert np.abs(drawn).max() > 0.05  # voxels
    np.testing.assert_allclose(one[0], one[1], atol=1e-5)  # one drawn network for all pairs
