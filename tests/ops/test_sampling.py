import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.sampling import sample, sample_at_points, warp, warp_labels

# What scipy calls the paddings. Its "constant" doesn't fade out between the last voxel and the outside.
SCIPY_MODE = {"border": "nearest", "zeros": "grid-constant"}


def scipy_sample(volume, coordinates, order, padding):
    coordinates = np.moveaxis(coordinates, -1, 0)
    channels = [
        scipy.ndimage.map_coordinates(channel, coordinates, order=order, mode=SCIPY_MODE[padding])
        for channel in np.moveaxis(volume, -1, 0)
    ]
    return np.stack(channels, axis=-1)


compiled_sample = jax.jit(sample, static_argnames=("mode", "padding"))
compiled_warp = jax.jit(warp, static_argnames=("mode", "padding"))


def random_volume(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize(("mode", "order"), [("linear", 1), ("nearest", 0)])
@settings(max_examples=20, deadline=None)
@given(shape=st.sampled_from([(4, 5, 3), (1, 6, 2)]), seed=st.integers(0, 1000))
def test_samples_are_those_of_scipy(mode, order, padding, shape, seed):
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=(*shape, 2)).astype(np.float32)
    # Inside, on the border's last voxel, and up to three voxels outside.
    coordinates = rng.uniform(-3, np.array(shape) + 2, (40, 3)).astype(np.float32)
    samples = compiled_sample(volume, coordinates, mode=mode, padding=padding)
    np.testing.assert_allclose(samples, scipy_sample(volume, coordinates, order, padding), atol=2e-6)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_zero_displacement_is_the_identity(mode, padding):
    volume = random_volume(2, 3, 4, 5, 2)
    np.testing.assert_array_equal(
        compiled_warp(volume, np.zeros((2, 3, 4, 5, 3), np.float32), mode=mode, padding=padding), volume
    )


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_integer_shift_is_a_slice(mode, axis):
    volume = random_volume(1, 4, 5, 6, 1)
    displacement = np.zeros((1, 4, 5, 6, 3), np.float32)
    displacement[..., axis] = 2
    n = volume.shape[axis + 1]
    shifted = np.take(volume, np.arange(2, n), axis=axis + 1)
    last = np.take(volume, [n - 1], axis=axis + 1)
    border, zeros = (compiled_warp(volume, displacement, mode=mode, padding=p) for p in ("border", "zeros"))
    np.testing.assert_array_equal(border, np.concatenate([shifted, last, last], axis=axis + 1))
    np.testing.assert_array_equal(zeros, np.concatenate([shifted, 0 * last, 0 * last], axis=axis + 1))


def test_zeros_fade_out_over_the_last_voxel():
    coordinates = np.array([[-0.75, 0, 0], [-1, 0, 0], [1.25, 0, 0], [2, 0, 0]], np.float32)
    samples = compiled_sample(np.ones((2, 1, 1, 1), np.float32), coordinates, padding="zeros")
    np.testing.assert_allclose(samples[:, 0], [0.25, 0, 0.75, 0])


def test_labels_stay_labels_and_keep_their_dtype():
    labels = np.random.default_rng(0).choice([0, 3, 1000], (1, 4, 5, 6, 1)).astype(np.int16)
    displacement = 2 * random_volume(1, 4, 5, 6, 3)
    warped = warp(labels, displacement, mode="nearest")
    assert warped.dtype == jnp.int16
    assert set(np.unique(warped)) <= {0, 3, 1000}


def test_halves_round_up():
    ramp = np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1)
    coordinates = np.array([[0.5, 0, 0], [1.5, 0, 0], [2.5, 0, 0]], np.float32)
    np.testing.assert_array_equal(sample(ramp, coordinates, mode="nearest")[:, 0], [1, 2, 3])


def test_warp_goes_to_the_grid_of_the_displacement():
    volume, displacement = random_volume(1, 4, 5, 6, 2), np.zeros((1, 2, 3, 4, 3), np.float32)
    np.testing.assert_array_equal(compiled_warp(volume, displacement), volume[:, :2, :3, :4])


