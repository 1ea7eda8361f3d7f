"""Instance optimisation finds known motions from the images alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.config import InstanceConfig
from adregnet_jax.errors import UserError
from adregnet_jax.ops.composition import compose
from adregnet_jax.ops.jacobian import folded_volume, jacobian_determinant
from adregnet_jax.ops.sampling import warp
from adregnet_jax.registration.instance import align

SHAPE = (22, 20, 18)  # no multiple of the factors
SPACING_MM = (1.0, 1.0, 1.0)
CONFIG = InstanceConfig(
    search_range_mm=0.0, factors=(2, 1), steps=(20, 20), strides=(2, 2), smoothness=0.3, jacobian=0.0
)
INSIDE = (0, slice(4, -5), slice(4, -4), slice(4, -4))


@functools.cache
def compiled(config, spacing_mm=SPACING_MM):
    return jax.jit(functools.partial(align, spacing_mm=spacing_mm, config=config))


def settings(**changes):
    return dataclasses.replace(CONFIG, **changes)


def scan(seed=0, shape=SHAPE):
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5, mode="wrap")
    return ((texture - texture.min()) / np.ptp(texture)).astype(np.float32)


def shifted(image, shift):
    return scipy.ndimage.shift(image, shift, order=1, mode="nearest")


def batch(*images):
    return [jnp.asarray(image)[None, ..., None] for image in images]


@pytest.fixture(scope="module")
def images():
    """A textured scan, and the same one 1.5 voxels on along axis 0."""
    fixed = scan()
    return batch(fixed, shifted(fixed, (1.5, 0, 0)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"similarity": "ssd", "smoothness": 0.01},
        {"similarity": "mi", "smoothness": 0.03},
        {"similarity": "mind"},
        {"bending": 0.3, "smoothness": 0.0, "jacobian": 1.0},
        {"diffeomorphic": True},
        {"diffeomorphic": True, "symmetric": True},
        {"tolerance": 1e-4},
    ],
    ids=str,
)
def test_a_known_shift_is_found(images, changes):
    found = compiled(settings(**changes))(*images)
    displacement, inverse = found.displacement, found.inverse
    assert np.median(np.abs(np.asarray(displacement[INSIDE]) - [1.5, 0, 0])) < 0.25
    before, after = (
        np.mean((warp(images[1], u) - images[0])[INSIDE] ** 2)
        for u in (jnp.zeros_like(displacement), displacement)
    )
    assert after < before / 5
    assert (inverse is not None) == changes.get("diffeomorphic", False)


def test_inverted_contrast_is_registered(images):
    fixed, moving = images
    for similarity in ("ncc", "mi", "mind"):
        smoothness = 0.03 if similarity == "mi" else 0.3
        config = settings(similarity=similarity, smoothness=smoothness)
        displacement = compiled(config)(fixed, 1 - moving**2).displacement
        assert np.median(np.abs(np.asarray(displacement[INSIDE]) - [1.5, 0, 0])) < 0.25, similarity


def test_a_large_shift_is_found_by_the_search_alone():
    # The scan is larger, so that part of it stays in view after a shift by 10 voxels.
    fixed = scipy.ndimage.zoom(scan(), 2, order=1)
    images = batch(fixed, shifted(fixed, (10, -4, 0)))
    found = {}
    for search in (0.0, 14.0):
        config = settings(search_range_mm=search, factors=(2,), steps=(30,), strides=(2,))
        displacement = compiled(config)(*images).displacement
        found[search] = np.median(np.abs(np.asarray(displacement[0, 6:-16, 8:-6, 6:-6]) - [10.0, -4, 0]))
    assert found[14.0] < 0.4 < 2 < found[0.0]


def test_the_range_of_the_search_is_in_mm():
    fixed = scipy.ndimage.zoom(scan(), 2, order=1)
    images = batch(fixed, shifted(fixed, (8, 0, 0)))
    config = settings(search_range_mm=14.0, factors=(2,), steps=(0,), strides=(2,))
    # 8 voxels are 8 mm, in reach, or 64 mm.
    near, far = (
        compiled(config, (mm, mm, mm))(*images).displacement[0, 8:-14, 8:-8, 8:-8, 0] for mm in (1.0, 8.0)
    )
    assert np.median(near) > 6
    assert np.median(far) < 5


def test_anisotropic_voxels_are_pooled_to_even_ones(images):
    displacement = compiled(settings(), (1.0, 1.0, 3.0))(*images).displacement
    assert np.median(np.abs(np.asarray(displacement[INSIDE]) - [1.5, 0, 0])) < 0.25


def test_a_diffeomorphism_has_its_inverse_and_no_folds(images):
    # A motion that would fold a free field: separate parts pass through each other.
    fixed, moving = batch(scan(0), scan(1))
    found = compiled(settings(diffeomorphic=True, smoothness=0.05))(fixed, moving)
    displacement, inverse = found.displacement, found.inverse
    assert np.abs(displacement).max() > 1
    assert folded_volume(displacement)[0] == 0
    error = np.linalg.norm(compose(inverse, displacement)[INSIDE], axis=-1)
    assert np.median(error) < 0.1
    assert np.percentile(error, 99) < 0.5


def test_no_steps_leave_a_start_as_it_is(images):
    start = jax.random.normal(jax.random.key(0), (1, *SHAPE, 3))
    config = settings(steps=(0, 0), unfold=False)
    np.testing.assert_allclose(align(*images, start=start, config=config).displacement, start)


def test_folds_are_smoothed_and_the_rest_kept(images):
    bump = np.zeros((1, *SHAPE, 3), np.float32)
    bump[0, 6:9, 8:11, 8:11, 0] = -4  # more than a voxel against its neighbours
    assert folded_volume(bump)[0] > 0
    still = settings(steps=(0, 0))
    unfolded = align(*images, start=jnp.asarray(bump), config=still).displacement
    assert jacobian_determinant(unfolded).min() > 0
    assert np.abs(unfolded).max() > 0.5
    np.testing.assert_allclose(unfolded[:, 16:], bump[:, 16:])


def test_folds_between_voxels_are_smoothed(images):
    """A displacement that alternates from voxel to voxel turns tetrahedra, not central differences, over."""
    ripple = np.zeros((1, *SHAPE, 3), np.float32)
    ripple[0, 8:12, 8:12, 8:12, 0] = 0.6 * (-1) ** np.arange(8, 12)[:, None, None]
    assert jacobian_determinant(ripple).min() > 0.05
    assert folded_volume(ripple)[0] > 0
    unfolded = align(*images, start=jnp.asarray(ripple), config=settings(steps=(0, 0))).displacement
    assert folded_volume(unfolded)[0] == 0
    np.testing.assert_allclose(unfolded[:, 18:], ripple[:, 18:])


def test_the_search_ignores_masked_out_regions():
    fixed = scipy.ndimage.zoom(scan(), 2, order=1)
    moving = shifted(fixed, (8, 0, 0))
    # A third of the scan shows another motion.
    fixed[-16:], moving[-16:] = scan(5, fixed[-16:].shape), scan(6, fixed[-16:].shape)
    mask = np.ones_like(fixed)
    mask[-16:] = 0
    config = settings(search_range_mm=12.0, factors=(2,), steps=(0,), strides=(2,))
    found = [
        compiled(config)(*batch(fixed, moving), **masks).displacement[0, 4:20, 8:-8, 8:-8, 0]
        for masks in ({}, {"fixed_mask": batch(mask)[0], "moving_mask": batch(mask)[0]})
    ]
    # Other contents of the masked part have no influence.
    fixed[-12:] = 0.3
    spoilt = compiled(config)(
        *batch(fixed, moving), fixed_mask=batch(mask)[0], moving_mask=batch(mask)[0]
    ).displacement[0, 4:20, 8:-8, 8:-8, 0]
    assert np.median(found[1]) > 6
    np.testing.assert_allclose(spoilt, found[1], atol=0.5)


@pytest.mark.parametrize("which", ["fixed", "moving"])
def test_masked_out_regions_have_no_influence(images, which):
    fixed, moving = images
    mask = jnp.ones_like(fixed).at[:, :8].set(0)
    # Well inside of what is left out: windows and interpolation reach over its border.
    spoilt = {"fixed": fixed, "moving": moving}
    spoilt[which] = spoilt[which].at[:, :4].set(0.7)
    masks = {f"{which}_mask": mask}
    config = settings(factors=(1,), steps=(20,), strides=(2,))
    clean = compiled(config)(fixed, moving, **masks).displacement
    # Sums run over other numbers outside the mask before these are left out.
    np.testing.assert_allclose(compiled(config)(**spoilt, **masks).displacement, clean, atol=2e-3)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_vmap_and_batch_equal_the_loop(images, tolerance):
    pairs = [jnp.stack([image, image[:, ::-1]]) for image in images]
    one = compiled(settings(tolerance=tolerance))
    alone = np.stack([one(f, m).displacement for f, m in zip(*pairs, strict=True)])
    together = jax.jit(jax.vmap(lambda f, m: one(f, m).displacement))(*pairs)
    batched = one(*(pair[:, 0] for pair in pairs)).displacement
    # 40 steps of Adam amplify the rounding of other orders of summation.
    np.testing.assert_allclose(together, alone, atol=2e-2)
    np.testing.assert_allclose(batched, alone[:, 0], atol=2e-2)


def test_the_gradient_is_that_of_finite_differences(images):
    fixed, moving = images
    config = settings(factors=(1,), steps=(3,), strides=(2,), similarity="ssd", learning_rate=0.02)
    direction = jnp.asarray(scan(3))[None, ..., None] - 0.5
    # Half way between voxels: where linear interpolation has its kinks no gradient holds.
    start = jnp.full((1, *SHAPE, 3), 0.5)
    weights = jnp.array([1.0, 2.0, 3.0])[None, None, None, None]

    @jax.jit
    def downstream(scale):
        aligned = align(fixed, moving + scale * direction, start=start, config=config)
        return jnp.sum(aligned.displacement * weights)

    slope = jax.jit(jax.grad(downstream))(0.02)
    step = 2e-3
    difference = (downstream(0.02 + step) - downstream(0.02 - step)) / (2 * step)
    assert abs(slope) > 1
    np.testing.assert_allclose(slope, difference, rtol=0.02)


def test_settings_are_checked(images):
    with pytest.raises(UserError, match=r"learning_rate is 0\.0"):
        align(*images, config=settings(learning_rate=0.0))


@pytest.mark.usefixtures("unchecked_types")
def test_shapes_are_checked(images):
    fixed, moving = images
    with pytest.raises(ValueError, match="on one grid"):
        align(fixed, moving[:, 1:], config=CONFIG)
    with pytest.raises(ValueError, match="start"):
        align(fixed, moving, start=jnp.zeros((1, 4, 4, 4, 3)), config=CONFIG)
    with pytest.raises(ValueError, match="mask"):
        align(fixed, moving, fixed_mask=fixed[..., 0], config=CONFIG)
    with pytest.raises(ValueError, match="spacing_mm"):
        align(fixed, moving, spacing_mm=(1.0, 0.0, 1.0), config=CONFIG)
