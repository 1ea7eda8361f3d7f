"""Each function of a volume in slabs against itself on the whole volume, its gradients included."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from adregnet_jax.ops.convolution import IMPLEMENTATIONS, conv3d
from adregnet_jax.ops.cpu import budget
from adregnet_jax.ops.cpu.chunks import map_nearby
from adregnet_jax.ops.filters import box_mean, box_sum, gaussian_filter
from adregnet_jax.ops.grid import identity_grid
from adregnet_jax.ops.jacobian import jacobian_determinant, spatial_gradient
from adregnet_jax.ops.mind import mind_ssc
from adregnet_jax.ops.neighbourhood import neighbourhood_attention
from adregnet_jax.ops.resampling import resize, resize_displacement
from adregnet_jax.ops.sampling import sample_at_points, warp
from adregnet_jax.ops.slabs import halo, slab_count
from tests.slabs import check_slabs, in_slabs

RNG = np.random.default_rng(0)


def volume(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("repeat_border", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (0, 5), (3, 0)])
def test_halo_is_what_a_pad_of_the_whole_volume_has_there(before, after, repeat_border):
    """Slabs of two voxels: a halo of five comes from three devices."""
    whole = volume(1, 8, 2)
    padded = np.pad(whole, ((0, 0), (before, after), (0, 0)), mode="edge" if repeat_border else "constant")

    def extend(volume):
        return halo(volume, before, after, repeat_border=repeat_border)

    np.testing.assert_array_equal(extend(whole), padded)
    extended = np.asarray(in_slabs(extend, 4, whole[..., None]))[..., 0].reshape(4, -1, 2)
    for n in range(4):
        np.testing.assert_array_equal(extended[n], padded[0, 2 * n : 2 * n + 2 + before + after])


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_convolution(devices, implementation, request):
    if implementation == "onednn":
        request.getfixturevalue("with_onednn")

    def convolve(volume, kernel):
        kernel = kernel.reshape(3, 3, 3, 2, 3)
        return conv3d(volume, kernel, implementation=implementation)

    kernel = volume(3 * 3 * 3 * 2 * 3)  # flat: no volume in slabs
    check_slabs(convolve, devices, volume(2, 4, 3, 4, 2), kernel, differentiable=(0, 1))


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("scale", [0.0, 0.7, 6.0])
def test_warp_by_displacements_of_any_length(scale, padding, channels):
    """Nothing at all, where the gradients are one-sided; less than a voxel; across all slabs and beyond.

    Many channels go chunk by chunk, here a slice each.
    """
    moved = functools.partial(warp, padding=padding)
    displacement = scale * volume(2, 8, 3, 4, 3)
    with budget.override(warp=1):
        check_slabs(moved, 4, volume(2, 8, 3, 4, channels), displacement, differentiable=(0, 1))


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_warp_of_what_lies_beyond_the_border_alone(shift):
    displacement = np.full((1, 8, 3, 4, 3), shift, np.float32)
    check_slabs(warp, 4, volume(1, 8, 3, 4, 2), displacement, differentiable=(0,))


def test_warp_of_labels():
    labels = RNG.integers(0, 9, (1, 8, 3, 4, 1))
    check_slabs(functools.partial(warp, mode="nearest"), 4, labels, 3 * volume(1, 8, 3, 4, 3))


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_samples_at_points_of_any_slab(padding):
    points = np.concatenate([RNG.uniform(-2, 9, (1, 20, 3)), [[[1, 1, 1], [2, 0, 0], [7, 2, 3]]]], axis=1)
    function = functools.partial(sample_at_points, padding=padding)
    check_slabs(function, 4, volume(1, 8, 3, 4, 3), points.astype(np.float32), differentiable=(0, 1))


@pytest.mark.usefixtures("both_forms")
@pytest.mark.parametrize("chunk_bytes", [2**26, 1], ids=["one chunk", "a chunk a slice"])
@pytest.mark.parametrize("devices", [2, 4])
def test_neighbourhood_attention(devices, chunk_bytes):
    """Also of slabs that are large enough to go chunk by chunk, and of slabs too thin for that."""
    arrays = [volume(1, 4, 3, 4, 2) for _ in range(3)]
    with budget.override(attention=chunk_bytes):
        check_slabs(neighbourhood_attention, devices, *arrays, differentiable=(0, 1, 2))


def test_a_large_slab_goes_by_chunks_and_knows_its_neighbours():
    """Places, neighbours up to two slices away, parameters; the whole volume in one piece beside it."""

    def function(first, factor, a, b):
        x = first + jnp.arange(a.shape[1], dtype=jnp.float32)
        near = jnp.pad(a * b, [(0, 0), (2, 2), (0, 0), (0, 0), (0, 0)])
        far = near[:, :-4] - 3 * near[:, 4:]
        return factor[None, None, None, None] * far * x[None, :, None, None, None], a**2 * far

    def mapped(a, b, factor):
        limit = 2**26 if slab_count() == 1 else 1
        return map_nearby(function, [a, b], reach=2, slice_bytes=1, limit_bytes=limit, shared=factor)

    arrays = [volume(2, 12, 3, 4, 2) for _ in range(2)]
    for devices in (2, 3, 4):  # the last ones' slabs are thinner than what their ends need
        check_slabs(mapped, devices, *arrays, volume(2), differentiable=(0, 1, 2))


@pytest.mark.parametrize("factor", [2, 0.5, 4])
def test_resize(factor):
    # A function of the slab it is given, or of the whole.
    def resized(volume):
        shape = (int(volume.shape[1] * factor), 6, 3)
        return resize_displacement(resize(volume, shape), shape)

    check_slabs(resized, 4, volume(1, 8, 3, 4, 3), differentiable=(0,))


@pytest.mark.parametrize("width", [3, 5])
def test_filters(width):
    for function in (box_sum, box_mean, functools.partial(gaussian_filter, sigma=1.5)):
        check_slabs(functools.partial(function, width=width), 4, volume(1, 8, 5, 6, 2), differentiable=(0,))


@pytest.mark.parametrize("width", [1, 2])
def test_differences(width):
    displacement = volume(1, 4 * width, 3, 4, 3)
    check_slabs(
        functools.partial(spatial_gradient, spacing=(1.0, 2.0, 3.0)), 4, displacement, differentiable=(0,)
    )
    check_slabs(jacobian_determinant, 4, displacement, differentiable=(0,))


def test_mind():
    check_slabs(mind_ssc, 4, volume(1, 8, 5, 6, 1), differentiable=(0,))


def test_coordinates_are_those_of_the_whole_volume():
    def grid(volume):
        return identity_grid(volume.shape[1:4])[None] + 0 * volume

    check_slabs(grid, 4, np.zeros((1, 8, 3, 4, 3), np.float32), rtol=0)
