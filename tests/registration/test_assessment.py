"""The verdict on a registration: laws of the evidence and of the rule."""

import json

import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from adregnet_jax.cli.app import app
from adregnet_jax.data.io.images import Image, write_image
from adregnet_jax.data.io.transforms import write_field
from adregnet_jax.errors import UserError
from adregnet_jax.registration.assessment import rule
from adregnet_jax.registration.assessment.assess import assess
from adregnet_jax.registration.assessment.blocks import match_blocks
from adregnet_jax.registration.assessment.evidence import predicted_error
from adregnet_jax.registration.assessment.verdict import MARKS, Assessment, penalties_of
from adregnet_jax.registration.field import DisplacementField

SHAPE = (32, 36, 30)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
EVERYWHERE = np.ones((24, 24, 24), np.float32)
PLACES = {"cell": (4, 4, 4), "radius": (2, 2, 2), "signed": True}


def texture(shape, seed=0, width=1.5):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), width)
    return (noise / noise.std()).astype(np.float32)


def body(shape=SHAPE, seed=0):
    """A bright textured ellipsoid on black, without symmetry."""
    grid = np.moveaxis(np.indices(shape), 0, -1)
    centre, radius = np.divide(shape, 2) - 0.5, np.divide(shape, 2.6)
    inside = ndimage.gaussian_filter((np.linalg.norm((grid - centre) / radius, axis=-1) < 1) * 1.0, 0.7)
    return (inside * (4 + texture(shape, seed))).astype(np.float32)


def field(displacement):
    return DisplacementField(np.asarray(displacement, np.float32), AFFINE)


def still(shape=SHAPE):
    return np.zeros((*shape, 3), np.float32)


def shift(voxels):
    """Everywhere so many voxels along the first axis."""
    displacement = still()
    displacement[..., 0] = voxels
    return displacement


@pytest.fixture(scope="module")
def scan():
    return Image(body(), AFFINE, "scan")


@pytest.fixture(scope="module")
def perfect(scan):
    return assess(scan, scan, field(still()), modality="mono")


def test_block_matching_finds_a_shift():
    image = texture((28, 28, 28))
    fixed, warped = image[2:26, 2:26, 2:26], image[1:25, 2:26, 4:28]
    blocks = match_blocks(fixed, warped, EVERYWHERE, EVERYWHERE, np.array([1, 1, 2], np.float32), **PLACES)
    inner = (slice(1, -1),) * 3
    # fixed(p) is warped(p + (1, 0, -2)); voxels are 2 wide along z.
    np.testing.assert_allclose(np.median(blocks.residual[inner], axis=(0, 1, 2)), [1, 0, -4], atol=0.1)
    assert np.median(blocks.best[inner]) > 0.9 > np.median(blocks.correlation[inner])


def test_block_matching_is_blind_to_gain_and_offset_and_unsigned_to_the_sign():
    fixed, warped = texture((24, 24, 24)), texture((24, 24, 24)) + 0.3 * texture((24, 24, 24), 1)
    arguments = (EVERYWHERE, EVERYWHERE, np.ones(3, np.float32))
    first = match_blocks(fixed, warped, *arguments, **PLACES)
    scaled = match_blocks(7 * fixed + 3, 0.2 * warped - 5, *arguments, **PLACES)
    np.testing.assert_allclose(first.correlation, scaled.correlation, atol=1e-3)
    opposite = match_blocks(fixed, -warped, *arguments, **PLACES)
    assert np.all(opposite.correlation[opposite.counts > 0] < 0)
    unsigned = match_blocks(fixed, -warped, *arguments, **PLACES | {"signed": False})
    np.testing.assert_allclose(unsigned.correlation, first.correlation, atol=1e-4)


def test_equal_scans_pass(perfect):
    assert perfect.verdict == "pass"
    assert perfect.score > 0.9
    assert perfect.evidence["predicted_error_mm"] < 0.5 * perfect.evidence["voxel_mm"]
    assert perfect.error_mm.shape == SHAPE
    assert perfect.reasons


