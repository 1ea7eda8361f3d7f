import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from adregnet_jax.nn.ascent import STEP, AscentStep, level_ascent
from adregnet_jax.ops.ncc import local_squared_ncc
from adregnet_jax.ops.resampling import resize_displacement
from adregnet_jax.ops.sampling import warp

RNG = np.random.default_rng(0)


def blobs(*shape):
    image = ndimage.gaussian_filter(RNG.random(shape, np.float32), 1.5)
    return (image - image.min()) / np.ptp(image)


# The same smooth image, and the displacement of two voxels that would bring it back.
FIXED = blobs(16, 20, 12)
MOVING = np.roll(FIXED, 2, axis=0)
IMAGES = jnp.stack([FIXED, MOVING])[..., None]
START = jnp.zeros((1, 8, 10, 6, 3))  # of a level at half the resolution
CONTEXT = jnp.asarray(RNG.random((1, 8, 10, 6, 4), np.float32))


def new_step(window=5):
    module = AscentStep(4, window)
    params = module.init(jax.random.key(0), IMAGES, START, START, CONTEXT)
    return jax.jit(lambda *arguments: module.apply(params, *arguments))


def test_a_new_step_is_the_smoothed_ascent():
    step = new_step()(IMAGES, START, START, CONTEXT)
    ascent = np.array(level_ascent(IMAGES, START, 5))[0]
    binomial = np.array([0.25, 0.5, 0.25])
    for axis in range(3):
        ascent = ndimage.convolve1d(ascent, binomial, axis=axis, mode="constant")
    assert np.abs(STEP * ascent).max() > 0.3  # voxels
    # What the features add is small, not nothing: else they could not learn.
    np.testing.assert_allclose(step[0], STEP * ascent, atol=0.02)
    assert np.abs(step[0] - STEP * ascent).max() > 0


def test_new_steps_bring_the_images_together():
    step, displacement, before = new_step(), START, START

    def similarity(displacement):
        warped = warp(IMAGES[1:], resize_displacement(displacement, FIXED.shape))
        return local_squared_ncc(IMAGES[:1, ..., 0] - 0.5, warped[..., 0] - 0.5, 5).mean()

    similarities = [similarity(displacement)]
    for _ in range(8):
        before = step(IMAGES, displacement, before, CONTEXT)
        displacement = displacement + before
        similarities.append(similarity(displacement))
    assert similarities[0] < 0.5 < 0.85 < similarities[-1]
    # Towards the image's own motion, of one voxel of the level; near the border there is nothing to see.
    np.testing.assert_allclose(
        np.median(displacement[0, 2:-2, 2:-2, 2:-2], axis=(0, 1, 2)), [1, 0, 0], atol=0.2
    )


def test_the_ascent_of_a_level_is_that_of_one_voxel_that_moves_its_whole_block():
    displacement = jnp.asarray(RNG.normal(size=START.shape), jnp.float32)
    ascent = level_ascent(IMAGES, displacement, 5)
    full = resize_displacement(displacement, FIXED.shape)
    by_voxel = level_ascent(IMAGES, full, 5)[0]  # a level at the full resolution
    sums = by_voxel.reshape(8, 2, 10, 2, 6, 2, 3).sum((1, 3, 5))
    np.testing.assert_allclose(8 * ascent[0], sums, atol=1e-5)
