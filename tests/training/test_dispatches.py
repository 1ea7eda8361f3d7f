"""Training on pairs drawn by the program itself, several steps in each call."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from adregnet_jax.config import (
    Config,
    DataConfig,
    LossConfig,
    OptimiserConfig,
    RunConfig,
    SyntheticConfig,
)
from adregnet_jax.data.datasets.synthetic import curriculum_share
from adregnet_jax.errors import UserError
from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.synthesis import batches
from adregnet_jax.synthesis.batches import draw_batch
from adregnet_jax.synthesis.pairs import SyntheticPair
from adregnet_jax.training import loop
from adregnet_jax.training.checkpoint import restore_parameters
from adregnet_jax.training.sharding import draw_on_devices, make_mesh
from adregnet_jax.training.state import make_init
from adregnet_jax.training.step import make_optimiser, make_train_step

SHAPE = (16, 16, 16)
OPTIMISER = OptimiserConfig(learning_rate=0.01, batch_size=2, epochs=2, steps_per_epoch=4)
CONFIG = Config(
    data=DataConfig(
        kind="synthetic",
        synthetic=SyntheticConfig(SHAPE, train_cases=5, validation_cases=1, on_device=True),
        flip_axes=(0, 1, 2),
        intensity_jitter=0.05,
    ),
    loss=LossConfig(similarity=0, regularisation=0, landmark=0, field=0.3),  # compiles quickly
    optimiser=OPTIMISER,
    run=RunConfig(checkpoint_every_steps=2, log_every_steps=2, memory="off"),
)


class Network(nn.Module):
    """Small enough to compile in a second."""

    multiple = 1

    @nn.compact
    def __call__(self, fixed, moving):
        field = nn.Dense(3)(nn.tanh(nn.Dense(4)(jnp.concatenate([fixed, moving], axis=-1))))
        return Prediction(field, (field,), ())


def quick_pair(key, config, *, share):
    """In place of `synthesise`, which takes ten times as long to compile."""
    labels = jax.random.randint(key, config.shape, 0, 3)
    fixed, moving = jax.random.uniform(key, (2, *config.shape)) * share
    displacement = jax.random.normal(key, (*config.shape, 3))
    return SyntheticPair(fixed, moving, labels, labels + 1, displacement, share < 0.9)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(batches, "synthesise", quick_pair)


def losses_and_parameters(steps, *, data=1, space=1):
    """After four steps, in calls of `steps` of them."""
    mesh = make_mesh(data, 2, space_devices=space)
    model, optimiser = Network(), make_optimiser(OPTIMISER, 4)
    draw = functools.partial(draw_batch, config=CONFIG.data, seed=0)
    draw = functools.partial(draw_on_devices, draw, batch_size=2, mesh=mesh)
    program = make_train_step(model, optimiser, CONFIG.loss, mesh, draw=draw, steps=steps)
    state, losses = make_init(model, optimiser, SHAPE, mesh)(jax.random.key(0)), []
    for _ in range(4 // steps):
        state, metrics = program(state, {})
        assert metrics["loss"].shape == (steps,)
        losses += metrics["loss"].tolist()
    assert int(state.step) == 4
    return losses, jax.device_get(state.params)


@pytest.mark.usefixtures("quick")
def test_steps_are_the_same_in_any_number_of_calls_and_on_any_devices():
    losses, params = losses_and_parameters(1)
    assert len(set(losses)) == 4
    for other in (losses_and_parameters(4), losses_and_parameters(4, data=2, space=2)):
        # Not to the last bit: XLA fuses a single step and the body of a loop in different ways.
        np.testing.assert_allclose(other[0], losses, rtol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), other[1], params)


@pytest.mark.usefixtures("quick")
def test_run_that_resumes_ends_like_one_that_was_not_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_model", lambda config: Network())

    def run(workdir, epochs):
        changed = dataclasses.replace(CONFIG, optimiser=dataclasses.replace(OPTIMISER, epochs=epochs))
        changed.run = dataclasses.replace(CONFIG.run, steps_per_dispatch=2)
        loop.train(changed, workdir)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses = {line["step"]: line["train/loss"] for line in map(json.loads, lines)}
        return losses, restore_parameters(workdir, which="newest")[0]

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "resumed", 1)
    resumed = run(tmp_path / "resumed", 2)
    assert list(whole[0]) == [2, 4, 6, 8] and resumed[0] == whole[0]
    jax.tree.map(np.testing.assert_array_equal, resumed[1], whole[1])


def test_resuming_between_two_calls_is_refused():
    loop.check_start(12, 4)
    with pytest.raises(UserError, match=r"is 8, and the run resumes at step 12: .* for instance 4$"):
        loop.check_start(12, 8)


def test_batch_is_a_function_of_positions_and_has_the_format_of_collate():
    """With pairs of `synthesise`; each repetition of the five cases is augmented in its own way."""
    draw = jax.jit(functools.partial(draw_batch, config=CONFIG.data, seed=0))
    batch, again = draw(jnp.array([1, 6])), draw(jnp.array([3, 1]))
    assert {name: array.shape for name, array in batch.items()} == {
        **dict.fromkeys(("fixed", "moving", "mask", "fixed_labels", "moving_labels"), (2, *SHAPE, 1)),
        **dict.fromkeys(("fixed_landmarks", "moving_landmarks"), (2, 1, 3)),
        "displacement": (2, *SHAPE, 3),
        "spacing_mm": (2, 3),
        "landmark_valid": (2, 1),
        "same_contrast": (2,),
    }
    for name, array in batch.items():
        np.testing.assert_array_equal(array[0], again[name][1], err_msg=name)
    labels, moving_labels = np.asarray(batch["fixed_labels"]), np.asarray(batch["moving_labels"])
    assert sorted(labels[0].ravel()) == sorted(labels[1].ravel())  # one pair, mirrored
    assert (labels[0] != labels[1]).any()
    # Mirrored together with its components, the displacement still is the truth.
    for n in range(2):
        grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
        place = np.clip(np.rint(grid + batch["displacement"][n]).astype(int), 0, 15)
        pulled_back = moving_labels[n, ..., 0][tuple(np.moveaxis(place, -1, 0))]
        assert (pulled_back == labels[n, ..., 0]).mean() > 0.999  # halves are rounded the other way


@pytest.mark.usefixtures("quick")
def test_curriculum_and_exchange():
    data = dataclasses.replace(CONFIG.data, exchange=True, flip_axes=(), intensity_jitter=0.0)
    data.synthetic = dataclasses.replace(CONFIG.data.synthetic, curriculum_cases=4)
    batch = draw_batch(jnp.arange(40), data, seed=0)
    assert "displacement" not in batch
    exchanged = (batch["fixed_labels"] > batch["moving_labels"]).all(axis=(1, 2, 3, 4))
    assert 10 < exchanged.sum() < 30
    largest = batch["fixed"].max(axis=(1, 2, 3, 4))[:5]
    expected = [curriculum_share(data.synthetic, case) for case in range(5)]
    np.testing.assert_allclose(largest, expected, rtol=0.01)  # of 4096 uniform numbers times the share


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("run", {"steps_per_dispatch": 0}, "run.steps_per_dispatch is 0: expected 1 or more"),
        ("run", {"log_every_steps": 3}, "2: expected a number that divides run.log_every_steps, 3"),
        ("run", {"checkpoint_every_steps": 5}, "a number that divides run.checkpoint_every_steps, 5"),
        ("optimiser", {"steps_per_epoch": 7}, "a number that divides the steps of an epoch, 7"),
        ("optimiser", {"steps_per_epoch": 0}, "a number that divides the steps of an epoch, 3"),
        ("data", {"kind": "phantom"}, "is 2: expected 1, unless pairs are drawn on the device"),
    ],
)
def test_steps_per_dispatch_that_can_not_be_used(section, changes, message):
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, steps_per_dispatch=2))
    config.check()
    setattr(config, section, dataclasses.replace(getattr(config, section), **changes))
    with pytest.raises(UserError) as error:
        config.check()
    assert message in str(error.value)
