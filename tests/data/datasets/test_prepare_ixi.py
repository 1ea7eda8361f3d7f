"""The preprocessing of raw brain scans, on synthetic brains with known truth."""

import builtins

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from adregnet_jax.data.datasets import prepare_ixi
from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.errors import UserError

SHAPE = (30, 24, 20)
# Sagittal, like the T1 scans of IXI: axes run back, up and right; 6 x 6 x 8 mm, slightly tilted.
TILT = Rotation.from_euler("xyz", (-1, 1, 3), degrees=True).as_matrix()
AFFINE = np.array([[0, 0, 8.0, -80], [-6, 0, 0, 90], [0, 6, 0, -70], [0, 0, 0, 1]])
AFFINE[:3, :3] = TILT @ AFFINE[:3, :3]


@pytest.fixture(scope="module")
def brain():
    """Two tissues in an ellipsoid within a head, without bias field: values [x, y, z], mask and tissue."""
    place = (np.moveaxis(np.indices(SHAPE), 0, -1) - (np.array(SHAPE) - 1) / 2) / [13, 10, 8]
    radius = np.linalg.norm(place, axis=-1)
    mask = radius < 0.9
    tissue = np.where(np.sin(9 * place[..., 0]) * np.cos(7 * place[..., 1]) > 0, 2, 1) * mask
    noise = np.random.default_rng(0).normal(0, 4, SHAPE)
    values = np.where(mask, 100 + 60 * tissue, 400) * (radius < 1.1) + noise
    return values.astype(np.float32), mask, tissue


@pytest.fixture
def window(monkeypatch):
    """A window of a few voxels: left-right, front-back, feet-head."""
    monkeypatch.setattr(prepare_ixi, "WINDOW_MM", (150, 180, 144))


def prepared(values, mask, **options):
    return prepare_ixi.prepare(Image(values, AFFINE), Image(mask.astype(np.int32), AFFINE), **options)


def in_scan(result, affine=AFFINE):
    """The result resampled at the voxels of its scan: [x, y, z]."""
    matrix = np.linalg.inv(result.affine) @ affine
    return ndimage.affine_transform(
        result.values, matrix[:3, :3], matrix[:3, 3], SHAPE, order=1, mode="nearest"
    )


def test_intensities_are_z_scores_where_the_brain_was(brain, window):
    values, mask, _ = brain
    result = prepared(values, mask, bias_correction=False)
    scores = (values - values[mask].mean()) / values[mask].std()
    inner = ndimage.binary_erosion(mask, np.ones((3, 3, 3)))
    # Read at 1 mm and back at 6 and 8 mm by linear interpolation: voxel centres move by up to half a mm.
    assert np.abs(in_scan(result)[inner] - scores[inner]).mean() < 0.1
    outside = ~ndimage.binary_dilation(mask, np.ones((3, 3, 3)))
    np.testing.assert_allclose(in_scan(result)[outside], scores[mask].min(), atol=1e-5)
    assert result.values.min() == pytest.approx(scores[mask].min(), abs=1e-5)


def test_axes_stay_and_the_brain_is_in_the_middle(brain, window):
    values, mask, _ = brain
    result = prepared(values, mask, bias_correction=False)
    assert result.shape == (180, 144, 150)  # front-back, feet-head, left-right: the axes of the file
    assert nib.aff2axcodes(result.affine) == nib.aff2axcodes(AFFINE)
    np.testing.assert_allclose(nib.affines.voxel_sizes(result.affine), 1, rtol=1e-6)
    directions = AFFINE[:3, :3] / nib.affines.voxel_sizes(AFFINE)
    np.testing.assert_allclose(result.affine[:3, :3], directions, atol=1e-6)
    inside = np.nonzero(result.values > result.values.min() + 0.5)
    for axis, size in zip(inside, result.shape, strict=True):
        assert abs(axis.min() + axis.max() - (size - 1)) <= 4  # voxels of 1 mm, from voxels of 6 and 8


def test_voxels_of_1_mm_are_cropped_and_not_interpolated(window):
    rng = np.random.default_rng(0)
    values, mask = rng.uniform(1, 2, (40, 50, 30)).astype(np.float32), np.zeros((40, 50, 30), np.int32)
    mask[10:31, 20:41, 5:26] = 1
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    result = prepare_ixi.prepare(Image(values, affine), Image(mask, affine), bias_correction=False)
    assert result.shape == (150, 180, 144)
    start = np.linalg.inv(affine) @ result.affine[:, 3]
    np.testing.assert_array_equal(start, np.round(start))
    inside = values[mask > 0]
    kept = result.values[result.values > result.values.min()]
    np.testing.assert_allclose(np.sort(kept), np.sort((inside - inside.mean()) / inside.std())[1:], atol=1e-5)


