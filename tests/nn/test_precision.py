"""Effects of the setting `config.model.dtype` on products, sums and dtypes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.config import ModelConfig
from adregnet_jax.nn.models import make_model
from adregnet_jax.ops.cpu import budget

# All modules that multiply; the first network has exact and neighbourhood attention.
SMALL: dict[str, Any] = {"channels": (2, 3), "global_attention_tokens": 64, "region_size": 4}
NETWORKS = {
    "recomputed": ModelConfig(**SMALL, remat=True, ascent_steps=1, ascent_window=3),
    "without attention": ModelConfig(**SMALL, cross_attention=False, shared_projection=True),
    "voxelmorph": ModelConfig(architecture="voxelmorph-1"),
}
HIGHEST, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
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
    chosen = {"float32": HIGHEST, "bfloat16": DEFAULT}[dtype]
    assert {precision for precision, _ in found} <= {chosen, HIGHEST}
    of_setting = [dtypes for precision, dtypes in found if precision == chosen]
    assert len(of_setting) > len(found) / 2  # regional attention and sums over neighbours are float32
    if dtype == "bfloat16":
        assert {"bfloat16"} in of_setting
    else:
        assert all(dtypes == {"float32"} for dtypes in of_setting)
