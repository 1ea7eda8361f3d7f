from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest

from adregnet_jax.losses import (
    mutual_information_loss,
    ncc_loss,
    ssd_loss,
    ssim_loss,
)
from tests.losses.gradients import assert_gradient_is_the_slope
from tests.oracles import losses as oracle

IMAGE_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "global ncc": partial(ncc_loss, window=0),
    "local ncc": partial(ncc_loss, window=5),
    "global ssim": partial(ssim_loss, window=0),
    "local ssim": partial(ssim_loss, window=5),
    "ssd": ssd_loss,
}
ORACLES = {
    "global ncc": oracle.ncc,
    "local ncc": lambda f, w, mask: oracle.local_squared_ncc(f, w, 5, mask),
    "global ssim": oracle.ssim,
    "local ssim": lambda f, w, mask: oracle.local_ssim(f, w, 5, mask),
    "ssd": lambda f, w, mask: 1 - ((f - w)[mask > 0] ** 2).mean(),
}
VALUE_AND_GRADIENT = {name: jax.jit(jax.value_and_grad(f, argnums=1)) for name, f in IMAGE_LOSSES.items()}
each_image_loss = pytest.mark.parametrize("name", IMAGE_LOSSES)


def slow_image_loss(name, *batches):
    pairs = zip(*(batch[..., 0].astype(np.float64) for batch in batches), strict=True)
    return np.mean([1 - ORACLES[name](*pair) for pair in pairs])


@each_image_loss
def test_image_losses_equal_their_oracles(name, images):
    fixed, warped, mask = images
    loss, _ = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    np.testing.assert_allclose(loss, slow_image_loss(name, fixed, warped, mask), atol=1e-5)


@each_image_loss
def test_image_losses_without_a_mask_equal_their_oracles(name, images):
    fixed, warped, _ = images
    loss = jax.jit(IMAGE_LOSSES[name])(fixed, warped)
    np.testing.assert_allclose(loss, slow_image_loss(name, fixed, warped, np.ones_like(fixed)), atol=1e-5)


@pytest.mark.usefixtures("both_forms")
def test_local_ncc_equals_its_oracle_in_both_forms(images):
    fixed, warped, mask = images
    value_and_gradient = jax.jit(jax.value_and_grad(IMAGE_LOSSES["local ncc"], argnums=1))
    loss, _ = value_and_gradient(fixed, warped, mask=mask)
    np.testing.assert_allclose(loss, slow_image_loss("local ncc", fixed, warped, mask), atol=1e-5)
    assert_gradient_is_the_slope(lambda w: value_and_gradient(fixed, w, mask=mask), warped)


@each_image_loss
def test_what_lies_outside_the_mask_changes_nothing(name, images):
    fixed, warped, mask = images
    garbage = np.where(mask > 0, 0, np.nan).astype(np.float32)
    garbage[:, 0] = 1e6
    clean, clean_gradient = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    soiled, soiled_gradient = VALUE_AND_GRADIENT[name](fixed + garbage, warped - garbage, mask=mask)
    np.testing.assert_array_equal(soiled, clean)
    np.testing.assert_array_equal(soiled_gradient, clean_gradient)
    np.testing.assert_array_equal(clean_gradient[mask == 0], 0)


@each_image_loss
def test_image_loss_gradients_match_finite_differences(name, images):
    fixed, warped, mask = images
    assert_gradient_is_the_slope(lambda w: VALUE_AND_GRADIENT[name](fixed, w, mask=mask), warped)


@each_image_loss
@pytest.mark.parametrize("case", ["fixed constant", "both constant", "mask empty"])
def test_image_losses_are_finite_with_finite_gradients(name, case, images):
    fixed, warped, mask = images
    if case != "mask empty":
        fixed = np.full_like(fixed, 0.3)
        warped = np.full_like(warped, 0.7) if case == "both constant" else warped
    mask = np.zeros_like(mask) if case == "mask empty" else mask
    value, gradient = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    assert np.isfinite(value)
    assert abs(gradient).max() < 1  # fails on NaN too


@each_image_loss
def test_image_losses_of_an_image_with_itself_are_zero(name, images):
    fixed, _, mask = images
    np.testing.assert_allclose(VALUE_AND_GRADIENT[name](fixed, fixed, mask=mask)[0], 0, atol=1e-5)


@pytest.mark.parametrize("name", ["global ncc", "local ncc"])
def test_ncc_is_blind_to_gain_and_offset(name, images):
    fixed, warped, mask = images
    loss, _ = VALUE_AND_GRADIENT[name](fixed, warped, mask=mask)
    # 1e-4: the addends that keep the quotients finite are not scaled along.
    changed, _ = VALUE_AND_GRADIENT[name](fixed, 0.5 * warped + 0.3, mask=mask)
    np.testing.assert_allclose(changed, loss, atol=1e-4)


def test_local_ncc_keeps_small_contrast_on_a_large_offset(images):
    fixed, warped, mask = images
    loss, _ = VALUE_AND_GRADIENT["local ncc"](fixed, warped, mask=mask)
    # On an offset of 4096, float32 keeps contrasts of 1 to 2.4e-4.
    offset, _ = VALUE_AND_GRADIENT["local ncc"](fixed + 4096, warped + 4096, mask=mask)
    np.testing.assert_allclose(offset, loss, atol=1e-3)


def test_the_floor_of_local_ncc_fades_out_what_is_nearly_flat():
    """A loud and a faint half: the faint one counts less with a floor, and the loud one as before."""
    random = np.random.default_rng(2)
    loud = np.arange(16)[:, None, None] < 8
    fixed, noise = random.normal(size=(2, 16, 12, 12)).astype(np.float32)
    fixed = fixed * np.where(loud, 1, 0.01)
    warped = fixed + noise * np.where(loud, 0, 0.01)

    def loss(half, floor):
        mask = np.broadcast_to(half, fixed.shape)[None, ..., None]
        return float(
            ncc_loss(fixed[None, ..., None], warped[None, ..., None], window=5, floor=floor, mask=mask)
        )

    everywhere = np.ones_like(loud)
    assert loss(loud, 0.05) < 0.01
    assert loss(everywhere, 0.0) < 0.35
    assert loss(everywhere, 0.5) > 0.45


def test_a_floor_keeps_local_ncc_blind_to_gain_and_offset(images):
    fixed, warped, mask = images
    changed = ncc_loss(fixed, 3 * warped - 2, window=5, floor=0.1, mask=mask)
    np.testing.assert_allclose(changed, ncc_loss(fixed, warped, window=5, floor=0.1, mask=mask), atol=1e-4)


def test_normalised_mutual_information_is_a_share_that_ignores_the_sign_of_contrast(images):
    fixed = np.asarray(images[0])
    other = np.random.default_rng(4).permutation(fixed.ravel()).reshape(fixed.shape)
    same, inverted, unrelated = (
        float(mutual_information_loss(fixed, volume, normalised=True)) for volume in (fixed, 1 - fixed, other)
    )
    np.testing.assert_allclose(same, inverted, atol=1e-5)
    assert -1 <= same < unrelated - 0.1 and unrelated <= 0
