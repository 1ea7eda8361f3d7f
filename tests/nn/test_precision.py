"""Effects of the setting `config.model.dtype` on products, sums and dtypes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.benchmark.parts import LOSS_TERMS
from adregnet_jax.config import LossConfig, ModelConfig
from adregnet_jax.losses import total_loss
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.composition import exponential
from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant
from adregnet_jax.ops.sampling import warp
from tests.random_parameters import random_parameters

# All modules that multiply; the first network has exact and neighbourhood attention.
SMALL: dict[str, Any] = {"channels": (2, 3), "global_attention_tokens": 64, "region_size": 4}
NETWORKS = {
    "recomputed": ModelConfig(**SMALL, remat=True, ascent_steps=1, ascent_window=3),
    "without attention": ModelConfig(**SMALL, cross_attention=False, shared_projection=True),
    "voxelmorph": ModelConfig(architecture="voxelmorph-1"),
}
HIGHEST, HIGH, DEFAULT = (jax.lax.Precision[name] for name in ("HIGHEST", "HIGH", "DEFAULT"))


def equations(jaxpr):
    """All equations of a program, inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def products(function, *arguments):
    """The precision and the dtypes of each convolution and matrix product of a function."""
    found = [
        (equation.params["precision"], {str(operand.aval.dtype) for operand in equation.invars})
        for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    for precision, _ in found:
        assert precision is None or precision[0] == precision[1]
    return [(precision and precision[0], dtypes) for precision, dtypes in found]


def pair(*shape):
    rng = np.random.default_rng(0)
    return [rng.random((1, *shape, 1), np.float32) for _ in range(2)]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_product_of_a_network_has_the_precision_of_the_setting(name, dtype):
    images = pair(8, 8, 8)
    with budget.override(platform="gpu"):
        model = make_model(dataclasses.replace(NETWORKS[name], dtype=dtype))
        params = jax.eval_shape(model.init, jax.random.key(0), *images)["params"]

        def loss(params):
            prediction: Any = model.apply({"params": params}, *images)
            assert prediction.displacement.dtype == jnp.float32
            return jnp.sum(prediction.displacement)

        found = products(jax.grad(loss), params)
    chosen = {"float32": HIGHEST, "tf32": HIGH, "bfloat16": DEFAULT}[dtype]
    assert {precision for precision, _ in found} <= {chosen, HIGHEST}
    of_setting = [dtypes for precision, dtypes in found if precision == chosen]
    assert len(of_setting) > len(found) / 2  # regional attention and sums over neighbours are float32
    if dtype == "bfloat16":
        assert {"bfloat16"} in of_setting
    else:
        assert all(dtypes == {"float32"} for dtypes in of_setting)


def test_losses_jacobians_and_flows_are_float32_with_any_setting():
    fixed, moving = pair(9, 8, 7)
    displacement = np.random.default_rng(1).normal(scale=0.5, size=(1, 9, 8, 7, 3)).astype(np.float32)
    every_term: dict[str, Any] = dict.fromkeys(LOSS_TERMS, 1.0)
    config = LossConfig(**every_term, ssim_window=5, dice_labels=(1,))
    points = np.ones((1, 2, 3), np.float32)
    batch = {
        "fixed": fixed,
        "moving": moving,
        "mask": np.ones_like(fixed),
        "spacing_mm": np.ones((1, 3), np.float32),
        "fixed_landmarks": points,
        "moving_landmarks": points,
        "landmark_valid": points[..., 0],
        "fixed_labels": np.ones(fixed.shape, np.int32),
        "moving_labels": np.ones(fixed.shape, np.int32),
        "displacement": displacement,
    }

    def everything(displacement):
        flow = exponential(displacement)
        loss, terms = total_loss(batch, flow, warp(moving, flow), config)
        assert set(every_term) <= set(terms)
        return loss + jnp.mean(jacobian_determinant(flow)) + jnp.mean(folded_volume(flow))

    for form in ("cpu", "gpu"):
        # The default of the process stands for any setting that could come in from outside.
        with budget.override(platform=form), jax.default_matmul_precision("bfloat16"):
            program = jax.make_jaxpr(jax.grad(everything))(displacement)
            found = products(jax.grad(everything), displacement)
        assert found and {precision for precision, _ in found} == {HIGHEST}
        dtypes = {
            str(result.aval.dtype) for equation in equations(program.jaxpr) for result in equation.outvars
        }
        assert "float32" in dtypes and not {"bfloat16", "float16"} & dtypes


def test_tf32_is_float32_on_cpu():
    images = pair(8, 8, 8)
    params = random_parameters(make_model(ModelConfig(**SMALL)), *images)

    @functools.partial(jax.jit, static_argnums=1)
    def predict(params, dtype):
        model = make_model(ModelConfig(**SMALL, dtype=dtype))
        prediction: Any = model.apply({"params": params}, *images)
        return prediction.displacement

    displacement = predict(params, "float32")
    assert np.abs(displacement).max() > 0.1
    np.testing.assert_array_equal(predict(params, "tf32"), displacement)
