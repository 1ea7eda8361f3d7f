import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.neighbourhood import neighbourhood_attention
from tests.oracles import attention as oracle

pytestmark = pytest.mark.usefixtures("both_forms")

# Shape with batch, query and value channels, radius. Sums are written out by 8 channels: 9 and 10 make two
# groups, one of them filled up. A grid may be thinner than the neighbourhood.
CASES = [((2, 3, 4, 5), 3, 2, 1), ((1, 4, 3, 2), 9, 10, 1), ((1, 1, 4, 6), 2, 3, 2)]


def random_inputs(shape, d, c):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(*shape, n)).astype(np.float32) for n in (d, d, c)]


def masked_attention(query, key, value, *, radius):
    """The same by a softmax over all voxels, of which those far away are masked: for autodiff."""
    b, *shape, d = query.shape
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1).reshape(-1, 3)
    offsets = voxels[None] - voxels[:, None]  # [q, k, 3]
    near = np.abs(offsets).max(axis=-1) <= radius
    query, key, value = (a.reshape(b, len(voxels), -1) for a in (query, key, value))
    logits = jnp.where(near, jnp.einsum("bqd,bkd->bqk", query, key) / d**0.5, -jnp.inf)
    weights = jax.nn.softmax(logits)
    log_weights = jnp.where(near, jax.nn.log_softmax(jnp.where(near, logits, -1e9)), 0)
    attended = (weights @ value).reshape(b, *shape, -1)
    offset = jnp.einsum("bqk,qkn->bqn", weights, offsets.astype(np.float32)).reshape(b, *shape, 3)
    return attended, offset, -jnp.sum(weights * log_weights, axis=-1).reshape(b, *shape)


@pytest.mark.parametrize("chunk_bytes", [2**28, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("shape", "d", "c", "radius"), CASES)
def test_values_are_those_of_the_oracle(shape, d, c, radius, chunk_bytes):
    inputs = random_inputs(shape, d, c)
    with budget.override(attention=chunk_bytes):
        ours = jax.jit(functools.partial(neighbourhood_attention, radius=radius))(*inputs)
    for b in range(shape[0]):
        query, key, value = (a[b].astype(np.float64) for a in inputs)
        theirs = oracle.neighbourhood_attention(query, key, value, radius)
        for a, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a[b], expected, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [2**28, 1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("shape", "d", "c", "radius"), CASES)
def test_gradients_are_those_of_autodiff(shape, d, c, radius, chunk_bytes):
    inputs = random_inputs(shape, d, c)
    rng = np.random.default_rng(1)
    cotangents = tuple(jnp.asarray(rng.normal(size=(*shape, *n)), jnp.float32) for n in ((c,), (3,), ()))

    def gradients(attention):
        return jax.jit(lambda: jax.vjp(functools.partial(attention, radius=radius), *inputs)[1](cotangents))()

    with budget.override(attention=chunk_bytes):
        ours = gradients(neighbourhood_attention)
    for a, b in zip(ours, gradients(masked_attention), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_second_derivatives_are_those_of_autodiff():
    """The three sums are each other's derivatives: the derivative of one is derived once more."""
    inputs = random_inputs((1, 2, 3, 2), 2, 1)

    def curvature(attention):
        def norm(query, key, value):
            return sum(jnp.sum(a**2) for a in attention(query, key, value, radius=1))

        def slope(*inputs):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.grad(norm, (0, 1, 2))(*inputs))

        return jax.jit(jax.grad(slope, (0, 1, 2)))(*inputs)

    for a, b in zip(curvature(neighbourhood_attention), curvature(masked_attention), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_neighbours_outside_the_grid_do_not_take_part():
    shape = (1, 4, 4, 4)
    zero = np.zeros((*shape, 2), np.float32)
    _, offset, entropy = neighbourhood_attention(zero, zero, zero, radius=1)
    # All logits are equal: 27 neighbours inside, 8 in a corner, half a voxel inwards on average.
    assert float(entropy[0, 1, 1, 1]) == pytest.approx(np.log(27), rel=1e-6)
    assert float(entropy[0, 0, 0, 0]) == pytest.approx(np.log(8), rel=1e-6)
    np.testing.assert_allclose(offset[0, 0, 0, 3], [0.5, 0.5, -0.5], rtol=1e-6)


def test_a_match_is_found_where_it_is():
    """Features without a like: shifted by a voxel, they are found one voxel further on."""
    voxels = np.random.default_rng(0).normal(size=(1, 4, 4, 4, 10))
    key = (20 * voxels / np.linalg.norm(voxels, axis=-1, keepdims=True)).astype(np.float32)
    query = np.roll(key, -1, axis=2)
    attended, offset, entropy = neighbourhood_attention(query, key, key, radius=1)
    inside = (0, slice(None), slice(0, 3))
    np.testing.assert_allclose(offset[inside], np.broadcast_to([0, 1, 0], (4, 3, 4, 3)), atol=0.02)
    np.testing.assert_allclose(attended[inside], query[inside], atol=0.1)
    assert entropy[inside].max() < 0.1


def _value_and_gradients(*inputs):
    result, pullback = jax.vjp(neighbourhood_attention, *inputs)
    return result, pullback(result)


def test_large_logits_stay_finite():
    inputs = [100 * a for a in random_inputs((1, 3, 3, 3), 2, 1)]
    result, gradients = jax.jit(_value_and_gradients)(*inputs)
    for array in (*result, *gradients):
        assert np.isfinite(array).all()


def test_bfloat16_keeps_its_dtype_and_the_softmax_is_float32():
    half = [jnp.asarray(a, jnp.bfloat16) for a in random_inputs((1, 3, 4, 3), 3, 2)]
    attended, offset, entropy = neighbourhood_attention(*half, radius=1)
    assert [a.dtype for a in (attended, offset, entropy)] == [jnp.bfloat16, jnp.float32, jnp.float32]
    exact = masked_attention(*(a.astype(jnp.float32) for a in half), radius=1)
    for a, b in zip((attended, offset, entropy), exact, strict=True):
        # Logits of about 3 in 8 bits.
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.05)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((3, 3, 3, 2), (3, 3, 3, 2), (3, 3, 3, 2)),
        ((1, 3, 3, 3, 2), (1, 3, 3, 3, 1), (1, 3, 3, 3, 2)),
        ((1, 3, 3, 3, 2), (1, 3, 3, 3, 2), (1, 3, 3, 4, 2)),
    ],
)
def test_wrong_shapes_are_refused(query, key, value):
    with pytest.raises(ValueError, match="query and key must be"):
        neighbourhood_attention(jnp.zeros(query), jnp.zeros(key), jnp.zeros(value))
