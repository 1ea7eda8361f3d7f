import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from adregnet_jax.ops.filters import box_mean, box_sum, gaussian_filter, window_counts
from tests.oracles.filters import gaussian_weights, windowed_mean


def random_volume(*shape):
    return np.random.default_rng(0).random(shape).astype(np.float32)


@settings(max_examples=4, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 6)] * 3), width=st.sampled_from([1, 3, 5, 9]))
def test_box_mean_equals_the_oracle(shape, width):
    volume = random_volume(1, *shape, 1)
    expected = windowed_mean(volume[0, ..., 0], np.ones((width,) * 3))
    np.testing.assert_allclose(
        jax.jit(box_mean, static_argnums=1)(volume, width)[0, ..., 0], expected, atol=1e-5
    )


def test_box_sum_takes_zero_beyond_the_border():
    volume = random_volume(2, 6, 5, 11, 3)
    expected = scipy.ndimage.uniform_filter(volume, (0, 5, 5, 5, 0), mode="constant") * 125
    np.testing.assert_allclose(box_sum(volume, 5), expected, rtol=1e-5)


def test_box_sum_keeps_the_digits_of_12_bit_data():
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 4096, (1, 12, 12, 400, 1)).astype(np.float32)
    # Sums of 729 integers below 4096 stay below 2**24: float32 holds them exactly.
    expected = scipy.ndimage.convolve(volume.astype(np.int64), np.ones((1, 9, 9, 9, 1), int), mode="constant")
    np.testing.assert_array_equal(box_sum(volume, 9), expected)


def test_window_counts_are_the_box_sum_of_ones():
    np.testing.assert_array_equal(
        window_counts((3, 7, 12), 9), box_sum(jnp.ones((1, 3, 7, 12, 1)), 9)[0, ..., 0]
    )


@pytest.mark.parametrize("width", [3, 7])
def test_gaussian_equals_the_oracle(width):
    volume = random_volume(1, 5, 6, 4, 1)
    expected = windowed_mean(volume[0, ..., 0], gaussian_weights(1.5, width))
    np.testing.assert_allclose(gaussian_filter(volume, 1.5, width=width)[0, ..., 0], expected, atol=1e-5)


def test_gaussian_means_are_taken_at_full_precision():
    """On GPUs the default product has ten bits, and variances are differences of such means."""
    program = jax.jit(gaussian_filter, static_argnums=1).lower(jnp.zeros((1, 8, 8, 8, 1)), 1.5).as_text()
    assert program.count("dot_general") == program.count("precision = [HIGHEST, HIGHEST]") == 3


def test_gaussian_equals_scipy_away_from_the_border():
    volume = random_volume(2, 16, 17, 18, 2)
    expected = scipy.ndimage.gaussian_filter(volume, 1.5, truncate=3.5, axes=(1, 2, 3))
    inside = (slice(None), *[slice(5, -5)] * 3)
    smooth = jax.jit(lambda v: gaussian_filter(v, 1.5))(volume)
    np.testing.assert_allclose(smooth[inside], expected[inside], atol=1e-5)


@pytest.mark.parametrize("mean", [lambda v: box_mean(v, 5), lambda v: gaussian_filter(v, 2.0)])
def test_a_constant_stays_constant_up_to_the_border(mean):
    volume = np.full((1, 4, 9, 5, 1), 3.0, np.float32)
    np.testing.assert_allclose(jax.jit(mean)(volume), volume, rtol=1e-6)


@pytest.mark.parametrize("mean", [lambda v: box_mean(v, 3), lambda v: gaussian_filter(v, 1.0)])
def test_gradients_match_finite_differences(mean):
    volume = jax.random.normal(jax.random.key(0), (1, 3, 4, 5, 1))
    # 1e-2: what float32 finite differences can tell.
    check_grads(jax.jit(mean), (volume,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_sums_of_a_constant_volume_are_not_folded_by_the_compiler():
    volume = jnp.ones((1, 8, 8, 8, 1))
    compiled = jax.jit(lambda: box_sum(volume, 9)).lower().compile().as_text()
    assert "reduce-window" in compiled


@pytest.mark.parametrize("width", [0, 4, -3])
def test_a_window_has_a_centre(width):
    with pytest.raises(ValueError, match="odd number of voxels"):
        box_sum(jnp.ones((1, 4, 4, 4, 1)), width)
