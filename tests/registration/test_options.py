"""Options are checked against each other, and select the right settings."""

import dataclasses
import json
from pathlib import Path

import pytest

from adregnet_jax.config import AffineConfig, instance_preset
from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import RegistrationOptions, ScanFiles


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method is 'magic': expected one of network, instance, both"),
        ({"modality": "pet"}, "modality is 'pet'"),
        (
            {"method": "instance", "weights": Path("run")},
            'method="instance" uses no network: drop the weights',
        ),
        ({"method": "instance", "tile": 32}, "no network that could run on tiles"),
        ({"rigid": True, "affine": False}, "contradict each other"),
        ({"apart": True, "affine": False}, "apart=True needs the affine step"),
        ({"method": "network", "effort": "fast"}, 'use method="both"'),
        ({"method": "network", "settings": {"smoothness": 1.0}}, 'use method="both"'),
        (
            {"settings": {"smothness": 1.0}},
            "settings.smothness doesn't exist: expected one of search_range_mm",
        ),
        ({"settings": {"factors": (4, 2, 1)}}, "settings.steps .*one entry per level"),
        ({"settings": {"affine.knd": "rigid"}}, r"settings\.affine\.knd doesn't exist: expected one of kind"),
        ({"settings": {"affine.kind": "bent"}}, r"settings\.affine\.kind is 'bent'"),
        ({"rigid": True, "settings": {"affine.kind": "affine"}}, "exclude each other"),
        ({"affine": False, "settings": {"affine.kind": "rigid"}}, "no effect with affine=False"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(UserError, match=message):
        RegistrationOptions(**options)


def test_options_stand_for_settings():
    assert RegistrationOptions().affine_config == AffineConfig()
    assert RegistrationOptions(rigid=True).affine_config == AffineConfig(kind="rigid")
    assert RegistrationOptions(affine=False).affine_config is None
    assert RegistrationOptions(method="network").instance_config is None
    alone = RegistrationOptions(method="instance", effort="fast", subjects="same")
    assert alone.instance_config == instance_preset("fast", "same")
    assert not alone.by_network
    changed = RegistrationOptions(
        effort="fast", diffeomorphic=True, settings={"smoothness": 0.7, "steps": (7,)}
    )
    preset = instance_preset("fast", after_network=True)
    expected = dataclasses.replace(preset, diffeomorphic=True, smoothness=0.7, steps=(7,))
    assert changed.instance_config == expected


def test_the_record_is_json():
    record = RegistrationOptions(weights=Path("run"), tile=64).record()
    assert json.loads(json.dumps(record)) == record
    assert (record["weights"], record["tile"], record["affine"]["kind"]) == ("run", 64, "affine")
    assert record["instance"]["steps"] == list(instance_preset(after_network=True).steps)


def test_files_of_one_scan_alone():
    with pytest.raises(UserError, match="fixed_labels and moving_labels belong together"):
        ScanFiles(Path("a"), Path("b"), fixed_labels=Path("c"))
    given = ScanFiles(Path("a"), Path("b"), fixed_mask=Path("c")).given()
    assert given == {"fixed": Path("a"), "moving": Path("b"), "fixed_mask": Path("c")}


def test_settings_reach_the_affine_step():
    options = RegistrationOptions(method="network", settings={"affine.max_stretch": 2.0})
    assert options.affine_config == AffineConfig(max_stretch=2.0)
    both = RegistrationOptions(settings={"affine.kind": "similarity", "ncc_window": 7})
    assert both.affine_config == AffineConfig(kind="similarity")
    assert both.instance_config == dataclasses.replace(instance_preset(after_network=True), ncc_window=7)


def test_the_smoothness_is_chosen_unless_it_is_given():
    assert RegistrationOptions().adaptive
    assert not RegistrationOptions(subjects="same").adaptive
    assert not RegistrationOptions(settings={"smoothness": 0.5}).adaptive
