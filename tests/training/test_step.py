"""The training step on one device and on four, the schedule, and the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from adregnet_jax.config import LossConfig, ModelConfig, OptimiserConfig
from adregnet_jax.errors import UserError
from adregnet_jax.nn.layers import ChannelDropout
from adregnet_jax.nn.models import make_model
from adregnet_jax.nn.prediction import Prediction
from adregnet_jax.training.sharding import make_mesh, place, replicated, rows_of_process
from adregnet_jax.training.state import TrainState, drawn_on_host, make_init
from adregnet_jax.training.step import (
    average_parameters,
    global_norm,
    in_one_vector,
    learning_rate,
    make_optimiser,
    make_train_step,
    make_validation_step,
    registration_loss,
)
from tests.random_parameters import random_parameters

SHAPE = (8, 6, 4)  # slabs of two voxels for four devices


def keep_gradients():
    """An optimiser whose state is the gradients: the parameters stay."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, params), gradients),
    )


def step_on(data: int, space: int, accumulate: int, **settings):
    """Gradients and metrics of a training step on the given devices, and the states before and after."""
    rng = np.random.default_rng(0)
    batch = {name: rng.random((4, *SHAPE, 1), np.float32) for name in ("fixed", "moving")}
    batch |= {"mask": (rng.random((4, *SHAPE, 1)) < 0.9).astype(np.float32)}
    batch |= {"spacing_mm": rng.uniform(1, 3, (4, 3)).astype(np.float32)}
    batch |= {name: 7 * rng.random((4, 5, 3), np.float32) for name in ("fixed_landmarks", "moving_landmarks")}
    batch |= {"landmark_valid": (rng.random((4, 5)) < 0.8).astype(np.float32)}
    # Exact attention, regions over the cuts, dropout; the neighbours would take most of the compilation.
    config = ModelConfig(channels=(2, 4), region_size=3, dropout=0.5, **settings)
    model, optimiser = make_model(config), keep_gradients()
    mesh = make_mesh(data, 4, space_devices=space, accumulate=accumulate)
    assert dict(mesh.shape) == {"data": data, "space": space}
    params = random_parameters(model, batch["fixed"], batch["moving"])
    state = TrainState(jnp.int32(0), params, optimiser.init(params), jnp.float32(np.inf), jnp.int32(0))
    state = jax.device_put(state, replicated(mesh))
    step = make_train_step(model, optimiser, LossConfig(ncc_window=3), mesh, accumulate=accumulate)
    placed = place(batch, range(4), 4, mesh=mesh, multiple=model.multiple)
    # Less LLVM optimisation than in use, which halves the compilation time.
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    compiled = step.lower(state, placed).compile(compiler_options=options)
    return compiled(state, placed), state


@pytest.fixture(scope="module")
def on_one_device():
    (after, metrics), _ = step_on(1, 1, 1)
    return jax.device_get((after.opt_state, metrics))


@pytest.mark.parametrize(
    ("data", "space", "accumulate", "convolution"),
    [
        (4, 1, 1, "auto"),
        (1, 4, 1, "auto"),
        (2, 2, 2, "auto"),
        (1, 1, 1, "onednn"),
        (2, 2, 1, "onednn"),
        (1, 1, 1, "xla"),
    ],
)
def test_step_is_the_same_on_any_devices_and_by_any_convolution(
    on_one_device, data, space, accumulate, convolution, request
):
    if convolution == "onednn":
        request.getfixturevalue("with_onednn")
    (after, metrics), before = step_on(data, space, accumulate, convolution=convolution)
    assert int(after.step) == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params))  # the state was donated
    leaves = jax.tree.leaves(after.params)
    assert all(len(x.sharding.device_set) == data * space for x in leaves)
    gradients, expected = jax.device_get((after.opt_state, metrics)), on_one_device
    # Sums are in another order: rounding, some units in the last place of the largest gradient, which the
    # differences of sums in windows of NCC and in norms make some ten times larger.
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected[0]))
    for a, b in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * largest)
    assert metrics.keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(gradients[1][name], value, rtol=1e-4, err_msg=name)