def test_points_are_sampled_each_in_its_own_volume():
    volume = random_volume(2, 4, 5, 6, 3)
    points = np.random.default_rng(1).uniform(0, 3, (2, 7, 3)).astype(np.float32)
    expected = [scipy_sample(v, p, 1, "border") for v, p in zip(volume, points, strict=True)]
    np.testing.assert_allclose(sample_at_points(volume, points), np.stack(expected), atol=2e-6)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_gradients_match_finite_differences(padding):
    volume = random_volume(1, 3, 4, 3, 2)
    rng = np.random.default_rng(0)
    # Away from voxel centres, where the derivative jumps; some samples lie outside.
    displacement = rng.integers(-2, 3, (1, 3, 4, 3, 3)) + rng.uniform(0.2, 0.8, (1, 3, 4, 3, 3))
    warp_it = jax.jit(functools.partial(warp, padding=padding))
    # 1e-2: what float32 finite differences can tell.
    arguments = (volume, displacement.astype(np.float32))
    check_grads(warp_it, arguments, order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_a_broken_coordinate_spoils_its_own_sample_only(mode, padding):
    volume = random_volume(3, 3, 3, 1)
    coordinates = np.ones((4, 3), np.float32)
    coordinates[1:, 0] = np.nan, np.inf, -np.inf
    samples = compiled_sample(volume, coordinates, mode=mode, padding=padding)
    assert samples[0, 0] == volume[1, 1, 1, 0]
    outside = [0, 0] if padding == "zeros" else [volume[2, 1, 1, 0], volume[0, 1, 1, 0]]
    np.testing.assert_array_equal(samples[2:, 0], outside)


def test_jit_and_vmap_change_nothing():
    volumes, displacements = random_volume(2, 1, 3, 4, 5, 2), random_volume(2, 1, 3, 4, 5, 3)
    one_by_one = [compiled_warp(v, u) for v, u in zip(volumes, displacements, strict=True)]
    together = jax.jit(jax.vmap(warp))(volumes, displacements)
    # Compiled as a whole, sums are contracted in another way.
    np.testing.assert_allclose(together, np.stack(one_by_one), atol=1e-6)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (((3, 3, 3), (2, 3)), {}),
        (((3, 3, 3, 1), (2, 2)), {}),
        (((3, 3, 3, 1), (2, 3)), {"mode": "cubic"}),
        (((3, 3, 3, 1), (2, 3)), {"padding": "reflect"}),
    ],
)
def test_sample_rejects_what_it_does_not_know(arguments, options):
    with pytest.raises(ValueError, match="must be"):
        sample(*map(jnp.zeros, arguments), **options)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("volume", "displacement"),
    [((1, 3, 3, 3, 1), (3, 3, 3, 3)), ((3, 3, 3, 1), (1, 3, 3, 3, 3)), ((2, 3, 3, 3, 1), (1, 3, 3, 3, 3))],
)
def test_warp_rejects_wrong_ranks_and_batches(volume, displacement):
    with pytest.raises(ValueError, match=r"must be|differ"):
        warp(jnp.zeros(volume), jnp.zeros(displacement))


def test_labels_are_warped_as_one_image_a_class():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (2, 4, 5, 6, 1)).astype(np.int32)
    displacement = rng.normal(0, 1, (2, 4, 5, 6, 3)).astype(np.float32)
    one_hot = (labels == np.arange(4)).astype(np.float32)
    expected = np.argmax(compiled_warp(one_hot, displacement), axis=-1)[..., None]
    warped = jax.jit(warp_labels, static_argnames="classes")(labels, displacement, classes=(0, 1, 2, 3))
    assert warped.dtype == np.int32
    # A tie is decided by rounding: almost every voxel has none.
    assert np.mean(np.asarray(warped) == expected) > 0.99


def test_labels_that_move_by_whole_voxels_stay_exact():
    labels = np.arange(24, dtype=np.int32).reshape(1, 2, 3, 4, 1) % 5
    displacement = np.zeros((1, 2, 3, 4, 3), np.float32)
    displacement[..., 2] = 1
    warped = warp_labels(jnp.asarray(labels), jnp.asarray(displacement), range(5))
    np.testing.assert_array_equal(warped[..., :-1, :], labels[..., 1:, :])
    with pytest.raises(ValueError, match="classes is empty"):
        warp_labels(jnp.asarray(labels), jnp.asarray(displacement), ())


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_many_channels_chunk_by_chunk_and_on_accelerators_are_those_of_the_whole(padding):
    random = np.random.default_rng(0)
    volume = jnp.asarray(random.standard_normal((2, 5, 4, 3, 6)), jnp.float32)
    # Beyond the border by two voxels, and on voxels.
    displacement = jnp.asarray(random.uniform(-4, 4, (2, 6, 3, 4, 3)), jnp.float32).at[:, ::2].set(0)
    cotangent = jnp.asarray(random.standard_normal((2, 6, 3, 4, 6)), jnp.float32)

    def value_and_gradients():
        result, pull_back = jax.vjp(lambda *a: warp(*a, padding=padding), volume, displacement)
        return result, pull_back(cotangent)

    expected = value_and_gradients()
    with budget.override(warp=8 * 4 * 6 * 3 * 4 * 2):  # two slices
        chex.assert_trees_all_close(value_and_gradients(), expected, atol=1e-5)
    with budget.override(platform="gpu"):  # one sum over the corners
        chex.assert_trees_all_close(value_and_gradients(), expected, atol=1e-5)