def test_the_score_falls_and_the_predicted_error_rises_with_a_shift(scan, perfect):
    judged = [perfect, *(assess(scan, scan, field(shift(s)), modality="mono") for s in (1, 2, 3))]
    scores = [found.score for found in judged]
    errors = [found.evidence["predicted_error_mm"] for found in judged]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[1] + 0.02
    assert errors == sorted(errors)
    assert errors[-1] > 2 * errors[0]


def test_the_predicted_error_is_where_the_field_is_wrong(scan):
    wrong = still()
    wrong[..., 1] = 2.5 / (1 + np.exp(-(np.arange(SHAPE[0]) - 16.0)))[:, None, None]
    error_mm = assess(scan, scan, field(wrong), modality="mono").error_mm
    assert error_mm[22:28].mean() > 1.5 * error_mm[4:10].mean()


def test_the_interval_surrounds_the_predicted_error(perfect):
    low, high = perfect.error_90_mm()
    assert np.all((low < perfect.error_mm) & (perfect.error_mm < high))
    row = perfect.row()
    low_mm, high_mm = row["predicted_error_90_mm"]
    assert 0 < low_mm < row["predicted_error_mm"] < high_mm
    assert Assessment(None, None, ("too small",)).error_90_mm() is None


@pytest.mark.parametrize("name", ["distance", "offset", "strain"])
def test_no_mark_lowers_the_predicted_error(name):
    marks = {other: np.full((3, 1, 1), 0.4) for other in rule.ERROR}
    marks[name] = np.array([0.0, 0.4, 3.0])[:, None, None]
    error = predicted_error(marks)[:, 0, 0]
    assert error[0] < error[1] < error[2]


@pytest.mark.parametrize("gain", [0.01, 300.0])
def test_the_verdict_does_not_depend_on_the_scale_of_intensities(scan, gain):
    other = Image(gain * scan.values + 5, AFFINE, "other")
    moved = field(shift(0.7))
    first, second = (assess(scan, moving, moved, modality="mono") for moving in (scan, other))
    assert second.verdict == first.verdict
    assert second.score == pytest.approx(first.score, abs=0.01)


def test_the_verdict_does_not_depend_on_the_size_of_voxels(scan, perfect):
    small = np.diag([0.002, 0.002, 0.002, 1.0])
    tiny = Image(scan.values, small, "tiny")
    found = assess(tiny, tiny, DisplacementField(still(), small), modality="mono")
    assert found.score == pytest.approx(perfect.score, abs=1e-3)
    wanted_mm = perfect.evidence["predicted_error_mm"] / 1000
    assert found.evidence["predicted_error_mm"] == pytest.approx(wanted_mm, rel=0.01)


def test_the_linear_part_is_right_where_equal_steps_through_the_scan_stay_in_one_slice():
    shape = (157, 128, 64)  # 64 times as many voxels as the linear part is fitted to
    values = np.full(shape, 3, np.float32)  # a bright rim, so that all is foreground
    values[2:-2, 2:-2, 2:-2] = texture(shape)[2:-2, 2:-2, 2:-2]
    full = Image(values, AFFINE, "full")
    evidence = assess(full, full, field(still(shape)), modality="mono").evidence
    assert [evidence[name] for name in ("stretch_min", "stretch_max")] == pytest.approx([1, 1], abs=1e-3)


def mirrored():
    displacement = still()
    displacement[..., 0] = (SHAPE[0] - 1 - 2 * np.arange(SHAPE[0]))[:, None, None]
    return displacement


def shrunk(factor):
    """Everything goes to the middle of the moving scan."""
    grid = np.moveaxis(np.indices(SHAPE), 0, -1).astype(np.float32)
    return (factor - 1) * (grid - np.divide(SHAPE, 2))


def folds():
    return 4 * np.stack([texture(SHAPE, seed) for seed in (4, 5, 6)], axis=-1)


@pytest.mark.parametrize(
    ("displacement", "words"),
    [
        (mirrored(), "folds"),
        (shrunk(0.05), "volumes by a factor of 0.00"),
        (shrunk(2.5), "outside of the moving scan"),
        (folds(), "folds"),
        (shift(6), "fit better elsewhere"),
    ],
    ids=["mirrored", "collapsed", "blown up", "folded", "6 voxels off"],
)
def test_failures_fail_and_say_why(scan, displacement, words):
    found = assess(scan, scan, field(displacement), modality="mono")
    assert found.verdict == "fail", found
    assert words in "; ".join(found.reasons)