def test_bfloat16_in_slabs_is_as_near_to_float32_as_it_is_whole(on_one_device):
    """Rounded sums at the cuts are no worse than rounding elsewhere.

    Both distances are bounded, not their ratio: by rounding, an activation next to the kink of its leaky ReLU
    comes out on the other side in one of the two, which alone is three hundredths of the gradients.
    """

    def distance(space):
        (after, metrics), _ = step_on(1, space, 1, dtype="bfloat16")
        exact, found = on_one_device[0], jax.device_get(after.opt_state)
        loss = abs(float(metrics["loss"]) / float(on_one_device[1]["loss"]) - 1)
        difference = jax.tree.map(np.subtract, found, exact)
        return loss, float(optax.tree.norm(difference) / optax.tree.norm(exact))

    (loss, gradients), (loss_in_slabs, gradients_in_slabs) = distance(1), distance(4)
    assert max(loss, loss_in_slabs) < 2**-7  # of bfloat16, whose numbers have 8 digits
    assert 0 < max(gradients, gradients_in_slabs) < 0.06


def test_what_is_drawn_on_the_host_is_what_is_drawn_on_the_devices():
    mesh, key = make_mesh(4, batch_size=4), jax.random.key(3)

    def init(key):
        return nn.Dense(5).init(key, jnp.ones((1, 4)))

    on_host = drawn_on_host(init, mesh)
    expected, found = jax.jit(init, out_shardings=replicated(mesh))(key), on_host(key)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(x.sharding == replicated(mesh) for x in jax.tree.leaves(found))
    assert jax.eval_shape(on_host, key) == jax.eval_shape(init, key)


class OnlyDropout(nn.Module):
    """A displacement with the same value in all voxels that dropout left."""

    @nn.compact
    def __call__(self, fixed, moving):
        size = self.param("size", nn.initializers.ones, ())
        kept = ChannelDropout(0.5)(jnp.ones((*fixed.shape[:4], 16)))
        field = size * kept.mean(axis=-1, keepdims=True) * jnp.ones((1, 1, 1, 1, 3))
        return Prediction(field, (field,), ())


def test_dropout_of_a_step_is_a_function_of_seed_and_step():
    rng = np.random.default_rng(0)
    batch = {name: rng.random((1, 4, 4, 4, 1), np.float32) for name in ("fixed", "moving")}
    batch |= {"mask": np.ones((1, 4, 4, 4, 1), np.float32), "spacing_mm": np.ones((1, 3), np.float32)}
    batch |= {name: rng.random((1, 1, 3), np.float32) for name in ("fixed_landmarks", "moving_landmarks")}
    batch |= {"landmark_valid": np.ones((1, 1), np.float32)}
    mesh, optimiser, model = make_mesh(1, batch_size=1), optax.sgd(0.0), OnlyDropout()
    config = LossConfig(similarity=0, regularisation=0)  # landmarks only: their error reveals the field
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
    validation, _ = make_validation_step(model, config, mesh)({"size": np.float32(1)}, batch)
    whole, _ = registration_loss(model, config, {"size": np.float32(1)}, batch)
    assert float(validation) == pytest.approx(float(whole))  # nothing is left out


