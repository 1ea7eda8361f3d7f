"""What `register` advises where memory runs out."""

import jax
import numpy as np
import pytest

from adregnet_jax.cli import register
from adregnet_jax.data.io import nifti
from adregnet_jax.registration.options import RegistrationOptions, ScanFiles
from adregnet_jax.training import memory

GIB = 2**30


@pytest.fixture
def scans(tmp_path):
    for name in ("fixed", "moving"):
        values = np.random.default_rng(0).random((12, 10, 8), np.float32)
        nifti.write_volume(tmp_path / f"{name}.nii.gz", values, np.eye(4))
    return ScanFiles(tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz")


@pytest.fixture
def plans(monkeypatch):
    """Plans of 4 GiB, half of that for the effort "fast", in proportion to the voxels."""

    def planned(shape, spacing_mm, options):
        assert np.prod(shape) * np.prod(spacing_mm) == pytest.approx(12 * 10 * 8)
        return int(4 * GIB * np.prod(shape) / (12 * 10 * 8)) // (1 + (options.effort == "fast"))

    monkeypatch.setattr(register, "planned_bytes", planned)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (5.0, register.MEMORY_ADVICE),
        (3.0, "--effort fast takes 2.0 GiB; scans with voxels of twice the size take 0.5 GiB"),
        (1.0, "scans with voxels of twice the size take 0.5 GiB"),
        (0.1, register.MEMORY_ADVICE),
    ],
)
def test_what_fits_is_named_with_its_plan(free, expected, scans, plans, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda _devices: int(free * GIB))
    advice = register.memory_advice(scans, RegistrationOptions(), jax.devices()[0])
    assert advice.endswith(expected)
    plan = f"the optimisation takes 4.0 GiB by its plan, and {free} GiB are free: "
    assert advice == (expected if free > 4 else plan + expected)


def test_a_plan_that_fails_leaves_the_general_advice(scans, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(register, "planned_bytes", fails)
    assert register.memory_advice(scans, RegistrationOptions(), jax.devices()[0]) == register.MEMORY_ADVICE


def test_plans_grow_with_the_voxels():
    options = RegistrationOptions(method="instance", effort="fast", settings={"steps": (1,)})
    small, large = (register.planned_bytes((n, n, n), (1.0, 1.0, 1.0), options) for n in (8, 16))
    assert 2 * small < large < 2**24
