"""The training step on one device and on four, the schedule, and the mesh."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from adregnet_jax.config import LossConfig, OptimiserConfig
from adregnet_jax.errors import UserError
from adregnet_jax.nn.layers import ChannelDropout
from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.training.sharding import make_mesh
from adregnet_jax.training.state import make_init
from adregnet_jax.training.step import (
    average_parameters,
    learning_rate,
    make_optimiser,
    make_train_step,
    make_validation_step,
    registration_loss,
)

ONE_AND_FOUR_DEVICES = """
    from typing import NamedTuple
    import jax, jax.numpy as jnp, numpy as np, optax
    from flax import linen as nn
    from adregnet_jax.config import LossConfig
    from adregnet_jax.nn.layers import ChannelDropout
    from adregnet_jax.training.sharding import make_mesh
    from adregnet_jax.training.state import make_init
    from adregnet_jax.training.step import make_train_step

    class Prediction(NamedTuple):
        displacement: jax.Array

    class Network(nn.Module):
        @nn.compact
        def __call__(self, fixed, moving):
            features = nn.leaky_relu(nn.Conv(4, (3, 3, 3))(jnp.concatenate([fixed, moving], axis=-1)))
            features = ChannelDropout(0.5)(features)
            return Prediction(nn.Conv(3, (3, 3, 3))(features))

    rng = np.random.default_rng(0)
    batch = {name: rng.random((4, 8, 8, 8, 1), np.float32) for name in ("fixed", "moving")}
    batch |= {"mask": np.ones((4, 8, 8, 8, 1), np.float32), "spacing_mm": np.ones((4, 3), np.float32)}
    batch |= {name: 7 * rng.random((4, 5, 3), np.float32) for name in ("fixed_landmarks", "moving_landmarks")}
    batch |= {"landmark_valid": np.ones((4, 5), np.float32)}
    optimiser = optax.sgd(0.1)  # the update is the gradient: Adam would hide its size
    results = []
    for devices in (1, 4):
        mesh = make_mesh(devices, batch_size=4)
        assert mesh.size == devices
        state = make_init(Network(), optimiser, (8, 8, 8), mesh)(jax.random.key(0))
        before = state.params
        loss = LossConfig(ncc_window=0, jacobian=0)  # quick to compile
        state, metrics = make_train_step(Network(), optimiser, loss, mesh)(state, batch)
        leaves = jax.tree.leaves(state.params)
        assert all(len(x.sharding.device_set) == devices for x in leaves)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))  # the state was donated
        assert int(state.step) == 1
        results.append(jax.device_get((leaves, metrics)))
    # Sums over the batch run in another order: a few units in the last place of float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    print("agree")
"""


def test_one_device_and_four_agree(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS", "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=1"
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ONE_AND_FOUR_DEVICES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "agree\n", done.stderr


class OnlyDropout(nn.Module):
    """A displacement of one number, in as many voxels as dropout left."""

    @nn.compact
    def __call__(self, fixed, moving):
        size = self.param("size", nn.initializers.ones, ())
        kept = ChannelDropout(0.5)(jnp.ones((*fixed.shape[:4], 16)))
        field = size * kept.mean(axis=-1, keepdims=True) * jnp.ones(3)
        return Prediction(field, (field,), ())


def test_dropout_of_a_step_is_a_function_of_seed_and_step():
    rng = np.random.default_rng(0)
    batch = {name: rng.random((1, 4, 4, 4, 1), np.float32) for name in ("fixed", "moving")}
    batch |= {"mask": np.ones((1, 4, 4, 4, 1), np.float32), "spacing_mm": np.ones((1, 3), np.float32)}
    batch |= {name: rng.random((1, 1, 3), np.float32) for name in ("fixed_landmarks", "moving_landmarks")}
    batch |= {"landmark_valid": np.ones((1, 1), np.float32)}
    mesh, optimiser, model = make_mesh(1, batch_size=1), optax.sgd(0.0), OnlyDropout()
    config = LossConfig(similarity=0, regularisation=0)  # the landmark alone: its error tells the field
    init = make_init(model, optimiser, (4, 4, 4), mesh)
    steps = [make_train_step(model, optimiser, config, mesh, seed=seed) for seed in (0, 1)]

    def losses(seed):
        state, found = init(jax.random.key(0)), []
        for _ in range(6):
            state, metrics = steps[seed](state, batch)
            found.append(float(metrics["loss"]))
        return found

    first = losses(0)
    assert losses(0) == first
    assert len(set(first)) > 2 and losses(1) != first
    validation, _ = make_validation_step(model, config)({"size": np.float32(1)}, batch)
    whole, _ = registration_loss(model, config, {"size": np.float32(1)}, batch)
    assert float(validation) == pytest.approx(float(whole))  # nothing is left out


def test_rate_is_halved_by_epochs_after_a_warm_up():
    config = OptimiserConfig(learning_rate=1e-4, warmup_steps=4, halve_every_epochs=2)
    rate = learning_rate(config, steps_per_epoch=10)
    np.testing.assert_allclose([rate(n) for n in (0, 3, 4, 19)], np.array([0.2, 0.8, 1, 1]) * 1e-4, rtol=1e-6)
    np.testing.assert_allclose([rate(n) for n in (20, 39, 40)], np.array([0.5, 0.5, 0.25]) * 1e-4, rtol=1e-6)
    constant = learning_rate(OptimiserConfig(halve_every_epochs=0), steps_per_epoch=10)
    assert float(constant(10_000)) == pytest.approx(1e-4)


def test_gradients_are_clipped():
    """Adam's second moment after one step is (1 - b2) g^2, with g of norm 1 after clipping."""
    optimiser = make_optimiser(OptimiserConfig(gradient_clip=1.0), steps_per_epoch=1)
    params = {"w": np.zeros(2, np.float32)}
    _, state = optimiser.update({"w": np.array([30.0, 40.0], np.float32)}, optimiser.init(params), params)
    second_moment = optax.tree.get(state, "nu")["w"]
    np.testing.assert_allclose(second_moment, 0.001 * np.array([0.36, 0.64]), rtol=1e-4)


def test_average_is_of_the_last_tenth_at_first_and_of_the_last_steps_later():
    average, values = {"w": jnp.zeros(3)}, np.random.default_rng(0).random((400, 3), np.float32)
    for n, value in enumerate(values, start=1):
        average = average_parameters(average, {"w": jnp.asarray(value)}, jnp.int32(n), 0.9)
        if n == 1:
            np.testing.assert_allclose(average["w"], 0.9 * value, rtol=1e-6)
    weights = 0.1 * 0.9 ** np.arange(400)[::-1]  # the random start and what came early have faded
    np.testing.assert_allclose(average["w"], weights @ values, rtol=1e-4)


def test_mesh_that_does_not_fit():
    assert make_mesh(0, batch_size=3).size == 1
    with pytest.raises(UserError, match=r"run\.devices is 1000"):
        make_mesh(1000, batch_size=1000)
