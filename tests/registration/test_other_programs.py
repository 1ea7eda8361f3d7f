"""Transforms of ANTs and elastix, made by themselves, next to what they do with them.

They come with `pip install antspyx itk-elastix`; ADREGNET_PROGRAMS_PYTHON names a Python that has them, if
this one hasn't.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.registration.chains import chain_points
from adregnet_jax.registration.field_files import TransformFile, apply_to_image, load_links
from tests.registration.test_chains import LPS, oblique

pytestmark = pytest.mark.program

PYTHON = os.environ.get("ADREGNET_PROGRAMS_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("other_programs.py")
SHAPE, OTHER_SHAPE = (34, 30, 28), (32, 33, 30)
CENTRE = np.array([20.0, -30, 10])
POINTS = CENTRE + np.random.default_rng(1).uniform(-10, 10, (40, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scans on oblique grids, bent against each other by two voxels, registered by the programs."""
    found = [PYTHON, "-c", "import importlib.util as u; assert u.find_spec('ants') and u.find_spec('itk')"]
    if subprocess.run(found, capture_output=True, check=False).returncode:
        pytest.skip("needs ANTs and elastix: pip install antspyx itk-elastix")
    folder = tmp_path_factory.mktemp("programs")
    affine = oblique([-2, 2, 2.5], SHAPE, CENTRE, [10, -5, 20])
    other_affine = oblique([2.2, -2.1, 2.4], OTHER_SHAPE, CENTRE + np.array([1, 1, 1.5]), [0, 5, -10])
    fixed = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 2.5)
    away = [4 * (i / n - 0.5) for i, n in zip(np.indices(SHAPE), SHAPE, strict=True)]
    fixed += 0.5 * np.exp(-sum(along**2 for along in away))
    between = np.linalg.inv(affine) @ other_affine
    voxels = np.moveaxis(np.indices(OTHER_SHAPE), 0, -1) @ between[:3, :3].T + between[:3, 3]
    voxels += 2 * np.sin(voxels / 6)
    moving = scipy.ndimage.map_coordinates(fixed, np.moveaxis(voxels, -1, 0), order=1, mode="nearest")
    write_image(folder / "fixed.nii.gz", Image((100 * fixed).astype(np.float32), affine))
    write_image(folder / "moving.nii.gz", Image((100 * moving).astype(np.float32), other_affine))
    np.savetxt(folder / "points.txt", POINTS * LPS)
    done = subprocess.run(
        [PYTHON, "-W", "ignore", str(SCRIPT), str(folder)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def check_image(folder, transforms, expected, *, back=False, mode="linear", margin=0):
    """Our warped image where the transforms lead into the other scan by two voxels and more."""
    reference, name = (
        folder / f"{one}.nii.gz" for one in (("moving", "fixed") if back else ("fixed", "moving"))
    )
    scan = read_image(name)
    inner = np.zeros(scan.shape, np.float32)
    inner[2:-2, 2:-2, 2:-2] = 1
    write_image(folder / "inner.nii.gz", Image(inner, scan.affine), overwrite=True)
    warped = []
    for path in (name, folder / "inner.nii.gz"):
        out = folder / "ours.nii.gz"
        apply_to_image(transforms, path, out, mode=mode, reference=reference, overwrite=True)
        warped.append(read_image(out).values)
    inside = warped[1] > 0.999
    inside = scipy.ndimage.binary_erosion(inside, iterations=margin) if margin else inside
    assert inside.sum() > 2000
    np.testing.assert_allclose(warped[0][inside], expected[inside], atol=2e-3)  # float32, of 100


def check_points(transforms, expected, *, atol):
    mapped, _ = chain_points(load_links(transforms), POINTS)
    assert np.linalg.norm(mapped - POINTS, axis=1).max() > 1
    np.testing.assert_allclose(mapped, expected * LPS, atol=atol)
    return mapped


@pytest.mark.parametrize(
    "name", ["forth", "back", "forth after a matrix", "back to a matrix", "forth by three"]
)
def test_chains_of_ants(folder, name):
    paths, inverted = json.loads((folder / "chains.json").read_text(encoding="utf-8"))[name]
    transforms = [TransformFile(Path(path), flag) for path, flag in zip(paths, inverted, strict=True)]
    by_ants = np.load(folder / f"ants {name}.npz")
    check_points(transforms, by_ants["points"], atol=1e-3)
    check_image(folder, transforms, by_ants["image"], back=name.startswith("back"))


def test_our_inverse_of_a_warp_is_that_of_ants(folder):
    forth = folder / "syn1Warp.nii.gz", True
    back = folder / "syn1InverseWarp.nii.gz", False
    ours, theirs = (chain_points(load_links([TransformFile(*one)]), POINTS)[0] for one in (forth, back))
    moved = np.linalg.norm(theirs - POINTS, axis=1)
    assert moved.max() > 1
    assert np.linalg.norm(ours - theirs, axis=1).max() < 0.1 * moved.max()  # theirs is iterated on the grid


@pytest.mark.parametrize("name", ["field.nii.gz", "field.mha"])
def test_images_by_elastix(folder, name):
    # By default, transformix interpolates by cubic splines.
    expected = np.load(folder / "elastix.npz")["image"]
    check_image(folder, [TransformFile(folder / name)], expected, mode="cubic", margin=2)


@pytest.mark.parametrize("name", ["field.nii.gz", "field.mha", "both.h5", "both.tfm"])
def test_points_by_elastix(folder, name):
    # Its splines are cubic; ours are linear between voxels of 2 mm, or eight samples per control point.
    transforms = [TransformFile(folder / name)]
    mapped = check_points(transforms, np.load(folder / "elastix.npz")["points"], atol=0.05)
    back, _ = chain_points(load_links([TransformFile(folder / name, inverted=True)]), mapped)
    np.testing.assert_allclose(back, POINTS, atol=2e-3)