def test_the_bias_field_is_removed(brain, window):
    pytest.importorskip("SimpleITK")
    values, mask, tissue = brain
    place = np.moveaxis(np.indices(SHAPE), 0, -1) / np.array(SHAPE) - 0.5
    field = np.exp(0.8 * place[..., 0] - 0.6 * place[..., 1] + place[..., 0] * place[..., 2])
    inner = ndimage.binary_erosion(mask)

    def spread(result):
        """SD within the tissues relative to the difference of their means."""
        found = [in_scan(result)[inner & (tissue == kind)] for kind in (1, 2)]
        return np.mean([part.std() for part in found]) / (found[1].mean() - found[0].mean())

    biased = (values * field).astype(np.float32)
    without, corrected = (spread(prepared(biased, mask, bias_correction=on)) for on in (False, True))
    truth = spread(prepared(values, mask, bias_correction=False))
    assert without > 2 * truth
    assert corrected - truth < 0.25 * (without - truth)


def folder_of(
    tmp_path, brain, names=("IXI-T1/IXI002-Guys-0828-T1.nii.gz", "IXI-T2/IXI002-Guys-0828-T2.nii.gz")
):
    values, mask, _ = brain
    for name in names:
        path, mask_path = tmp_path / "raw" / name, tmp_path / "masks" / name.replace(".nii", "_mask.nii")
        for p, content in ((path, values), (mask_path, mask)):
            p.parent.mkdir(parents=True, exist_ok=True)
            write_image(p, Image(content, AFFINE))
    return tmp_path / "raw", tmp_path / "out", tmp_path / "masks"


def run(*arguments):
    return prepare_ixi.main([*map(str, arguments), "--no-bias-correction"])


def test_an_interrupted_folder_is_continued(tmp_path, brain, window, capsys):
    raw, out, masks = folder_of(tmp_path, brain)
    assert run(raw, out, "--masks", masks) == 0
    assert "2 scans written: 2 of (180, 144, 150); 0 refused." in capsys.readouterr().out
    written = sorted(path for path in out.rglob("*") if path.is_file())
    assert [path.relative_to(out) for path in written] == [
        path.relative_to(raw) for path in sorted(raw.rglob("*.nii.gz"))
    ]
    expected = prepared(*brain[:2], bias_correction=False)
    # Affines on disk are float32: the grid moves by some micrometres.
    np.testing.assert_allclose(read_image(written[0]).values, expected.values, atol=1e-3)
    np.testing.assert_allclose(read_image(written[0]).affine, expected.affine, atol=1e-4)
    before = written[1].read_bytes()
    written[0].unlink()
    written[1].write_bytes(before[:-1])  # stays as it is
    assert run(raw, out, "--masks", masks) == 0
    assert "1 scans written" in capsys.readouterr().out
    assert written[0].exists() and written[1].read_bytes() == before[:-1]


def test_a_refused_scan_is_one_line_and_the_others_are_prepared(tmp_path, brain, window, capsys):
    names = [f"IXI{n:03d}-HH-0001-T1.nii.gz" for n in range(6)]
    raw, out, masks = folder_of(tmp_path, brain, names)
    mask = brain[1]
    (raw / names[0]).write_bytes(b"not an image")
    changed = {1: np.zeros_like(mask), 2: mask[1:], 3: np.ones_like(mask)}
    for n, other in changed.items():
        write_image(masks / f"IXI{n:03d}-HH-0001-T1_mask.nii.gz", Image(other, AFFINE), overwrite=True)
    (masks / "IXI004-HH-0001-T1_mask.nii.gz").unlink()
    assert run(raw, out, "--masks", masks) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 5 and all(line.startswith("refused: ") for line in lines)
    messages = [
        "can't be read",
        "mask is empty",
        "not on the grid of its scan",
        "expected a brain without skull",
        "no mask in",
    ]
    for name, line, words in zip(names, lines, messages, strict=False):
        assert name.split(".")[0] in line and words in line
    assert [path.name for path in out.iterdir()] == [names[5]]
    assert "1 scans written: 1 of (180, 144, 150); 5 refused." in said.out


def test_missing_requirements_are_reported(tmp_path, brain, capsys, monkeypatch):
    raw, out, masks = folder_of(tmp_path, brain)

    def refusal(*arguments):
        assert prepare_ixi.main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "HD-BET" in (line := refusal(raw, out)) and "SynthStrip" in line
    assert "there is no such folder" in refusal(tmp_path / "none", out, "--masks", masks)
    (tmp_path / "empty").mkdir()
    assert "has no scans" in refusal(tmp_path / "empty", out, "--masks", masks)
    whole = builtins.__import__

    def without_itk(name, *rest, **options):
        if name == "SimpleITK":
            raise ImportError(name)
        return whole(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_itk)
    assert "pip install 'adregnet-jax[itk]'" in refusal(raw, out, "--masks", masks)


def test_a_scan_of_one_value_is_refused(brain, window):
    with pytest.raises(UserError, match="every voxel in the mask is 3"):
        prepared(np.full(SHAPE, 3, np.float32), brain[1], bias_correction=False)