def test_another_scan_fails(scan):
    other = Image(np.abs(texture(SHAPE, seed=3, width=2.5)), AFFINE, "other")
    assert assess(scan, other, field(still()), modality="mono").verdict == "fail"


def test_unlike_scans_of_different_contrast_are_to_be_checked(scan):
    other = Image(np.abs(texture(SHAPE, seed=3, width=2.5)), AFFINE, "other")
    assert assess(scan, other, field(still()), modality="multi").verdict == "check"
    assert assess(scan, other, field(shrunk(0.05)), modality="multi").verdict == "fail"


def test_opposite_contrast_fails_as_one_contrast_alone(scan):
    inverted = Image(scan.values.max() - scan.values, AFFINE, "inverted")
    failed = assess(scan, inverted, field(still()), modality="mono")
    assert failed.verdict == "fail"
    assert any("opposite contrast" in reason for reason in failed.reasons)
    assert assess(scan, inverted, field(still()), modality="multi").evidence["held_fine"] > 0.95


def test_a_scan_that_is_too_small_gets_no_verdict():
    small = Image(texture((5, 5, 5)), AFFINE, "small")
    found = assess(small, small, DisplacementField(still((5, 5, 5)), AFFINE))
    assert found.verdict is None
    assert "too small or too flat for a verdict" in found.reasons[0]
    assert found.fails("check")
    assert not found.fails("fail")


def test_no_mark_makes_up_for_another(perfect):
    assert rule.MARKS.keys() == MARKS.keys()
    numbers = dict(perfect.evidence)
    before = penalties_of(numbers)
    after = penalties_of(numbers | {"outside": 0.9})
    assert (
        before["outside"] < after["outside"] == rule.MOST_OUTSIDE < -np.log(rule.CHECK)
    )  # not alone a failure
    assert all(after[name] == before[name] for name in MARKS if name != "outside")


def test_the_record_is_json(perfect):
    record = json.loads(json.dumps(perfect.record(), allow_nan=False))
    assert record["verdict"] == "pass"
    assert record["evidence"]["held_fine"] == pytest.approx(1, abs=0.05)
    empty = Assessment(None, None, ("too small",)).row()
    assert empty["verdict"] is empty["score"] is empty["predicted_error_90_mm"] is None


@pytest.mark.parametrize(
    ("moving", "displacement", "expected"),
    [
        (None, np.zeros((5, 5, 5, 3)), "expected a field on the grid of the fixed scan"),
        (None, shift(500), "doesn't lead into scan anywhere"),
        (Image(np.ones(SHAPE, np.float32), AFFINE, "flat"), still(), "flat: every voxel has the same value"),
    ],
)
def test_bad_input_is_one_line(scan, moving, displacement, expected):
    with pytest.raises(UserError, match=expected):
        assess(scan, moving or scan, field(displacement))


def test_the_command(scan, tmp_path):
    for name, image in (("fixed", scan), ("moving", scan)):
        write_image(tmp_path / f"{name}.nii.gz", image)
    write_field(tmp_path / "good.npz", still(), AFFINE)
    write_field(tmp_path / "bad.nii.gz", shift(6), AFFINE)
    scans = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    out, error = tmp_path / "verdict.json", tmp_path / "error.nii.gz"

    def run(*arguments):
        return CliRunner().invoke(app, ["assess", *scans, *map(str, arguments)])

    good = run(tmp_path / "good.npz", "-o", out, "--error", error, "--fail-on", "check")
    assert good.exit_code == 0, good.output
    assert good.output.startswith("verdict          pass")
    assert json.loads(out.read_text())["verdict"] == "pass"
    assert error.exists()
    bad = run(tmp_path / "bad.nii.gz", "--fail-on", "fail")
    assert bad.exit_code == 3
    assert "fit better elsewhere" in bad.output
    again = run(tmp_path / "good.npz", "-o", out)
    assert again.exit_code == 2
