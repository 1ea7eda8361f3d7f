"""Chunks and their halos; functions that go chunk by chunk have the values and derivatives of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.chunks import chunk, map_chunks, slices_a_chunk


def random_volume(seed=0, shape=(2, 6, 3, 2)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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


def neighbours_product(first, a, b):
    """a(x) times what lies two slices behind in b, where a slice beyond the volume, 10 to 15, counts as 7."""
    x = first + jnp.arange(b.shape[1]) + 2 - 10
    behind = jnp.pad(b, [(0, 0), (0, 2), (0, 0), (0, 0)])[:, 2:]
    behind = jnp.where((x < 6)[:, None, None], behind, 7)
    return a * behind, jnp.sum(a**2, axis=-1)


@pytest.mark.parametrize("slices", [1, 2, 3, 6])
def test_mapped_over_chunks_is_the_function_of_the_whole(slices):
    a, b = random_volume(0), random_volume(1)
    cotangents = (random_volume(2), random_volume(3)[..., 0])
    expected, pull_back = jax.vjp(lambda a, b: neighbours_product(10, a, b), a, b)
    result, pull_back_chunks = jax.vjp(
        lambda a, b: map_chunks(neighbours_product, [a, b], slices=slices, halo=2, first=10), a, b
    )
    for found, wanted in zip(result, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    for found, wanted in zip(pull_back_chunks(cotangents), pull_back(cotangents), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
