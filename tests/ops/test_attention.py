import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.attention import blocked_attention
from adregnet_jax.ops.cpu import budget
from tests.oracles import attention as oracle

pytestmark = pytest.mark.usefixtures("both_forms")


def random_inputs(keys=10, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = (2, 7, 4), (2, keys, 4), (2, keys, 3)
    return [scale * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def plain_attention(query, key, value):
    logits = jnp.einsum("bqd,bkd->bqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(logits)
    return weights @ value, -jnp.sum(weights * jax.nn.log_softmax(logits), axis=-1)


# 10 keys: in ten blocks, in unequal blocks, in two, in one, and in one that is larger than they are.
@pytest.mark.parametrize("block", [1, 4, 5, 10, 64])
def test_values_and_gradients_do_not_depend_on_the_block(block):
    inputs = random_inputs()
    rng = np.random.default_rng(1)
    cotangents = [rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 3), (2, 7))]

    def value_and_gradients(attention):
        result, pullback = jax.vjp(attention, *inputs)
        return *result, *pullback(tuple(map(jnp.asarray, cotangents)))

    ours = jax.jit(lambda: value_and_gradients(functools.partial(blocked_attention, block=block)))()
    theirs = jax.jit(lambda: value_and_gradients(plain_attention))()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_values_are_those_of_the_oracle():
    query, key, value = random_inputs()
    attended, entropy = blocked_attention(query, key, value, block=4)
    for b in range(2):
        for n in range(7):
            expected, weights = oracle.attend(query[b, n], key[b], value[b])
            np.testing.assert_allclose(attended[b, n], expected, atol=1e-6)
            np.testing.assert_allclose(entropy[b, n], oracle.entropy(weights), atol=1e-5)


def test_large_logits_stay_finite():
    query, key, value = random_inputs(scale=50.0)  # logits of some thousands: exp of them is infinite
    attend = functools.partial(blocked_attention, block=4)
    (attended, entropy), pullback = jax.vjp(jax.jit(attend), query, key, value)
    expected, _ = plain_attention(query, key, value)
    np.testing.assert_allclose(attended, expected, rtol=1e-3, atol=1e-2)
    # A difference of logits of thousands, which have 7 digits.
    np.testing.assert_allclose(entropy, np.zeros((2, 7)), atol=5e-3)
    for gradient in pullback((attended, entropy)):
        assert np.isfinite(gradient).all()


def test_equal_keys_share_the_weight():
    query, _, value = random_inputs()
    attended, entropy = blocked_attention(query, np.ones((2, 10, 4), np.float32), value, block=4)
    np.testing.assert_allclose(attended, np.broadcast_to(value.mean(1, keepdims=True), (2, 7, 3)), atol=1e-6)
    np.testing.assert_allclose(entropy, np.full((2, 7), np.log(10)), rtol=1e-5)


def test_bfloat16_keeps_its_dtype_and_sums_in_float32():
    query, key, value = (jnp.asarray(a, jnp.bfloat16) for a in random_inputs(keys=300))
    attended, entropy = blocked_attention(query, key, value, block=64)
    assert (attended.dtype, entropy.dtype) == (jnp.bfloat16, jnp.float32)
    expected, expected_entropy = plain_attention(*(a.astype(jnp.float32) for a in (query, key, value)))
    np.testing.assert_allclose(attended.astype(np.float32), expected, atol=0.01)  # 2^-8 of values of 1
    np.testing.assert_allclose(entropy, expected_entropy, atol=0.02)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 3, 4), (1, 2, 4), (1, 2, 4)),
        ((1, 2, 4), (1, 3, 4), (1, 2, 4)),
        ((1, 2, 4), (1, 2, 3), (1, 2, 3)),
    ],
)
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="query must be"):
        blocked_attention(*map(jnp.zeros, shapes))


def test_memory_grows_by_the_keys_and_not_by_their_products():
    def temporary_bytes(keys):
        shapes = [jax.ShapeDtypeStruct((1, n, 8), jnp.float32) for n in (512, keys, keys)]
        gradients = jax.grad(
            lambda *arrays: blocked_attention(*arrays, block=256)[0].sum(), argnums=(0, 1, 2)
        )
        return jax.jit(gradients).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    few, many = 1024, 16384
    keys_and_values = 2 * 4 * 8 * (many - few)
    logits = 4 * 512 * (many - few)
    with budget.override(exact_attention=0):
        assert temporary_bytes(many) - temporary_bytes(few) < 3 * keys_and_values < 0.15 * logits
