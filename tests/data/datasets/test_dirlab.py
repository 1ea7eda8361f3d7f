"""The DIR-Lab reader, on tiny case folders with the names and format of the real packs."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from adregnet_jax.config import DataConfig, DirLabConfig
from adregnet_jax.data.datasets import dirlab
from adregnet_jax.data.pair import Pair
from adregnet_jax.data.splits import load_splits
from adregnet_jax.errors import UserError

SHAPE, SPACING_MM = (40, 32, 22), (3.0, 3.0, 4.0)


@pytest.fixture(autouse=True)
def tiny_geometry(monkeypatch, request):
    if "real_geometry" not in request.fixturenames:
        monkeypatch.setattr(dirlab, "GEOMETRY", dict.fromkeys(range(1, 11), (SHAPE, SPACING_MM)))


@pytest.fixture
def real_geometry():
    """Requests the unchanged table."""


def chest_hu(seed=0):
    """An off-centre body with two lungs; each landmark of `landmarks` is a bright voxel."""
    hu = np.full(SHAPE, -1000, np.int16)
    hu[14:38, 6:26] = 40
    hu[17:24, 10:22, 5:18] = -850
    hu[28:35, 10:22, 5:18] = -850
    return hu + np.random.default_rng(seed).integers(-20, 20, SHAPE).astype(np.int16)


def landmarks(count=12, seed=0):
    """Whole 0-based voxels inside the lungs, [n, 3]."""
    return np.random.default_rng(seed).integers([17, 10, 5], [24, 22, 18], (count, 3))


def write_case(
    root: Path,
    case=1,
    images="Images/case{case}_{phase}_s.img",
    points="ExtremePhases/Case{case}_300_{phase}_xyz.txt",
):
    for seed, phase in enumerate(("T00", "T50")):
        image, text = (root / name.format(case=case, phase=phase) for name in (images, points))
        image.parent.mkdir(parents=True, exist_ok=True)
        text.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes((chest_hu(seed) + 1000).astype("<i2").tobytes(order="F"))
        lines = ["\t".join(map(str, point + 1)) + "\t\r\n" for point in landmarks(seed=seed)]
        text.write_bytes("".join(lines).encode())
    return root


def config(root, **changes):
    return dataclasses.replace(DirLabConfig(root=str(root), spacing_mm=3.0, shape=(40, 32, 32)), **changes)


@pytest.mark.parametrize(
    ("images", "points"),
    [
        ("Case1Pack/Images/case1_{phase}_s.img", "Case1Pack/ExtremePhases/Case1_300_{phase}_xyz.txt"),
        (
            "Case1Pack/Case1Pack/Images/case1_{phase}-ssm.img",
            "Case1Pack/extremePhases/case1_300_{phase}_xyz.txt",
        ),
        ("case1/Images/CASE1_{phase}.IMG", "case1/extremephases/case1_dirLab300_{phase}_xyz.txt"),
        ("case1_{phase}.img", "Case1_dirLab300_{phase}_xyz.txt"),
        ("a/Case1Deploy/Case1Deploy/Images/case1_{phase}.img", "a/Case1Deploy/Case1_300_{phase}_xyz.TXT"),
    ],
)
def test_all_common_file_names_are_found(tmp_path, images, points):
    write_case(tmp_path, images=images, points=points)
    (tmp_path / "._case1_T00_s.img").write_bytes(b"left by macOS")
    pair = dirlab.dirlab_pair(config(tmp_path, preprocessing="native"), 1)
    np.testing.assert_array_equal(pair.to_native(pair.fixed_landmarks), landmarks(seed=0))
    np.testing.assert_array_equal(pair.to_native(pair.moving_landmarks), landmarks(seed=1))


def test_image_is_in_hounsfield_units_with_x_fastest(tmp_path):
    write_case(tmp_path)
    hu = dirlab.read_image(tmp_path / "Images" / "case1_T00_s.img", 1)
    np.testing.assert_array_equal(hu, chest_hu(0))
    assert hu.dtype == np.float32


def test_native_keeps_voxels_and_pads_the_depth(tmp_path):
    write_case(tmp_path)
    pair = dirlab.dirlab_pair(config(tmp_path, preprocessing="native", shape=(26, 24, 0)), 1)
    assert pair.fixed.shape == (26, 24, 24)  # the least multiple of 8 that holds 22 slices
    assert pair.mask.sum() == 26 * 24 * 22
    assert not pair.fixed[~pair.mask].any()
    np.testing.assert_array_equal(pair.spacing_mm, SPACING_MM)

    hu = chest_hu(0).astype(float)
    low, high = np.percentile(hu, [0.5, 99.5])
    for voxel in landmarks():
        at = np.round((voxel - pair.native_offset) / pair.native_scale).astype(int)
        expected = np.clip((hu[tuple(voxel)] - low) / (high - low), 0, 1)
        np.testing.assert_allclose(pair.fixed[tuple(at)], expected, atol=1e-6)
    # The body, x = 14..37, lies in the window; a centred one would start at 7 and end at 33.
    assert pair.native_offset[0] <= 14
    assert pair.native_offset[0] + 26 > 37


@pytest.mark.parametrize("spacing_mm", [2.3, 3.0, 4.1])
def test_isotropic_resamples_scans_and_landmarks(tmp_path, spacing_mm):
    write_case(tmp_path)
    pair = dirlab.dirlab_pair(config(tmp_path, spacing_mm=spacing_mm, shape=(48, 40, 44)), 1)
    assert pair.fixed.shape == pair.moving.shape == pair.mask.shape == (48, 40, 44)
    assert pair.fixed.dtype == np.float32
    assert pair.fixed.min() >= 0
    assert pair.fixed.max() <= 1
    np.testing.assert_allclose(pair.spacing_mm, spacing_mm)
    np.testing.assert_allclose(pair.to_native(pair.fixed_landmarks), landmarks(seed=0), atol=1e-12)
    before_mm = np.linalg.norm((landmarks(seed=0) - landmarks(seed=1)) * SPACING_MM, axis=1)
    np.testing.assert_allclose(
        np.linalg.norm((pair.fixed_landmarks - pair.moving_landmarks) * pair.spacing_mm, axis=1), before_mm
    )
    # World coordinates: left, back and feet are negative in RAS.
    world = pair.fixed_landmarks @ pair.affine[:3, :3].T + pair.affine[:3, 3]
    np.testing.assert_allclose(world, -landmarks(seed=0) * SPACING_MM, atol=1e-9)
    inside = np.round(pair.fixed_landmarks).astype(int)
    assert pair.mask[tuple(inside.T)].all()


def test_isotropic_image_shows_the_lung_where_the_landmarks_say(tmp_path):
    write_case(tmp_path)
    pair = dirlab.dirlab_pair(config(tmp_path), 1)
    lung_centre = (np.array([20.0, 15.5, 11.0]) - pair.native_offset) / pair.native_scale
    heart = (np.array([25.5, 15.5, 11.0]) - pair.native_offset) / pair.native_scale
    assert pair.fixed[tuple(np.round(lung_centre).astype(int))] < 0.25
    assert pair.fixed[tuple(np.round(heart).astype(int))] > 0.8


def test_the_rim_of_the_body_is_cut_but_never_lung(tmp_path):
    write_case(tmp_path)
    pair = dirlab.dirlab_pair(config(tmp_path, preprocessing="native", shape=(20, 16, 16)), 1)
    low, high = pair.native_offset, pair.native_offset + pair.fixed.shape
    assert (low <= [17, 10, 5]).all()
    assert (high >= [35, 22, 18]).all()


@pytest.mark.parametrize("preprocessing", ["native", "isotropic"])
def test_lungs_that_do_not_fit_are_refused_with_a_shape_that_would(tmp_path, preprocessing):
    write_case(tmp_path)
    small = config(tmp_path, preprocessing=preprocessing, shape=(16, 16, 16))
    with pytest.raises(
        UserError, match=r"case 1: lungs and landmarks take .* set data\.dirlab\.shape=\("
    ) as error:
        dirlab.dirlab_pair(small, 1)
    shape = tuple(map(int, re.search(r"set data.dirlab.shape=\((.*?)\)", str(error.value))[1].split(",")))
    assert (
        dirlab.dirlab_pair(config(tmp_path, preprocessing=preprocessing, shape=shape), 1).fixed.shape == shape
    )
    if preprocessing == "isotropic":
        spacing_mm = float(str(error.value).split("spacing_mm=")[1])
        dirlab.dirlab_pair(config(tmp_path, shape=(16, 16, 16), spacing_mm=spacing_mm), 1)


def refusal(root, case=1, **changes):
    with pytest.raises(UserError) as error:
        dirlab.dirlab_pair(config(root, **changes), case)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder_says_how_to_ask(tmp_path):
    assert "dir-lab.com/ReferenceData.html" in refusal(tmp_path / "none")
    assert "dir-lab.com/ReferenceData.html" in refusal("")


def test_half_unpacked_case_lists_its_missing_files(tmp_path):
    write_case(tmp_path)
    (tmp_path / "Images" / "case1_T50_s.img").unlink()
    (tmp_path / "ExtremePhases" / "Case1_300_T00_xyz.txt").unlink()
    message = refusal(tmp_path)
    assert "lacks case1_T50_s.img, Case1_300_T00_xyz.txt" in message
    assert "dir-lab.com/ReferenceData.html" in message


def test_image_of_another_size(tmp_path):
    write_case(tmp_path)
    (tmp_path / "Images" / "case1_T50_s.img").write_bytes(b"123")
    assert f"expected {2 * np.prod(SHAPE)} bytes, got 3" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n0 4 5\n", "count from 1"),
        ("1 2 3\n41 4 5\n", "1 of 2 landmarks are outside 1..40, 1..32, 1..22"),
        ("1 2 3\n-4 4 5\n", "outside"),
        ("1 2 3\n", "1 landmarks, but T00 has 12"),
        ("1 2 3\n4 five 6\n", "line 2: expected three numbers x y z, got '4 five 6'"),
        ("1 2 3\n4 5\n", "line 2"),
        ("1 2 nan\n", "finite"),
        ("\n", "no line"),
    ],
)
def test_bad_landmarks(tmp_path, text, message):
    write_case(tmp_path)
    (tmp_path / "ExtremePhases" / "Case1_300_T50_xyz.txt").write_text(text)
    assert message in refusal(tmp_path)


def test_bad_settings_and_cases(tmp_path):
    write_case(tmp_path)
    assert "expected isotropic or native" in refusal(tmp_path, preprocessing="isotropc")
    assert "no DIR-Lab case 11" in refusal(tmp_path, case=11)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"test_case": 1}, ((3, 4, 5), 2, 1)),
        ({"test_case": 5}, ((2, 3, 4), 1, 5)),
        ({"test_case": 3, "validation_case": 1}, ((2, 4, 5), 1, 3)),
        ({"test_case": 3, "protocol": "paper"}, ((1, 2, 3, 5), 4, 3)),
    ],
)
def test_split_cases(changes, expected):
    assert dirlab.split_cases(DirLabConfig(cases=(1, 2, 3, 4, 5), **changes)) == expected


def test_a_test_case_that_was_trained_on_says_so_in_its_name(monkeypatch):
    monkeypatch.setattr(
        dirlab,
        "dirlab_pair",
        lambda config, case: Pair(f"case{case}", np.zeros((2, 2, 2)), np.zeros((2, 2, 2)), np.ones(3)),
    )
    names = {
        protocol: load_splits(
            DataConfig(kind="dirlab", dirlab=DirLabConfig(cases=(1, 2, 3), test_case=2, protocol=protocol))
        ).test[0].name
        for protocol in ("leave-one-out", "paper")
    }  # fmt: skip
    assert names == {"leave-one-out": "case2", "paper": "case2 (trained on)"}


def run_main(monkeypatch, root):
    monkeypatch.setattr("sys.argv", ["dirlab", str(root)])
    dirlab.main()


def test_report_names_what_is_missing_and_wrong(tmp_path, monkeypatch, capsys):
    write_case(tmp_path / "Case1Pack")
    write_case(tmp_path / "Case2Pack", 2)
    (tmp_path / "Case2Pack" / "Images" / "case2_T00_s.img").unlink()
    write_case(tmp_path / "Case3Pack", 3)
    (tmp_path / "Case3Pack" / "Images" / "case3_T00_s.img").write_bytes(b"")
    run_main(monkeypatch, tmp_path)
    out = capsys.readouterr().out
    distance_mm = np.linalg.norm((landmarks(seed=0) - landmarks(seed=1)) * SPACING_MM, axis=1)
    assert re.search(rf"1 .*complete 12 +{distance_mm.mean():.2f} \({distance_mm.std(ddof=1):.2f}\)", out)
    assert "case 2 lacks case2_T00-ssm.img" in out
    assert re.search(r"case 3: .*expected \d+ bytes, got 0", out)
    assert "cases 4, 5, 6, 7, 8, 9, 10: nothing found" in out


def test_report_on_nothing_exits_with_2(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(monkeypatch, tmp_path)
    assert stop.value.code == 2
    assert "no usable DIR-Lab case" in capsys.readouterr().err


def test_original_landmarks_give_the_published_distances(real_geometry, real_data, monkeypatch, capsys):
    run_main(monkeypatch, real_data("dirlab_landmarks"))
    found = re.findall(r" 300 +(\d+\.\d\d) \((\d+\.\d\d)\)", capsys.readouterr().out)
    published = [(3.89, 2.78), (4.34, 3.90), (6.94, 4.05), (9.83, 4.86), (7.48, 5.51)]
    assert [(float(mean), float(sd)) for mean, sd in found] == published


def test_geometry_is_the_published_one(real_geometry):
    assert dirlab.GEOMETRY[4] == ((256, 256, 99), (1.13, 1.13, 2.5))
    assert sum(np.prod(shape) for shape, _ in dirlab.GEOMETRY.values()) == 256 * 256 * (515 + 4 * 640)
