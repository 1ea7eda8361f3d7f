"""Chunks and their halos; functions that go chunk by chunk have the values and derivatives of the whole."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.cpu.chunks import chunk, delayed, map_chunks, slices_a_chunk, zeros_after


def random_volume(seed=0, shape=(2, 6, 3, 2)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("fitting", "expected"), [(0, 1), (1, 1), (3, 3), (4, 3), (6, 6), (11, 6), (12, None)]
)
def test_slices_divide_the_volume_and_fit(fitting, expected):
    assert slices_a_chunk((2, 6, 3, 2), slice_bytes=10, limit_bytes=10 * fitting + 9) == expected


@pytest.mark.parametrize("halo", [0, 1, 3, 9])
@pytest.mark.parametrize("slices", [1, 2, 3, 6])
def test_a_chunk_is_a_slice_of_the_volume_in_zeros(slices, halo):
    volume = random_volume()
    padded = np.pad(volume, [(0, 0), (halo, halo), (0, 0), (0, 0)])
    row = [padded[b : b + 1, x : x + slices + 2 * halo] for b in range(2) for x in range(0, 6, slices)]
    for n, expected in enumerate(row):
        np.testing.assert_array_equal(chunk(volume, jnp.int32(n), slices, halo), expected)


def neighbours_product(first, factor, a, b):
    """a(x) times what lies two slices behind in b, where a slice beyond the volume, 10 to 15, counts as 7."""
    x = first + jnp.arange(b.shape[1]) + 2 - 10
    behind = jnp.pad(b, [(0, 0), (0, 2), (0, 0), (0, 0)])[:, 2:]
    behind = jnp.where((x < 6)[None, :, None, None], behind, 7)
    return a * behind * factor["channels"][None, None, None], factor["all"] * jnp.sum(a**2, axis=-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slices", [1, 2, 3, 6])
def test_mapped_over_chunks_is_the_function_of_the_whole(slices, dtype):
    a, b, *rest = (jnp.asarray(random_volume(seed), dtype) for seed in range(4))
    cotangents = (rest[0], rest[1][..., 0])
    factor = {"channels": jnp.array([2.0, -3.0], dtype), "all": jnp.asarray(5, dtype)}
    expected, pull_back = jax.vjp(functools.partial(neighbours_product, 10), factor, a, b)
    result, pull_back_chunks = jax.vjp(
        lambda factor, a, b: map_chunks(
            neighbours_product, [a, b], slices=slices, halo=2, first=10, shared=factor
        ),
        factor,
        a,
        b,
    )
    # Sums over the chunks are rounded to the parameters' type.
    tolerance = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    in_float = lambda tree: jax.tree.map(lambda array: array.astype(jnp.float32), tree)  # noqa: E731
    chex.assert_trees_all_close(in_float(result), in_float(expected), rtol=tolerance)
    chex.assert_trees_all_close(
        in_float(pull_back_chunks(cotangents)),
        in_float(pull_back(cotangents)),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("first", [np.inf, -np.inf, np.nan, 3e38, -1.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_waits_for_numbers_does_not_depend_on_them(first, dtype):
    value = jnp.asarray(random_volume(), dtype)
    inputs = [jnp.full((2, 3), first, dtype), jnp.full((1,), first, "float32"), jnp.int32(2**31 - 1)]
    waited = jax.jit(delayed)(value, *inputs)
    assert waited.dtype == value.dtype
    np.testing.assert_array_equal(waited, value)
    np.testing.assert_array_equal(zeros_after((2, 2), dtype, *inputs), jnp.zeros((2, 2), dtype))


def test_a_volume_that_is_not_finite_leaves_the_others_of_its_batch_alone():
    """Infinities come first in the batch, where the loops over chunks look before they begin."""
    a, b, *rest = (random_volume(seed) for seed in range(4))
    cotangents = (rest[0], rest[1][..., 0])
    factor = {"channels": jnp.float32([2, -3]), "all": jnp.float32(5)}

    @jax.jit
    def second(a, b, cotangents):
        mapped = functools.partial(map_chunks, neighbours_product, slices=2, halo=2, first=10, shared=factor)
        results, pull_back = jax.vjp(lambda a, b: mapped([a, b]), a, b)
        return jax.tree.map(lambda x: x[1], (results, pull_back(cotangents)))

    expected = second(a, b, cotangents)
    infinite = jax.tree.map(lambda array: array.at[0].set(np.inf), (a, b, cotangents))
    chex.assert_trees_all_equal(second(*infinite), expected)