def test_rate_is_halved_by_epochs_after_a_warm_up():
    config = OptimiserConfig(learning_rate=1e-4, warmup_steps=4, halve_every_epochs=2)
    rate = learning_rate(config, steps_per_epoch=10)
    np.testing.assert_allclose([rate(n) for n in (0, 3, 4, 19)], np.array([0.2, 0.8, 1, 1]) * 1e-4, rtol=1e-6)
    np.testing.assert_allclose([rate(n) for n in (20, 39, 40)], np.array([0.5, 0.5, 0.25]) * 1e-4, rtol=1e-6)
    constant = learning_rate(OptimiserConfig(halve_every_epochs=0), steps_per_epoch=10)
    assert float(constant(10_000)) == pytest.approx(1e-4)


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize(("length", "expected"), [(50.0, [0.6, 0.8]), (0.5, [0.3, 0.4])])
def test_gradients_are_clipped(length, expected):
    """Adam's second moment after one step is (1 - b2) g^2, with g of norm 1 at most after clipping."""
    optimiser = make_optimiser(OptimiserConfig(gradient_clip=1.0), steps_per_epoch=1)
    params = {"v": np.zeros((), np.float32), "w": np.zeros((1, 1), np.float32)}
    gradients = {"v": jnp.float32(0.6 * length), "w": jnp.full((1, 1), 0.8 * length, jnp.float32)}
    assert float(global_norm(gradients)) == pytest.approx(length)
    _, state = optimiser.update(gradients, optimiser.init(params), params)
    found = [x.item() for x in jax.tree.leaves(optax.tree.get(state, "nu"))]
    np.testing.assert_allclose(found, 0.001 * np.array(expected) ** 2, rtol=1e-4)


@pytest.mark.usefixtures("both_forms")
def test_one_vector_has_the_same_arrays():
    tree = {"a": jnp.float32(1), "b": [jnp.arange(6.0).reshape(2, 3), jnp.arange(4.0)]}
    jax.tree.map(np.testing.assert_array_equal, in_one_vector(tree), tree)


def test_average_is_of_the_last_tenth_at_first_and_of_the_last_steps_later():
    average, values = {"w": jnp.zeros(3)}, np.random.default_rng(0).random((400, 3), np.float32)
    for n, value in enumerate(values, start=1):
        average = average_parameters(average, {"w": jnp.asarray(value)}, jnp.int32(n), 0.9)
        if n == 1:
            np.testing.assert_allclose(average["w"], 0.9 * value, rtol=1e-6)
    weights = 0.1 * 0.9 ** np.arange(400)[::-1]  # the random start and what came early have faded
    np.testing.assert_allclose(average["w"], weights @ values, rtol=1e-4)


def test_automatic_mesh_takes_the_most_devices_that_divide_the_batch():
    assert make_mesh(0, batch_size=3).size == 3
    assert dict(make_mesh(0, batch_size=8, space_devices=2).shape) == {"data": 2, "space": 2}
    assert dict(make_mesh(0, batch_size=6, accumulate=2).shape) == {"data": 3, "space": 1}
    mesh = make_mesh(2, batch_size=4, space_devices=2)
    assert rows_of_process(mesh, 4) == [0, 1, 2, 3]  # all devices belong to this process


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 1000, 1, 1), r"run\.devices is 1000, there are 4 devices: lower it"),
        ((2, 2, 4, 1), r"run\.devices is 2 and run\.space_devices is 4, there are 4 devices"),
        ((2, 3, 1, 1), r"batch_size is 3, which 2 devices .* make it a multiple of 2"),
        ((0, 3, 1, 2), r"batch_size is 3, which optimiser\.accumulate=2 does not divide"),
        ((2, 6, 1, 2), r"batch_size is 6 in .*accumulate=2 parts, .* make it a multiple of 4"),
    ],
)
def test_mesh_that_does_not_fit(arguments, message):
    devices, batch_size, space_devices, accumulate = arguments
    with pytest.raises(UserError, match=message) as raised:
        make_mesh(devices, batch_size, space_devices=space_devices, accumulate=accumulate)
    assert "\n" not in str(raised.value)


def test_volumes_that_do_not_split_into_slabs():
    mesh = make_mesh(1, batch_size=1, space_devices=4)
    batch = {"fixed": np.zeros((1, 20, 4, 4, 1), np.float32)}
    with pytest.raises(UserError, match=r"20 wide along x .* multiple of 4 voxels .* pad the scans to 32"):
        place(batch, [0], 1, mesh=mesh, multiple=4)
