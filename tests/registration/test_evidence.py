"""The smoothness of a deformation follows what regions agree on that its field didn't see."""

import functools
from typing import Any

import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.config import InstanceConfig
from adregnet_jax.registration.evidence import LADDER, weigh_evidence

SHAPE = (56, 52, 48)
CONFIG = InstanceConfig(factors=(2, 1), steps=(10, 10), strides=(2, 2), jacobian=0.0)


@functools.cache
def texture(seed=0, width=2.5):
    values = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), width, mode="wrap")
    return ((values - values.min()) / np.ptp(values)).astype(np.float32)


def moved(image, width, length):
    """The image displaced by a random smooth field of this width and RMS length in voxels."""
    field = np.random.default_rng(1).normal(size=(3, *SHAPE))
    field = np.stack([scipy.ndimage.gaussian_filter(component, width, mode="wrap") for component in field])
    field *= length / np.sqrt(np.mean(field**2))
    return scipy.ndimage.map_coordinates(image, np.indices(SHAPE) + field, order=1, mode="nearest")


def evidence(fixed, moving, **changes):
    options: dict[str, Any] = {"fixed_mask": None, "moving_mask": None, "modality": "mono", "config": CONFIG}
    found = weigh_evidence(fixed, moving, spacing_mm=(1.0, 1.0, 1.0), **options | changes)
    assert found is not None
    return found


@pytest.mark.parametrize("modality", ["mono", "multi"])
def test_a_smooth_motion_is_believed(modality):
    moving = moved(texture(), width=9, length=1.5)
    found = evidence(texture(), 1 - moving if modality == "multi" else moving, modality=modality)
    assert found.believable
    assert found.seen_gain > 0.05 and found.unseen_gain > 0.05


@pytest.mark.parametrize("modality", ["mono", "multi"])
def test_scans_of_different_things_have_no_motion(modality):
    """A field makes them more alike where it sees them, and nowhere else."""
    found = evidence(texture(), texture(seed=5), modality=modality)
    assert not found.believable
    assert found.seen_gain > 2 * found.unseen_gain


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_is_no_motion(noise):
    """Nor is it where interpolation between the voxels would smooth it away."""
    rng = np.random.default_rng(2)
    fixed, moving = (texture() + rng.normal(scale=noise, size=SHAPE).astype(np.float32) for _ in range(2))
    assert not evidence(fixed, moving).believable


def test_detailed_motion_allows_less_smoothness_than_smooth_motion():
    detailed, smooth = (
        evidence(texture(width=1.5), moved(texture(width=1.5), width=width, length=1.0)).smoothness
        for width in (4, 12)
    )
    assert detailed < smooth


def test_noise_asks_for_more_smoothness():
    moving = moved(texture(), width=6, length=1.5)
    noise = np.random.default_rng(3).normal(size=(2, *SHAPE))
    noise = scipy.ndimage.gaussian_filter(noise, (0, 1, 1, 1)).astype(np.float32)
    clear = evidence(texture(), moving)
    noisy = evidence(texture() + noise[0] * 0.8, moving + noise[1] * 0.8)
    assert noisy.smoothness > clear.smoothness


def test_masked_out_regions_have_no_influence():
    fixed, moving = texture(), moved(texture(), width=9, length=1.5)
    mask = np.ones(SHAPE, np.float32)
    mask[:12] = 0
    spoilt = np.where(mask > 0, fixed, np.float32(7))
    assert evidence(fixed, moving, fixed_mask=mask) == evidence(spoilt, moving, fixed_mask=mask)


def test_the_smoothness_stays_near_the_ladder():
    found = evidence(texture(), moved(texture(), width=9, length=1.5))
    assert LADDER[0] <= 2 * found.smoothness <= LADDER[-1]


def test_scans_too_small_to_be_divided_give_no_evidence():
    few = texture()[:13, :14, :15]
    found = weigh_evidence(
        few,
        few,
        spacing_mm=(1.0, 1.0, 1.0),
        fixed_mask=None,
        moving_mask=None,
        modality="mono",
        config=CONFIG,
    )
    assert found is None
