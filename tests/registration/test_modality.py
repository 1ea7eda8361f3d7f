"""Whether two aligned scans have one contrast."""

import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.registration.modality import same_contrast

SHAPE = (24, 24, 24)


def scan(seed=0):
    """A textured ball before a dark background."""
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    ball = np.linalg.norm(np.indices(SHAPE).T - 11.5, axis=-1).T < 9
    return (ball * np.clip(0.6 + 2 * texture, 0.3, 1)).astype(np.float32)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_another_brightness_is_the_same_contrast(gamma):
    noise = np.random.default_rng(1).normal(0, 0.02, SHAPE).astype(np.float32)
    assert same_contrast(scan(), scan() ** gamma + noise)


def test_an_inverted_foreground_is_another_contrast():
    inverted = np.where(scan() > 0, 1.3 - scan(), 0).astype(np.float32)
    assert not same_contrast(scan(), inverted)


def test_a_contrast_that_rises_and_falls_is_another_one():
    bent = np.where(scan() > 0, 1 - 2 * np.abs(scan() - 0.6), 0).astype(np.float32)
    assert not same_contrast(scan(), bent)


def test_what_is_masked_out_does_not_count():
    moving = np.where(scan() > 0, 1.3 - scan(), 0).astype(np.float32)
    mask = np.zeros(SHAPE)
    mask[:, :, 12:] = 1
    moving = np.where(mask > 0, scan(), moving)
    assert same_contrast(scan(), moving, mask=mask)
    assert not same_contrast(scan(), moving, mask=1 - mask)


def test_scans_without_content_count_as_one_contrast():
    assert same_contrast(np.zeros(SHAPE, np.float32), scan())
    assert same_contrast(scan(), scan(), mask=np.zeros(SHAPE))
