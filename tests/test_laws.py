"""Laws that hold for whatever input: a turned body is the same body, a file gives back what it was given."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from adregnet_jax import losses, metrics
from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.points import read_points, write_points
from adregnet_jax.data.io.transforms import read_field, read_matrix, write_field, write_matrix
from adregnet_jax.ops.composition import compose, exponential, invert
from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant
from adregnet_jax.ops.sampling import warp

AXES = st.permutations([0, 1, 2])
SIGNS = st.tuples(*[st.sampled_from([1, -1])] * 3)
SEEDS = st.integers(0, 2**16)
SHAPE = (7, 7, 7)  # of one size, so that no turn compiles anew
several = settings(max_examples=15, deadline=None, derandomize=True)


def turned(volume, axes, signs):
    """[b, x, y, z, c] with its axes exchanged, then flipped where the sign is -1."""
    volume = np.transpose(volume, (0, *(1 + axis for axis in axes), 4))
    return np.flip(volume, tuple(1 + axis for axis in range(3) if signs[axis] < 0))


def turned_field(displacement, axes, signs):
    """The same map of the turned body: its vectors turn with it."""
    return np.ascontiguousarray(turned(displacement, axes, signs)[..., list(axes)] * np.float32(signs))


def images(seed, count=2):
    rng = np.random.default_rng(seed)
    return [rng.random((1, *SHAPE, 1), np.float32) for _ in range(count)]


def smooth_field(seed, size=1.0):
    noise = np.random.default_rng(seed).normal(size=(*SHAPE, 3))
    smooth = scipy.ndimage.gaussian_filter(noise, (1.5, 1.5, 1.5, 0))
    return (size * smooth / np.abs(smooth).max())[None].astype(np.float32)


@pytest.mark.parametrize("padding", ["border", "zeros"])
@several
@given(axes=AXES, signs=SIGNS, seed=SEEDS)
def test_a_turned_body_is_warped_alike(padding, axes, signs, seed):
    (moving,) = images(seed, 1)
    field = smooth_field(seed, 3.0)
    there = jax.jit(warp, static_argnames="padding")
    expected = turned(there(moving, field, padding=padding), axes, signs)
    found = there(turned(moving, axes, signs), turned_field(field, axes, signs), padding=padding)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("operation", [invert, exponential])
@several
@given(axes=AXES, signs=SIGNS, seed=SEEDS)
def test_maps_of_a_turned_body_are_the_turned_maps(operation, axes, signs, seed):
    field = smooth_field(seed)
    expected = turned_field(jax.jit(operation)(field), axes, signs)
    np.testing.assert_allclose(jax.jit(operation)(turned_field(field, axes, signs)), expected, atol=1e-4)


@several
@given(axes=AXES, signs=SIGNS, seed=SEEDS)
def test_composition_turns_with_the_body(axes, signs, seed):
    fields = smooth_field(seed), smooth_field(seed + 1)
    expected = turned_field(jax.jit(compose)(*fields), axes, signs)
    found = jax.jit(compose)(*(turned_field(field, axes, signs) for field in fields))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@several
@given(axes=AXES, signs=SIGNS, seed=SEEDS)
def test_folds_and_volumes_do_not_depend_on_the_axes(axes, signs, seed):
    field = smooth_field(seed, 4.0)
    other = turned_field(field, axes, signs)
    determinant = np.asarray(jax.jit(jacobian_determinant)(field))[..., None]
    found = np.asarray(jax.jit(jacobian_determinant)(other))[..., None]
    np.testing.assert_allclose(found, turned(determinant, axes, signs), atol=1e-4)
    # Cells are cut into tetrahedra along a diagonal, which a turn takes to another one.
    assert abs(float(folded_volume(field)[0]) - float(folded_volume(other)[0])) < 0.1


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(losses.ncc_loss, window=3),
        functools.partial(losses.ncc_loss, window=0),
        functools.partial(losses.ssim_loss, window=3),
        losses.ssd_loss,
        losses.mutual_information_loss,
    ],
    ids=["local_ncc", "ncc", "ssim", "ssd", "mutual_information"],
)
@several
@given(axes=AXES, signs=SIGNS, seed=SEEDS)
def test_similarity_does_not_depend_on_the_axes(loss, axes, signs, seed):
    fixed, warped = images(seed)
    found = loss(turned(fixed, axes, signs), turned(warped, axes, signs))
    np.testing.assert_allclose(found, loss(fixed, warped), atol=1e-4)


@pytest.mark.parametrize("loss", [losses.smoothness_loss, losses.bending_energy_loss])
@several
@given(axes=AXES, signs=SIGNS, seed=SEEDS)
def test_regularity_does_not_depend_on_the_axes(loss, axes, signs, seed):
    field, spacing_mm = smooth_field(seed), np.array([[1.0, 1.5, 2.0]], np.float32)
    found = loss(turned_field(field, axes, signs), spacing_mm[:, list(axes)])
    np.testing.assert_allclose(found, loss(field, spacing_mm), rtol=1e-4)


@several
@given(gain=st.floats(0.03, 1e4), offset=st.floats(-1e3, 1e3), seed=SEEDS)
def test_correlation_does_not_depend_on_the_scanner_s_units(gain, offset, seed):
    fixed, warped = images(seed)
    other = np.float32(gain) * warped + np.float32(offset)
    expected = metrics.ncc(fixed[0, ..., 0], warped[0, ..., 0])
    # What float32 keeps of the contrast beside the offset. Lower gains meet the guard against 0 / 0.
    tolerance = 1e-3 + 1e-6 * abs(offset) / gain
    np.testing.assert_allclose(metrics.ncc(fixed[0, ..., 0], other[0, ..., 0]), expected, atol=tolerance)


@st.composite
def grids(draw):
    """A shape, and an affine with any orientation, spacing and place."""
    shape = draw(st.tuples(*[st.integers(2, 6)] * 3))
    angles = draw(st.tuples(*[st.floats(-180, 180)] * 3))
    spacing_mm = draw(st.tuples(*[st.floats(0.05, 20)] * 3))
    signs, axes = draw(SIGNS), draw(AXES)
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    affine[:3, :3] = (turn * np.array(spacing_mm) * np.array(signs))[:, list(axes)]
    affine[:3, 3] = draw(st.tuples(*[st.floats(-2000, 2000)] * 3))
    return shape, affine


def check_affine(found, affine, shape):
    """Both put every voxel at the same place, to what float32 keeps of it."""
    corner = np.array([0, *shape])[1:]
    for voxel in (np.zeros(3), corner):
        here, there = (nib.affines.apply_affine(matrix, voxel) for matrix in (found, affine))
        np.testing.assert_allclose(here, there, atol=2e-3)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(grid=grids(), dtype=st.sampled_from(["uint8", "int16", "int32", "float32", "float64"]), seed=SEEDS)
def test_an_image_comes_back_from_its_file(suffix, grid, dtype, seed):
    shape, affine = grid
    values = np.random.default_rng(seed).uniform(0, 255, shape).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"scan{suffix}"
        write_image(path, Image(values, affine))
        found = read_image(path)
    np.testing.assert_allclose(found.values, values, rtol=1e-6)
    check_affine(found.affine, affine, shape)


@pytest.mark.parametrize("name", ["field.nii.gz", "field.npz", "field.h5"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(grid=grids(), seed=SEEDS)
def test_a_field_comes_back_from_its_file(name, grid, seed):
    shape, affine = grid
    displacement = np.random.default_rng(seed).normal(0, 3, (*shape, 3)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write_field(path, displacement, affine)
        found, found_affine = read_field(path)
    np.testing.assert_allclose(found, displacement, atol=1e-3)
    if name != "field.npz":  # which, as Learn2Reg has it, holds no affine
        check_affine(found_affine, affine, shape)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(grid=grids(), suffix=st.sampled_from([".csv", ".fcsv", ".mrk.json"]), seed=SEEDS)
def test_points_and_matrices_come_back_from_their_files(grid, suffix, seed):
    points_mm = np.random.default_rng(seed).uniform(-500, 500, (5, 3))
    with tempfile.TemporaryDirectory() as folder:
        write_points(Path(folder) / f"points{suffix}", points_mm)
        np.testing.assert_allclose(read_points(Path(folder) / f"points{suffix}"), points_mm, atol=1e-5)
        write_matrix(Path(folder) / "affine.txt", grid[1])
        np.testing.assert_allclose(read_matrix(Path(folder) / "affine.txt"), grid[1], atol=1e-6)


@several
@given(seed=SEEDS)
def test_a_map_and_its_inverse_cancel_inside(seed):
    field = smooth_field(seed, 0.5)
    there_and_back = np.asarray(jax.jit(compose)(jnp.asarray(field), jax.jit(invert)(field)))
    np.testing.assert_allclose(there_and_back[:, 1:-1, 1:-1, 1:-1], 0, atol=2e-2)
