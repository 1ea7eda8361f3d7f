"""Refinement on one pair: it finds a known motion, by the images alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.config import LossConfig, RefinementConfig
from adregnet_jax.losses import total_loss
from adregnet_jax.ops.sampling import warp
from adregnet_jax.refinement import refine

SHAPE = (16, 14, 12)
LOSS = LossConfig(ncc_window=5)
CONFIG = RefinementConfig(steps=40, learning_rate=0.1, stride=2, smoothness=1.0)
SPACING_MM = jnp.ones((1, 3))
refined = jax.jit(functools.partial(refine, loss=LOSS, config=CONFIG))


@pytest.fixture(scope="module")
def images():
    """A textured scan, and the same one 1.5 voxels on along axis 0."""
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 1.5, mode="wrap")
    fixed = ((texture - texture.min()) / np.ptp(texture)).astype(np.float32)
    moving = scipy.ndimage.shift(fixed, (1.5, 0, 0), order=1, mode="nearest")
    return [jnp.asarray(image)[None, ..., None] for image in (fixed, moving)]


def test_a_known_shift_is_found(images):
    displacement = refined(*images, jnp.zeros((1, *SHAPE, 3)), SPACING_MM)
    inside = np.asarray(displacement)[0, 3:-4, 3:-3, 3:-3]
    assert np.median(np.abs(inside - [1.5, 0, 0])) < 0.15
    before, after = (
        float(jnp.mean((warp(images[1], u) - images[0]) ** 2))
        for u in (jnp.zeros_like(displacement), displacement)
    )
    assert after < before / 5


def test_the_loss_of_the_images_falls_from_where_it_starts(images):
    fixed, moving = images
    batch = {"fixed": fixed, "mask": jnp.ones_like(fixed), "spacing_mm": SPACING_MM}
    loss = LossConfig(ncc_window=5, smoothness=CONFIG.smoothness, landmark=0)
    start = jnp.zeros((1, *SHAPE, 3)).at[..., 0].set(1.0)
    before, after = (
        total_loss(batch, u, warp(moving, u), loss)[0]
        for u in (start, refined(fixed, moving, start, SPACING_MM))
    )
    assert after < before


def test_no_steps_leave_the_displacement_alone(images):
    start = jax.random.normal(jax.random.key(0), (1, *SHAPE, 3))
    none = refine(*images, start, SPACING_MM, loss=LOSS, config=RefinementConfig(steps=0))
    np.testing.assert_array_equal(none, start)


def test_what_the_mask_leaves_out_has_no_part(images):
    fixed, moving = images
    mask = jnp.ones_like(fixed).at[:, :4].set(0)
    start = jnp.zeros((1, *SHAPE, 3))
    spoilt = refined(fixed.at[:, :4].set(0.7), moving, start, SPACING_MM, mask=mask)
    # Sums run over other numbers outside the mask before these are left out.
    np.testing.assert_allclose(spoilt, refined(fixed, moving, start, SPACING_MM, mask=mask), atol=1e-4)


def test_vmap_equals_a_batch(images):
    pairs = [jnp.stack([image, image[:, ::-1]]) for image in images]
    start = jnp.zeros((2, 1, *SHAPE, 3))
    together = jax.jit(jax.vmap(lambda f, m, u: refine(f, m, u, SPACING_MM, loss=LOSS, config=CONFIG)))
    alone = [refined(f, m, u, SPACING_MM) for f, m, u in zip(*pairs, start, strict=True)]
    # 40 steps of Adam carry the rounding of other orders of summation on.
    np.testing.assert_allclose(together(*pairs, start), np.stack(alone), atol=2e-2)


def test_shapes_are_checked(images):
    with pytest.raises(ValueError, match="displacement"):
        refine(*images, jnp.zeros((1, 4, 4, 4, 3)), SPACING_MM, loss=LOSS, config=CONFIG)
