"""The examples run and show what they say."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from adregnet_jax.data.io.images import Image, write_image
from tests.registration.test_field import AFFINE, SHAPE, smooth

pytestmark = pytest.mark.program

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs an example and gives the numbers that it prints, line by line."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        return [[float(number) for number in re.findall(r"-?\d+\.\d+", line)] for line in lines]

    return run


def test_ops_alone(told):
    difference, residual, volumes, folded, slope = told("ops_alone.py")
    assert 0 < difference[0] < 0.05
    assert residual[0] < 0.02
    assert 0 < volumes[0] < 1 < volumes[1]
    assert folded[0] == 0
    assert slope[0] < 0


def test_downstream_gradient(told):
    (by_grad, by_differences), (gamma, *_, loss) = told("downstream_gradient.py")
    assert by_grad == pytest.approx(by_differences, rel=0.1)
    assert abs(gamma - 1 / 0.6) < 0.15  # the registration makes up for a part of it
    assert loss < 1e-3


def test_groupwise_mean(told):
    spreads = [spread for (spread,) in told("groupwise_mean.py")]
    assert spreads[-1] < 0.3 * spreads[0]


def test_register_two_files(told, tmp_path):
    scan = smooth(SHAPE, 2)
    write_image(tmp_path / "fixed.nii.gz", Image(scan, AFFINE))
    shifted = AFFINE + 3 * np.eye(4, k=3)
    write_image(tmp_path / "moving.nii.gz", Image(scan, shifted))
    told(
        "register_two_files.py",
        tmp_path / "fixed.nii.gz",
        tmp_path / "moving.nii.gz",
        tmp_path / "out",
        "fast",
    )
    written = {"warped.nii.gz", "field.nii.gz", "inverse.nii.gz", "affine.txt", "report.html", "summary.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == written


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
