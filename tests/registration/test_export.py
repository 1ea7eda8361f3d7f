"""The exported program runs in a process without the package."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from adregnet_jax.config import InstanceConfig
from adregnet_jax.registration.export import export_register
from adregnet_jax.registration.instance import align
from tests.registration.test_field import smooth

SHAPE, SPACING_MM = (12, 10, 8), (1.0, 1.5, 2.0)
LOADER = """
import sys, jax, numpy, jax.export
program = jax.export.deserialize(bytearray(open("program.bin", "rb").read()))
fixed, moving = numpy.load("pair.npy")
displacement, warped = jax.jit(program.call)(fixed, moving)
numpy.savez("out.npz", displacement=displacement, warped=warped)
print(program.platforms, "adregnet_jax" in sys.modules)
"""


def test_the_program_runs_without_the_package(tmp_path):
    settings = InstanceConfig(
        steps=(3,), factors=(1,), strides=(2,), search_range_mm=2, similarity="ssd", smoothness=0.01
    )
    (tmp_path / "program.bin").write_bytes(export_register(SHAPE, SPACING_MM, instance=settings))
    # Any batch: of three, while nothing was told of it.
    pair = np.stack([smooth((3, *SHAPE, 1), (0, 2, 2, 2, 0), seed=k) for k in range(2)])
    pair = (pair - pair.min()) / np.ptp(pair)
    np.save(tmp_path / "pair.npy", pair)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOADER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.stdout == "('cpu', 'cuda') False\n", done.stderr

    @jax.jit
    def by_hand(fixed, moving):
        return align(fixed, moving, spacing_mm=SPACING_MM, config=settings)

    expected = by_hand(*pair)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["displacement"], expected.displacement, atol=1e-3)
        np.testing.assert_allclose(found["warped"], expected.warped, atol=1e-3)
    assert np.abs(expected.displacement).max() > 0.5


def test_nothing_to_export():
    with pytest.raises(ValueError, match="a model, instance settings or both"):
        export_register(SHAPE, SPACING_MM)
