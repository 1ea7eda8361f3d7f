from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adregnet_jax.nn.deformation import FieldHead, Fusion
from tests.oracles import network as oracle
from tests.random_parameters import random_parameters


def random_inputs():
    """Candidate, coarser field, attended features, mask."""
    rng = np.random.default_rng(1)
    shapes = (2, 3, 4, 5, 3), (2, 3, 4, 5, 3), (2, 3, 4, 5, 2)
    return *(rng.normal(size=s).astype(np.float32) for s in shapes), rng.random((2, 3, 4, 5, 1), np.float32)


def test_field_head_equals_the_oracle():
    _, _, features, _ = random_inputs()
    head = FieldHead(4)
    params = random_parameters(head, features)
    field = jax.jit(head.apply)({"params": params}, features)
    expected = [oracle.field_head(params, f.astype(np.float64)) for f in features]
    np.testing.assert_allclose(field, np.stack(expected), atol=1e-5)


def test_fusion_equals_the_oracle():
    inputs = random_inputs()
    fusion = Fusion()
    params = random_parameters(fusion, *inputs)
    field = jax.jit(fusion.apply)({"params": params}, *inputs)
    expected = [oracle.fusion(params, *(a[b].astype(np.float64) for a in inputs)) for b in range(2)]
    np.testing.assert_allclose(field, np.stack(expected), atol=1e-5)


def test_where_the_mask_is_0_the_coarser_field_stays():
    candidate, coarser, attended, mask = random_inputs()
    mask[:, 1:] = 0
    fusion = Fusion()
    params = random_parameters(fusion, candidate, coarser, attended, mask)
    field: Any = jax.jit(fusion.apply)({"params": params}, candidate, coarser, attended, mask)
    np.testing.assert_array_equal(field[:, 1:], coarser[:, 1:])
    assert np.abs(field[:, 0] - coarser[:, 0]).min() > 0


def test_fields_are_float32_whatever_the_activations():
    _, _, features, _ = random_inputs()
    for head in (FieldHead(4, dtype="bfloat16"), FieldHead(4, "bfloat16", "bfloat16")):
        field, _ = jax.eval_shape(head.init_with_output, jax.random.key(0), features)
        assert field.dtype == jnp.float32
