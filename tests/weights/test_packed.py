"""Packed weights: round trips, refused input, and the accuracy of the bundled weights."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig, OptimiserConfig, SyntheticConfig
from adregnet_jax.data.datasets.synthetic import synthetic_pair
from adregnet_jax.errors import UserError
from adregnet_jax.launch.config_file import load_config
from adregnet_jax.nn.models import make_model
from adregnet_jax.training.checkpoint import check_parameters
from adregnet_jax.training.loop import initial_state
from adregnet_jax.training.sharding import make_mesh
from adregnet_jax.training.state import make_init
from adregnet_jax.training.step import make_optimiser
from adregnet_jax.weights.packed import SHIPPED, load_pretrained, pack_weights, read_record
from adregnet_jax.weights.trained_network import TrainingDomain
from tests.random_parameters import random_parameters

ROOT = Path(__file__).parents[2]
TINY = ModelConfig(channels=(4,), cross_attention=False, regional_attention=False, multi_resolution=False)
SCANS = TrainingDomain("RAS", voxels=(4096,))


@pytest.fixture
def packed(tmp_path):
    """A folder of packed weights, and the parameters in it."""
    volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
    params = random_parameters(make_model(TINY), volume, volume)
    config = {"model": dataclasses.asdict(TINY)}
    pack_weights(tmp_path, params, config=config, scans=SCANS, training={"validation": []})
    return tmp_path, params


def test_packed_weights_round_trip(packed):
    folder, params = packed
    network = load_pretrained(folder)
    assert network.model == make_model(TINY) and network.scans == SCANS
    assert str(folder) in network.name

    def check(found, expected):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-7)  # of float16

    jax.tree.map(check, network.params, params)


@pytest.mark.parametrize("recorded", [{}, {"convolution": "onednn"}, {"convolution": "of a later version"}])
def test_weights_do_not_depend_on_the_convolution_they_were_trained_with(recorded, tmp_path):
    """Nor on whether their record has one: the machine that loads them chooses."""
    model = ModelConfig(channels=(2,), cross_attention=False, regional_attention=False)
    volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
    settings = dataclasses.asdict(model)
    del settings["convolution"]
    config = {"model": settings | recorded}
    params = random_parameters(make_model(model), volume, volume)
    pack_weights(tmp_path, params, config=config, scans=SCANS, training={})
    assert load_pretrained(tmp_path).model == make_model(model)


def change_record(folder, **changes):
    record = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps(record | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "weights.npz"), "changed or damaged: checksum"),
        (lambda folder: change_record(folder, scans={"axes": "LPS"}), "changed or damaged: checksum"),
        (
            lambda folder: change_record(folder, sha256="0" * 64),
            "expected 000000000000.*copy the folder again",
        ),
        (lambda folder: change_record(folder, format=2), "format 2, this version .* reads format 1"),
        (lambda folder: (folder / "weights.json").write_text("{"), "describe weights"),
        (lambda folder: (folder / "weights.json").write_text("[]"), "describe weights"),
        (lambda folder: (folder / "weights.json").unlink(), "expected a folder with weights.json"),
        (lambda folder: (folder / "weights.npz").unlink(), "expected a folder with weights.json"),
    ],
)
def test_what_can_not_be_used_is_refused(packed, damage, message):
    damage(packed[0])
    with pytest.raises(UserError, match=message):
        load_pretrained(packed[0])


def test_a_model_of_another_version_is_refused(packed):
    folder, params = packed
    config = {"model": dataclasses.asdict(TINY) | {"depth": 3}}
    pack_weights(folder, params, config=config, scans=SCANS, training={})
    with pytest.raises(UserError, match=r"no weights that this version knows.*depth"):
        load_pretrained(folder)


def trained_on_from(model, init_from, say=lambda line: None):
    """The state at the first step, with shapes only."""
    mesh = make_mesh(0, 1)
    optimiser = make_optimiser(OptimiserConfig(), 1)
    init = make_init(make_model(model), optimiser, (16, 16, 16), mesh, averaged=True)
    return initial_state(init, jax.random.key(0), mesh, init_from, say)


def test_training_continues_from_packed_parameters(packed):
    folder, params = packed
    state = trained_on_from(TINY, str(folder))
    in_half_precision = jax.tree.map(lambda values: np.float32(np.float16(values)), params)
    chex.assert_trees_all_equal(jax.device_get(state.params), in_half_precision)
    chex.assert_trees_all_equal(state.average, state.params)
    assert int(state.step) == 0
    with pytest.raises(UserError, match="init_from="):
        trained_on_from(dataclasses.replace(TINY, channels=(8,)), str(folder))


def test_modules_that_the_packed_ones_lack_start_as_new_and_are_reported(packed):
    folder, params = packed
    said: list[str] = []
    more = dataclasses.replace(TINY, ascent_steps=1)
    state = trained_on_from(more, str(folder), said.append)
    assert said == [f"{folder} has no ascent, ascent_context: random parameters are used there"]
    new = {name: state.params.pop(name) for name in ("ascent", "ascent_context")}
    in_half_precision = jax.tree.map(lambda values: np.float32(np.float16(values)), params)
    chex.assert_trees_all_equal(jax.device_get(state.params), in_half_precision)
    assert np.std(new["ascent"]["hidden"]["kernel"]) > 0
    # Stored parameters that the model lacks would be lost.
    config = {"model": dataclasses.asdict(more)}
    pack_weights(folder, params | new, config=config, scans=SCANS, training={})
    with pytest.raises(UserError, match=r"ascent.* and absent in this config"):
        trained_on_from(TINY, str(folder))


@pytest.mark.parametrize("name", ["finetune", "hippocampus", "dirlab_cpu"])
def test_configs_that_train_the_shipped_network_on_have_its_model(name):
    config = load_config(ROOT / "configs" / f"{name}.py")
    assert config.init_from == "pretrained"
    network = load_pretrained()
    model = make_model(config.model)
    volume = jax.ShapeDtypeStruct((1, 32, 32, 32, 1), jnp.float32)
    theirs = jax.eval_shape(model.init, jax.random.key(0), volume, volume)["params"]
    check_parameters(network.params, theirs, "the config's model")


@pytest.mark.parametrize("value", [np.nan, 1e5])
def test_parameters_that_half_precision_can_not_hold_are_refused(tmp_path, value):
    params = {"block": {"kernel": jnp.array([0.0, value])}}
    with pytest.raises(UserError, match="parameter block/kernel is not finite, or too large"):
        pack_weights(tmp_path, params, config={}, scans=SCANS, training={})
    assert not list(tmp_path.iterdir())


def test_the_shipped_weights_are_whole_and_small():
    record = read_record(SHIPPED)
    assert record["config"]["data"]["kind"] == "synthetic"
    assert record["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(load_pretrained().params))
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 10 * 2**20
    assert (SHIPPED / "MODEL_CARD.md").is_file()


def test_the_shipped_network_finds_motion():
    """Cases with a seed that no training run uses."""
    network = load_pretrained()
    config = SyntheticConfig(shape=(48, 48, 48), seed=1234, largest_motion_mm=15.0, same_contrast=1.0)
    before, after = [], []
    for case in range(3):
        pair = synthetic_pair(config, case)
        images = (jnp.asarray(values)[None, ..., None] for values in (pair.fixed, pair.moving))
        found = np.asarray(network.displacement(network.params, *images))[0]
        before.append(np.linalg.norm(pair.displacement, axis=-1).mean())
        after.append(np.linalg.norm(found - pair.displacement, axis=-1).mean())
    assert np.mean(after) < 0.7 * np.mean(before)
