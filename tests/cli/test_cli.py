"""The command `adregnet` from the user's point of view: files it writes, input it refuses."""

import csv
import dataclasses
import functools
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import jax
import jax.export
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage
from matplotlib.figure import Figure
from typer.testing import CliRunner

from adregnet_jax.cli.app import app
from adregnet_jax.cli.execution import start_jax
from adregnet_jax.config import AffineConfig, InstanceConfig, ModelConfig, instance_preset
from adregnet_jax.data.io.images import Image, read_image, write_image
from adregnet_jax.data.io.points import read_points, write_points
from adregnet_jax.data.io.transforms import read_field, read_matrix, write_field, write_matrix
from adregnet_jax.data.preprocessing import rescale_percentiles
from adregnet_jax.errors import UserError
from adregnet_jax.nn.models import make_model
from adregnet_jax.registration.assessment.assess import assess_measured
from adregnet_jax.registration.assessment.verdict import Assessment
from adregnet_jax.registration.field import DisplacementField, after_field, warp_image, warp_points
from adregnet_jax.registration.measure import Measurement, ScanPair, measure_scans
from adregnet_jax.registration.network import register
from adregnet_jax.registration.result_files import write_results
from adregnet_jax.registration.results import RegisteredScans
from adregnet_jax.registration.scans import register_scans
from adregnet_jax.training.checkpoint import Checkpoints
from adregnet_jax.training.state import TrainState
from adregnet_jax.weights.trained_network import TrainingDomain
from tests.random_parameters import random_parameters
from tests.registration.test_field import (
    AFFINE,
    DISPLACEMENT,
    MATRIX,
    MOVING,
    MOVING_AFFINE,
    MOVING_SHAPE,
    SHAPE,
    smooth,
)

ROOT = Path(__file__).parents[2]
FIELD = after_field(DisplacementField(jnp.asarray(DISPLACEMENT), jnp.asarray(AFFINE)), jnp.asarray(MATRIX))
INVERSE = DisplacementField(jnp.asarray(-0.5 * smooth((*MOVING_SHAPE, 3), 2)), jnp.asarray(MOVING_AFFINE))
LABELS = np.digitize(MOVING, [-0.5, 0.5]).astype(np.int16)
WRITTEN = {"affine.txt", "field.nii.gz", "inverse.nii.gz", "report.html", "summary.json", "warped.nii.gz"}


def found_field(fixed, moving, *, modality, on_stage, **_):
    """A stand-in for `register_scans`, which finds `FIELD` whatever the scans."""
    for stage in ("affine", "deformable", "inverse"):
        on_stage(stage)
    warped = warp_image(FIELD, jnp.asarray(moving.values), jnp.asarray(moving.affine))
    return RegisteredScans(
        ScanPair(fixed, moving),
        field=FIELD,
        inverse=INVERSE,
        matrix=MATRIX,
        warped=Image(np.asarray(warped), AFFINE),
        modality=modality,
        seconds={"affine": 1.0, "deformable": 2.0, "inverse": 0.5},
    )


@pytest.fixture
def scans(monkeypatch):
    """A mock of `register_scans`, which gives `FIELD`."""
    mock = create_autospec(register_scans, side_effect=found_field)
    monkeypatch.setattr("adregnet_jax.registration.files.register_scans", mock)
    return mock


@pytest.fixture
def no_figures(monkeypatch):
    """A page without its picture, which one test covers."""
    monkeypatch.setattr(
        "adregnet_jax.registration.result_files.registration_figure", lambda *_, **__: Figure()
    )


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The cache on disk and malloc's settings belong to a whole process, and this one runs other tests."""
    monkeypatch.setattr("adregnet_jax.launch.process.use_compilation_cache", lambda: None)
    monkeypatch.setattr("adregnet_jax.launch.process.keep_freed_memory", lambda: None)


@pytest.fixture
def files(tmp_path):
    """A folder with a pair, labels, masks, landmarks and a field."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_image(folder / "fixed.nii.gz", Image(smooth(SHAPE, 2, seed=5), AFFINE))
    write_image(folder / "moving.nii.gz", Image(MOVING, MOVING_AFFINE))
    warped = np.asarray(warp_image(FIELD, jnp.asarray(LABELS), jnp.asarray(MOVING_AFFINE), mode="label"))
    write_image(folder / "fixed_labels.nii.gz", Image(warped, AFFINE))
    write_image(folder / "moving_labels.nii.gz", Image(LABELS, MOVING_AFFINE))
    write_image(folder / "fixed_mask.nii.gz", Image(np.ones(SHAPE, np.uint8), AFFINE))
    # In the middle, where both scans reach.
    points = nib.affines.apply_affine(AFFINE, np.random.default_rng(0).uniform(8, 12, (20, 3)))
    write_points(folder / "fixed.csv", points)
    write_points(folder / "moving.csv", np.asarray(warp_points(FIELD, jnp.asarray(points)), float))
    write_field(folder / "field.nii.gz", DISPLACEMENT, AFFINE)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refusal(*arguments, status=2):
    """The single error line with which a command ends."""
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == status, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in result.output
    return line


def names(folder):
    return {path.name for path in folder.iterdir()}


def pair(files, labels=False, landmarks=False):
    options = ["register", files / "fixed.nii.gz", files / "moving.nii.gz"]
    if labels:
        options += ["--fixed-labels", files / "fixed_labels.nii.gz"]
        options += ["--moving-labels", files / "moving_labels.nii.gz"]
    if landmarks:
        options += ["--fixed-landmarks", files / "fixed.csv", "--moving-landmarks", files / "moving.csv"]
    return options


def test_register_writes_what_was_found(files, scans, tmp_path):
    out = tmp_path / "new" / "out"
    result = succeed(
        *pair(files, labels=True, landmarks=True),
        *("--fixed-mask", files / "fixed_mask.nii.gz", "--output", out),
    )
    assert names(out) == WRITTEN | {"warped_labels.nii.gz"}
    assert names(out.parent) == {"out"}
    displacement, affine = read_field(out / "field.nii.gz")
    np.testing.assert_allclose(displacement, FIELD.displacement, atol=1e-4)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    assert nib.Nifti1Image.from_filename(out / "field.nii.gz").header["intent_code"] == 1007
    np.testing.assert_allclose(read_field(out / "inverse.nii.gz")[0], INVERSE.displacement, atol=1e-4)
    np.testing.assert_allclose(read_matrix(out / "affine.txt"), MATRIX, atol=1e-9)

    summary = json.loads((out / "summary.json").read_text())
    results = summary["results"]
    assert results["dice"] > 0.99 > 0.9 > results["dice_before"]  # the fixed labels are the warped ones
    assert [entry["label"] for entry in results["dice_by_label"]] == [1, 2]
    assert results["tre_mm"] < 0.01 < 2 < results["tre_before_mm"]
    assert results["landmarks"] == 20
    assert results["jacobian_min"] < 1 < results["jacobian_max"]
    stages = {"reading", "affine", "deformable", "inverse", "scoring", "assessing"}
    assert summary["seconds"].keys() == stages
    assert results["verdict"] in ("pass", "check", "fail")
    assert "held_fine" in summary["evidence"]
    assert summary["origin"]["versions"].keys() >= {"adregnet_jax", "jax", "python"}
    assert summary["options"]["method"] == "both" and summary["network"].startswith("pretrained (")
    assert summary["options"]["instance"]["similarity"] == "ncc"
    assert len(summary["sources"]) == 7
    assert len(summary["sources"]["fixed"]["sha256"]) == 64
    page = (out / "report.html").read_text()
    assert 'id="viewer"' in page and 'id="volume-0-warped_labels"' in page
    assert str(files / "fixed.nii.gz") in page
    assert "Dice" in result.stdout
    assert "inverse (deformable took " in result.stderr and "done (writing took " in result.stderr

    options = scans.call_args.kwargs
    assert options["affine"] == AffineConfig()
    assert options["instance"] == instance_preset(after_network=True)
    assert options["network"].name == summary["network"] and options["moving_mask"] is None
    assert options["fixed_mask"].shape == SHAPE
    assert options["modality"] == "auto" and options["adaptive"]


def test_itk_applies_what_register_wrote(files, scans, no_figures, tmp_path):
    itk = pytest.importorskip("SimpleITK")
    succeed(*pair(files, landmarks=True), "--output", tmp_path / "out", "--h5")
    out = tmp_path / "out"
    composite = itk.ReadTransform(str(out / "field.h5"))
    field = itk.DisplacementFieldTransform(itk.ReadImage(str(out / "field.nii.gz"), itk.sitkVectorFloat64))
    affine = itk.ReadTransform(str(out / "affine.txt"))
    moving = itk.ReadImage(str(files / "moving.nii.gz"))
    ours = read_image(out / "warped.nii.gz").values
    expected = read_points(files / "moving.csv")
    flip = np.array([-1, -1, 1])
    for transform in (composite, field):
        fixed = itk.ReadImage(str(files / "fixed.nii.gz"))
        theirs = itk.GetArrayFromImage(
            itk.Resample(moving, fixed, transform, itk.sitkLinear, 0.0)
        ).transpose()
        inside = scipy.ndimage.binary_erosion((ours != 0) & (theirs != 0))  # at borders ours fade out
        assert inside.mean() > 0.3
        assert np.abs(ours - theirs)[inside].mean() / np.ptp(MOVING) < 1e-4  # half a percent is asked for
        points = [transform.TransformPoint((p * flip).tolist()) for p in read_points(files / "fixed.csv")]
        np.testing.assert_allclose(points * flip, expected, atol=0.01)
    # The composite is the field without the affine, then the affine.
    parts = itk.CompositeTransform(composite)
    np.testing.assert_allclose(parts.GetNthTransform(0).GetParameters(), affine.GetParameters(), atol=1e-6)


@pytest.fixture
def nothing_measured(monkeypatch):
    """Skips figures and measurements, for tests of earlier stages."""
    nothing = create_autospec(measure_scans, return_value=Measurement({}, *[None] * 6))
    monkeypatch.setattr("adregnet_jax.registration.results.measure_scans", nothing)
    monkeypatch.setattr("adregnet_jax.registration.result_files.as_text", lambda row: "")
    judge = create_autospec(assess_measured, return_value=None)
    monkeypatch.setattr("adregnet_jax.registration.files.assess_measured", judge)
    write = create_autospec(
        write_results, side_effect=lambda folder, *_, **__: (folder / "preview.png").touch()
    )
    monkeypatch.setattr("adregnet_jax.registration.result_files.write_results", write)


@pytest.fixture
def judged(monkeypatch):
    """Sets the verdict of all registrations."""

    def give(verdict):
        assessment = Assessment(verdict, 0.25, ("the field folds in 9 % of the foreground",))
        judge = create_autospec(assess_measured, return_value=assessment)
        monkeypatch.setattr("adregnet_jax.registration.files.assess_measured", judge)

    return give


@pytest.mark.parametrize(
    ("verdict", "fail_on", "status"),
    [
        ("pass", "check", 0),
        ("check", "check", 3),
        ("check", "fail", 0),
        ("fail", "fail", 3),
        (None, "check", 3),
        (None, "fail", 0),
    ],
)
def test_the_verdict_is_printed_and_decides_the_exit_status(
    files, scans, judged, tmp_path, verdict, fail_on, status
):
    judged(verdict)
    result = run(*pair(files), "--output", tmp_path / "out", "--fail-on", fail_on)
    assert result.exit_code == status, result.output
    assert "- the field folds in 9 % of the foreground" in result.stdout
    assert ("score 0.25" in result.stdout) == (verdict is not None)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["results"]["verdict"] == verdict


def test_report_static_draws_pictures(files, scans, no_figures, tmp_path):
    out = tmp_path / "out"
    succeed(*pair(files, landmarks=True), "--output", out, "--report", "static")
    page = (out / "report.html").read_text()
    assert '<img alt="three planes" src="data:image/png;base64' in page
    assert "viewer" not in page and "verdict" in page
    line = refusal(*pair(files), "--output", tmp_path / "b", "--report", "none")
    assert "'none' is not one of 'interactive', 'static'" in line


def test_assess_off_gives_no_verdict(files, scans, tmp_path):
    printed = succeed(*pair(files), "--output", tmp_path / "out", "--assess", "off").stdout
    assert "verdict" not in printed
    assert "verdict" not in json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    line = refusal(*pair(files), "--output", tmp_path / "b", "--assess", "off", "--fail-on", "fail")
    assert "--fail-on fail needs a verdict" in line


def test_assess_full_writes_the_predicted_error(files, scans, tmp_path):
    succeed(*pair(files), "--output", tmp_path / "out", "--assess", "full")
    assert names(tmp_path / "out") == WRITTEN | {"error.nii.gz"}
    assert read_image(tmp_path / "out" / "error.nii.gz").shape == SHAPE


def test_a_batch_has_its_verdicts_in_the_table(files, scans, judged, tmp_path):
    judged("check")
    (files / "pairs.csv").write_text("fixed,moving\nfixed.nii.gz,moving.nii.gz\n")
    result = run("batch", files / "pairs.csv", "--output", tmp_path / "out", "--fail-on", "check")
    assert result.exit_code == 3, result.output
    assert "0 pass, 1 check, 0 fail" in result.stdout
    with (tmp_path / "out" / "results.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (row["verdict"], row["score"]) == ("check", "0.25")


def test_options_reach_the_worker(files, scans, nothing_measured, tmp_path):
    def options(*arguments):
        succeed(*pair(files), "--output", tmp_path / str(scans.call_count), "--preview", *arguments)
        return scans.call_args.kwargs

    assert options("--no-affine")["affine"] is None
    assert options("--rigid")["affine"] == AffineConfig(kind="rigid")
    assert options("--modality", "multi")["modality"] == "multi"
    found = options("--effort", "fast", "--diffeomorphic", "--set", "smoothness=0.7", "--set", "steps=(7,)")
    fast = instance_preset("fast", after_network=True)
    assert (found["instance"].factors, found["instance"].steps) == (fast.factors, (7,))
    assert found["instance"].smoothness == 0.7
    assert found["instance"].diffeomorphic
    thorough, same = (
        options(*flags)["instance"] for flags in (("--effort", "thorough"), ("--subjects", "same"))
    )
    assert thorough == instance_preset("thorough", after_network=True)
    assert same == instance_preset(subjects="same", after_network=True)
    alone = options("--method", "instance", "--effort", "thorough")["instance"]
    assert alone == instance_preset("thorough") != thorough
    assert [options(*flag)["apart"] for flag in ([], ["--apart"])] == [False, True]
    assert options("--device", "cpu:0")["affine"] == AffineConfig()


def test_presets_differ_in_work():
    for after_network in (False, True):
        presets = [
            instance_preset(effort, after_network=after_network) for effort in ("fast", "default", "thorough")
        ]
        work = [sum(n / f**3 for n, f in zip(p.steps, p.factors, strict=True)) for p in presets]
        assert work == sorted(set(work))
    with pytest.raises(ValueError, match="fast, default, thorough, not 'heroic'"):
        instance_preset("heroic")


def test_presets_differ_in_freedom():
    kinds = [instance_preset("thorough", subjects) for subjects in ("same", "any", "different")]
    assert instance_preset() == InstanceConfig()
    for kind in kinds:
        kind.check()
    smoothness = [kind.smoothness for kind in kinds]
    assert smoothness == sorted(smoothness, reverse=True)
    with pytest.raises(ValueError, match="same, different, any, not 'twins'"):
        instance_preset("fast", "twins")


def test_options_that_contradict(files, tmp_path):
    out = ["--output", tmp_path / "out"]
    for arguments, message in [
        (["--apart", "--no-affine"], "--apart needs the affine step"),
        (
            ["--method", "instance", "--weights", tmp_path],
            "--method instance uses no network: drop the weights, or use --method both",
        ),
        (["--method", "network", "--diffeomorphic"], "use --method both"),
        (["--rigid", "--no-affine"], "contradict"),
        (["--tiles", 32, "--method", "instance"], "no network that could run on tiles: use --method both"),
        (["--set", "smothness=1"], "did you mean smoothness?"),
        (["--set", "smoothness"], "expected NAME=VALUE"),
        (["--set", "factors=(4,2,1)"], "one entry per level"),
        (["--method", "magic"], "'magic' is not one of"),
        (["--effort", "3"], "'3' is not one of"),
        (["--colour", "red"], "No such option"),
        (["--device", "abacus"], "--device abacus: there is no such device; JAX has cpu:0"),
        (["--device", "cpu:99"], "there is no such device"),
        (["--fixed-labels", files / "fixed_labels.nii.gz"], "--fixed-labels and --moving-labels belong"),
        (["--moving-landmarks", files / "moving.csv"], "--fixed-landmarks and --moving-landmarks belong"),
    ]:
        assert message in refusal(*pair(files), *out, *arguments)
    assert "Missing option '--output'" in refusal(*pair(files))
    assert "Missing argument" in refusal("register", files / "fixed.nii.gz", *out)
    assert "Missing command" in refusal()
    assert "No such command 'regster'" in refusal("regster")
    assert names(tmp_path) == {"in"}


def test_files_that_can_not_be_used(files, scans, tmp_path):
    out = ["--output", tmp_path / "out"]
    fixed = files / "fixed.nii.gz"

    def broken(name, content):
        (files / name).write_bytes(content)
        return files / name

    whole = (files / "moving.nii.gz").read_bytes()
    metres = nib.Nifti1Image.from_filename(files / "moving.nii.gz")
    metres.header.set_xyzt_units("meter")
    nib.save(metres, files / "metres.nii.gz")
    for moving, message in [
        (broken("text.nii.gz", b"hello"), "can't be read"),
        (broken("text.nii", b"hello" * 200), "not a NIfTI file"),
        (broken("short.nii.gz", whole[: len(whole) // 2]), "damaged or cut off"),
        (broken("junk.nii.gz", gzip.compress(b"x" * 1000)), "not a NIfTI file"),
        (files / "metres.nii.gz", "units are metres; expected mm"),
        (files / "none.nii.gz", "no such file"),
        (files / "fixed.csv", "not a NIfTI file"),
    ]:
        line = refusal("register", fixed, moving, *out)
        assert str(moving) in line
        assert message in line

    for arguments, message in [
        (("--fixed-labels", fixed, "--moving-labels", files / "moving.nii.gz"), "labels must be whole"),
        (
            (
                "--fixed-labels",
                files / "moving_labels.nii.gz",
                "--moving-labels",
                files / "moving_labels.nii.gz",
            ),
            "expected one grid",
        ),
        (
            (
                "--fixed-landmarks",
                broken("a.csv", b"i,j,k\n1,2,3\n"),
                "--moving-landmarks",
                files / "moving.csv",
            ),
            "columns are i, j, k; expected x, y, z",
        ),
        (
            (
                "--fixed-landmarks",
                broken("b.csv", b"x,y,z\n1,2,3\n"),
                "--moving-landmarks",
                files / "moving.csv",
            ),
            "has 1 landmarks",
        ),
    ]:
        assert message in refusal(*pair(files), *out, *arguments)
    far = read_points(files / "moving.csv") + 500
    write_points(files / "far.csv", far)
    assert "20 of 20 landmarks lie outside" in refusal(
        *pair(files), *out, "--fixed-landmarks", files / "fixed.csv", "--moving-landmarks", files / "far.csv"
    )
    assert names(tmp_path) == {"in"}
    scans.assert_not_called()


def test_what_the_worker_raises(files, scans, tmp_path, monkeypatch):
    monkeypatch.setattr("adregnet_jax.cli.register.planned_bytes", lambda *_: 0)
    out = ["--output", tmp_path / "out"]
    for error, message in [
        (UserError("the scans have no overlap\nin the world"), "the scans have no overlap in the world"),
        (MemoryError(), "out of memory: --effort fast takes less"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "--effort fast"),
    ]:

        def fail(*_, error=error, **__):
            raise error

        scans.side_effect = fail
        assert message in refusal(*pair(files), *out)
    assert names(tmp_path) == {"in"}

    def bug(*_, **__):
        raise RuntimeError("a mistake of ours")

    scans.side_effect = bug
    assert isinstance(run(*pair(files), *out).exception, RuntimeError)  # is not hidden
    assert names(tmp_path) == {"in"}


def test_a_field_that_is_not_finite(files, scans, tmp_path):
    displacement = jnp.asarray(FIELD.displacement).at[0, 0, 0, 0].set(jnp.nan)
    broken = DisplacementField(displacement, FIELD.affine)

    def diverge(*arguments, **options):
        return dataclasses.replace(found_field(*arguments, **options), field=broken)

    scans.side_effect = diverge
    assert "not finite" in refusal(*pair(files), "--output", tmp_path / "out")


def test_the_output_folder(files, scans, no_figures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    succeed(*pair(files, labels=True), "--output", out)  # an empty folder will do
    line = refusal(*pair(files), "--output", out)
    assert "is not empty: choose another folder, or overwrite it" in line
    succeed(*pair(files), "--output", out, "--overwrite")
    assert names(out) == WRITTEN  # nothing of the earlier registration
    (out / "thesis.txt").touch()
    assert "thesis.txt, which isn't ours" in refusal(*pair(files), "--output", out, "--overwrite")
    assert names(out) == WRITTEN | {"thesis.txt"}
    assert "is a file" in refusal(*pair(files), "--output", files / "fixed.csv")
    assert "is a mount point" in refusal(*pair(files), "--output", "/", "--overwrite")
    (out / "thesis.txt").unlink()
    (tmp_path / "link").symlink_to(out)
    succeed(*pair(files, labels=True), "--output", tmp_path / "link", "--overwrite")
    assert (tmp_path / "link").is_symlink()
    assert names(out) == WRITTEN | {"warped_labels.nii.gz"}
    line = refusal(*pair(files), "--output", files / "fixed.csv" / "out")
    assert f"{files / 'fixed.csv' / 'out'}: can't be written (Not a directory" in line
    assert names(tmp_path) == {"in", "out", "link"}


def test_preview_alone(files, scans, tmp_path):
    result = succeed(*pair(files), "--output", tmp_path / "out", "--preview")
    assert names(tmp_path / "out") == {"preview.png"}
    assert (tmp_path / "out" / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert "preview.png" in result.stdout


def test_other_contrasts_without_labels(files, scans, tmp_path):
    succeed(*pair(files), "--output", tmp_path / "out", "--modality", "multi")
    results = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert results["dice"] is results["tre_mm"] is None
    assert results["similarity_measure"] == "mutual information"
    assert results["similarity"] > 0


def test_apply_to_images(files, tmp_path):
    least = MOVING.min()  # what lies outside of the image
    field = DisplacementField(jnp.asarray(DISPLACEMENT), jnp.asarray(AFFINE))
    warped = warp_image(field, jnp.asarray(MOVING - least), jnp.asarray(MOVING_AFFINE)) + least
    out = tmp_path / "a.nii.gz"
    succeed("apply", files / "field.nii.gz", files / "moving.nii.gz", "--output", out)
    np.testing.assert_allclose(read_image(out).values, warped, atol=1e-3)
    np.testing.assert_allclose(read_image(out).affine, AFFINE, atol=1e-4)
    for mode in ("nearest", "label"):
        path = tmp_path / f"{mode}.nii.gz"
        succeed("apply", files / "field.nii.gz", files / "moving_labels.nii.gz", "-o", path, "--mode", mode)
        found = read_image(path, labels=True).values
        assert set(np.unique(found)) == {0, 1, 2}
    assert "exists already" in refusal(
        "apply", files / "field.nii.gz", files / "moving.nii.gz", "--output", out
    )
    succeed("apply", files / "field.nii.gz", files / "moving.nii.gz", "-o", out, "--overwrite")
    assert names(tmp_path) == {"in", "a.nii.gz", "nearest.nii.gz", "label.nii.gz"}


def test_apply_keeps_whole_numbers(files, tmp_path):
    """Also those that float32 or int32 would change."""
    ids = np.array([0, 2**24 + 1, 614454277, 2**40 + 1])[np.round(MOVING).astype(int) % 4]
    for number, values in enumerate((ids, ids.astype(np.float64))):
        path = tmp_path / f"{number}.nii"
        nib.save(nib.Nifti1Image(values, MOVING_AFFINE, dtype=values.dtype), path)
        for mode in ("nearest", "label") if values.dtype.kind == "i" else ("nearest",):
            out = tmp_path / f"{number}_{mode}.nii.gz"
            succeed("apply", files / "field.nii.gz", path, "-o", out, "--mode", mode)
            found = np.asanyarray(nib.Nifti1Image.from_filename(out).dataobj)
            assert set(np.unique(found)) == set(np.unique(ids))
    with pytest.warns(UserWarning, match=r"whole numbers above 2\^24 are rounded"):
        succeed("apply", files / "field.nii.gz", tmp_path / "0.nii", "-o", tmp_path / "linear.nii")


def test_apply_to_points(files, tmp_path):
    out = tmp_path / "a.mrk.json"
    succeed("apply", files / "field.nii.gz", files / "fixed.csv", "-o", out)
    expected = warp_points(
        DisplacementField(jnp.asarray(DISPLACEMENT), jnp.asarray(AFFINE)),
        jnp.asarray(read_points(files / "fixed.csv")),
    )
    np.testing.assert_allclose(read_points(out), expected, atol=1e-3)
    write_points(files / "far.csv", np.array([[900.0, 0, 0], *read_points(files / "fixed.csv")]))
    result = succeed("apply", files / "field.nii.gz", files / "far.csv", "-o", tmp_path / "b.csv")
    assert "note: 1 points lie outside" in result.stderr


def test_what_apply_refuses(files, tmp_path):
    out = ["-o", tmp_path / "a.nii.gz"]
    field = files / "field.nii.gz"
    far = MOVING_AFFINE + 2000 * np.eye(4, k=3)
    write_image(files / "far.nii.gz", Image(MOVING, far))
    (files / "wrong.csv").write_text("a,b\n1,2\n")
    for arguments, message in [
        ((field, files / "far.nii.gz"), "doesn't lead into this image"),
        ((files / "fixed.nii.gz", files / "moving.nii.gz"), "is not a displacement field"),
        ((field, files / "moving.nii.gz", "--format", "learn2reg"), "is not a displacement field"),
        ((field, files / "moving.nii.gz", "--mode", "label"), "whole numbers"),
        ((field, field), "expected one 3-D volume"),
        ((field, files / "wrong.csv"), "columns are a, b; expected x, y, z"),
        ((files / "none.nii.gz", files / "moving.nii.gz"), "no such file"),
        ((field, files / "moving.nii.gz", "--mode", "quintic"), "'quintic' is not one of"),
    ]:
        assert message in refusal("apply", *arguments, *out)
    assert "can't write this kind" in refusal(
        "apply", field, files / "moving.nii.gz", "-o", tmp_path / "a.jpg"
    )
    assert names(tmp_path) == {"in"}


def test_invert_and_compose(files, tmp_path):
    small = files / "small.npz"
    write_field(small, 0.3 * DISPLACEMENT, AFFINE)
    succeed("invert", small, "-o", tmp_path / "inverse.nii.gz")
    succeed("compose", small, tmp_path / "inverse.nii.gz", small, "-o", tmp_path / "same.npz")
    inner = (slice(4, -4),) * 3
    found = read_field(tmp_path / "same.npz")[0]
    np.testing.assert_allclose(found[inner], 0.3 * DISPLACEMENT[inner], atol=0.02)

    assert "two or more fields" in refusal("compose", small, "-o", tmp_path / "a.npz")
    other = files / "other.npz"
    write_field(other, DISPLACEMENT[:-1], AFFINE)
    succeed("compose", small, other, "-o", tmp_path / "a.npz")
    assert read_field(tmp_path / "a.npz")[0].shape == DISPLACEMENT.shape
    write_field(files / "folded.npz", 8 * DISPLACEMENT, AFFINE)
    result = succeed("invert", files / "folded.npz", "-o", tmp_path / "b.npz")
    assert "no inverse where a field folds" in result.stderr
    assert "exists already" in refusal("invert", small, "-o", tmp_path / "b.npz")
    assert names(tmp_path) == {"in", "inverse.nii.gz", "same.npz", "a.npz", "b.npz"}


def test_convert(files, tmp_path):
    field = files / "field.nii.gz"
    succeed("convert", field, "-o", tmp_path / "a.nii.gz", "--format", "learn2reg")
    assert nib.Nifti1Image.from_filename(tmp_path / "a.nii.gz").shape == (*SHAPE, 3)
    succeed(
        "convert", tmp_path / "a.nii.gz", "--from", "learn2reg", "-o", tmp_path / "b.nii", "--format", "nifti"
    )
    assert nib.Nifti1Image.from_filename(tmp_path / "b.nii").header["intent_code"] == 1006
    succeed("convert", tmp_path / "b.nii", "-o", tmp_path / "c.npz")
    np.testing.assert_allclose(read_field(tmp_path / "c.npz")[0], DISPLACEMENT, atol=1e-4)
    write_matrix(tmp_path / "a.txt", MATRIX)
    succeed("convert", tmp_path / "a.txt", "-o", tmp_path / "b.tfm")
    np.testing.assert_allclose(read_matrix(tmp_path / "b.tfm"), MATRIX)
    assert "kind of file not known" in refusal("convert", field, "-o", tmp_path / "a.mat")
    line = refusal("convert", field, "--from", "learn2reg", "-o", tmp_path / "d.npz")
    assert "is not a displacement field" in line


def test_info(files, tmp_path):
    def described(path):
        plain = succeed("info", path).stdout
        found = json.loads(succeed("info", path, "--json").stdout)
        assert f"kind            {found['kind']}" in plain
        return found

    image = described(files / "moving.nii.gz")
    assert image["kind"] == "image"
    assert image["shape"] == list(MOVING_SHAPE)
    np.testing.assert_allclose(image["spacing_mm"], [1.8, 2.2, 1.7], atol=1e-4)
    assert image["orientation"] == "".join(nib.aff2axcodes(MOVING_AFFINE))
    np.testing.assert_allclose([image["minimum"], image["maximum"]], [MOVING.min(), MOVING.max()], rtol=1e-5)

    field = described(files / "field.nii.gz")
    motion_mm = np.linalg.norm(DISPLACEMENT @ AFFINE[:3, :3].T, axis=-1)
    assert field["kind"] == "field"
    assert field["motion_max_mm"] == pytest.approx(motion_mm.max(), rel=1e-4)
    assert 0 <= field["folded_percent"] <= 100
    write_field(tmp_path / "a.nii.gz", DISPLACEMENT, AFFINE, format="learn2reg")
    assert described(tmp_path / "a.nii.gz")["motion_mean_mm"] == pytest.approx(motion_mm.mean(), rel=1e-4)

    write_matrix(tmp_path / "a.txt", MATRIX)
    matrix = described(tmp_path / "a.txt")
    assert matrix["rotation_deg"] == pytest.approx(7.1, abs=0.3)  # of 3, -4 and 5 degrees about the axes
    assert matrix["determinant"] == pytest.approx(1.05 * 0.95, rel=1e-6)
    points = described(files / "fixed.csv")
    assert (points["kind"], points["points"]) == ("points", 20)

    assert "no such file" in refusal("info", tmp_path / "none.nii.gz")
    (tmp_path / "b.nii.gz").write_bytes(b"nothing")
    assert "b.nii.gz" in refusal("info", tmp_path / "b.nii.gz")


def write_pairs(files, rows, columns="name,fixed,moving"):
    (files / "pairs.csv").write_text("\n".join([columns, *rows]) + "\n")
    return files / "pairs.csv"


def results(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_batch_continues_after_a_failure_and_resumes(files, scans, no_figures, tmp_path):
    (files / "bad.nii.gz").write_bytes(b"nothing")
    row = "fixed.nii.gz,moving.nii.gz,fixed_labels.nii.gz,moving_labels.nii.gz"
    rows = [f"a,{row}", "b,fixed.nii.gz,bad.nii.gz,,", f"c,{row}"]
    pairs = write_pairs(files, rows, "name,fixed,moving,fixed_labels,moving_labels")
    out = tmp_path / "out"
    result = run("batch", pairs, "--output", out)
    assert result.exit_code == 1
    assert "2 of 3 pairs registered" in result.stdout
    found = results(out)
    assert [row["status"] for row in found] == ["done", "failed", "done"]
    assert "bad.nii.gz" in found[1]["message"]
    assert float(found[0]["dice"]) > 0.99
    assert found[1]["dice"] == ""
    assert names(out) == {"a", "c", "results.csv"}
    assert scans.call_count == 2

    (files / "bad.nii.gz").write_bytes((files / "moving.nii.gz").read_bytes())
    # Half a summary is none: the pair is done again.
    (out / "c" / "summary.json").write_text((out / "c" / "summary.json").read_text()[:100])
    succeed("batch", pairs, "--output", out)
    assert scans.call_count == 2 + 2
    assert [row["status"] for row in results(out)] == ["done"] * 3
    succeed("batch", pairs, "--output", out)
    assert scans.call_count == 4
    succeed("batch", pairs, "--output", out, "--overwrite")
    assert scans.call_count == 7

    result = run("batch", pairs, "--output", out, "--effort", "fast")
    assert result.exit_code == 1
    assert "was made with other options" in results(out)[0]["message"]
    write_image(files / "moving.nii.gz", Image(MOVING + 1, MOVING_AFFINE), overwrite=True)
    result = run("batch", pairs, "--output", out)
    assert "was made from other files" in results(out)[0]["message"]
    assert [row["status"] for row in results(out)] == ["failed", "done", "failed"]


def test_a_failing_pair_does_not_affect_the_others(files, scans, no_figures, tmp_path):

    def sometimes(*arguments, **options):
        if scans.call_count == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        if scans.call_count == 2:
            raise ZeroDivisionError("a mistake of ours")
        return found_field(*arguments, **options)

    scans.side_effect = sometimes
    row = "fixed.nii.gz,moving.nii.gz"
    assert (
        run("batch", write_pairs(files, [f"{n},{row}" for n in "abc"]), "-o", tmp_path / "out").exit_code == 1
    )
    found = results(tmp_path / "out")
    assert [row["status"] for row in found] == ["failed", "failed", "done"]
    assert found[0]["message"].startswith("out of memory: --effort fast")
    assert found[1]["message"] == "ZeroDivisionError: a mistake of ours"


def test_csv_files_that_can_not_be_used(files, scans, tmp_path):
    out = ["-o", tmp_path / "out"]
    good = "fixed.nii.gz,moving.nii.gz"
    for rows, columns, message in [
        ([], "fixed,moving", "has no rows"),
        ([good], "fixed,mooving", "columns are fixed, mooving; expected fixed, moving"),
        ([f"a,{good}", f"a,{good}"], "name,fixed,moving", "two pairs are called a"),
        ([good, good], "fixed,moving", "two pairs are called fixed_moving"),
        ([f"../a,{good}"], "name,fixed,moving", "expected one that a folder can have"),
        (["fixed.nii.gz,"], "fixed,moving", "line 2: moving is empty"),
        (["fixed.nii.gz"], "fixed,moving", "line 2: expected as many cells"),
        ([f"{good},fixed.csv"], "fixed,moving,fixed_landmarks", "belong together"),
    ]:
        assert message in refusal("batch", write_pairs(files, rows, columns), *out)
    assert "no such file" in refusal("batch", files / "none.csv", *out)
    assert names(tmp_path) == {"in"}


TINY = ModelConfig(channels=(4,), cross_attention=False, regional_attention=False, multi_resolution=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The files in a workdir of train.py that the command reads, and the parameters in it."""
    workdir = tmp_path_factory.mktemp("run")
    volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
    params = jax.tree.map(jnp.asarray, random_parameters(make_model(TINY), volume, volume))
    state = TrainState(
        step=jnp.ones((), jnp.int32),
        params=params,
        opt_state=(),
        best_metric=jnp.zeros(()),
        best_step=jnp.zeros((), jnp.int32),
    )
    checkpoints = Checkpoints(workdir)
    checkpoints.save(1, state)
    checkpoints.close()
    (workdir / "config.json").write_text(json.dumps({"config": {"model": dataclasses.asdict(TINY)}}))
    return workdir, params


def test_weights_reach_the_worker(files, scans, nothing_measured, weights, tmp_path):
    workdir, params = weights
    for number, arguments in enumerate(([], ["--method", "network"])):
        out = tmp_path / str(number)
        succeed(*pair(files), "--output", out, "--preview", "--weights", workdir, *arguments)
        options = scans.call_args.kwargs
        jax.tree.map(np.testing.assert_array_equal, options["network"].params, params)
        assert options["network"].model == make_model(TINY)
        assert options["instance"] == (None if arguments else instance_preset(after_network=True))


def test_the_shipped_weights_are_the_default(files, scans, nothing_measured, tmp_path):
    for method, name in (("both", "pretrained ("), ("network", "pretrained ("), ("instance", None)):
        out = tmp_path / method
        arguments = [] if method == "both" else ["--method", method]
        succeed(*pair(files), "--output", out, "--preview", *arguments)
        network = scans.call_args.kwargs["network"]
        assert network is None if name is None else network.name.startswith(name)


def test_a_run_records_the_grid_that_it_was_trained_on(files, scans, nothing_measured, weights, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(weights[0], workdir)
    record = json.loads((workdir / "config.json").read_text())
    synthetic = {"data": {"kind": "synthetic", "synthetic": {"shape": [8, 8, 8]}}}
    cases = [
        ({}, TrainingDomain()),
        ({"spacing_mm": [9.0, 9.0, 9.0], "axes": "LPS"}, TrainingDomain("LPS", (9.0, 9.0, 9.0))),
        (
            {"config": record["config"] | synthetic, "spacing_mm": [3.0] * 3},
            TrainingDomain("RAS", voxels=(512, 4096), same_contrast=True),
        ),
    ]
    for number, (recorded, trained) in enumerate(cases):
        (workdir / "config.json").write_text(json.dumps(record | recorded))
        out = tmp_path / str(number)
        succeed(*pair(files), "--output", out, "--preview", "--weights", workdir)
        assert scans.call_args.kwargs["network"].scans == trained


def test_a_packed_run_is_the_run(files, scans, nothing_measured, weights, tmp_path):
    packed = tmp_path / "packed"
    succeed("pack", weights[0], "--output", packed)
    assert names(packed) == {"weights.npz", "weights.json"}
    assert "is not empty" in refusal("pack", weights[0], "--output", packed)
    (packed / "MODEL_CARD.md").write_text("what it is")
    succeed("pack", weights[0], "--output", packed, "--overwrite")
    assert (packed / "MODEL_CARD.md").read_text() == "what it is"
    succeed(*pair(files), "--output", tmp_path / "out", "--preview", "--weights", packed)
    network = scans.call_args.kwargs["network"]

    def check(found, expected):
        np.testing.assert_allclose(found, expected, rtol=2**-11, atol=1e-7)  # of float16

    jax.tree.map(check, network.params, weights[1])
    assert "holds no config.json" in refusal("pack", tmp_path / "none", "--output", tmp_path / "b")


@pytest.fixture
def related(files):
    """The files of a pair that a known field relates."""
    fixed = warp_image(FIELD, jnp.asarray(MOVING), jnp.asarray(MOVING_AFFINE))
    write_image(files / "fixed.nii.gz", Image(np.asarray(fixed), AFFINE), overwrite=True)
    return files


QUICK = ["--method", "instance", "--set", "factors=(1,)", "--set", "steps=(30,)", "--set", "strides=(2,)"]


def test_a_pair_is_registered_from_files_to_files(related, no_figures, tmp_path):
    out = tmp_path / "out"
    succeed(*pair(related, landmarks=True), "--output", out, *QUICK)
    assert names(out) == WRITTEN
    found = json.loads((out / "summary.json").read_text())["results"]
    assert found["tre_mm"] < 0.5 * found["tre_before_mm"]
    assert found["similarity"] > found["similarity_before"]
    # Applying the field to the moving file gives the warped file.
    succeed("apply", out / "field.nii.gz", related / "moving.nii.gz", "-o", tmp_path / "again.nii.gz")
    again, warped = (read_image(file).values for file in (tmp_path / "again.nii.gz", out / "warped.nii.gz"))
    np.testing.assert_allclose(again, warped, atol=1e-3 * np.ptp(warped))


@pytest.mark.parametrize(("method", "tile"), [("network", None), ("network", 16), ("both", None)])
def test_a_pair_is_registered_by_a_network(related, no_figures, weights, tmp_path, method, tile):
    out = tmp_path / "out"
    options = ["--method", method, "--weights", weights[0], "--no-affine", "--keep", "--device", "cpu"]
    options += [] if tile is None else ["--tiles", tile]
    succeed(*pair(related), "--output", out, *options, *(QUICK[2:] if method == "both" else []))
    assert names(out) == WRITTEN
    network, params = make_model(TINY), weights[1]
    scans = [read_image(related / f"{which}.nii.gz") for which in ("fixed", "moving")]
    displacement, _ = read_field(out / "field.nii.gz")
    assert displacement.shape == (*scans[0].shape, 3) and np.isfinite(displacement).all()
    assert json.loads((out / "summary.json").read_text())["network"] == str(weights[0])
    if method == "network":
        still = DisplacementField(jnp.zeros((*SHAPE, 3)), jnp.asarray(AFFINE))
        fixed, moving = (jnp.asarray(rescale_percentiles(scan.values, scan.name)) for scan in scans)
        moved = warp_image(still, moving, jnp.asarray(MOVING_AFFINE), padding="border")
        expected = register(params, fixed[None, ..., None], moved[None, ..., None], model=network, tile=tile)
        np.testing.assert_allclose(displacement, expected.displacement[0], atol=1e-3)


def test_weights_that_can_not_be_used(files, scans, weights, tmp_path):
    def refused(workdir):
        return refusal(*pair(files), "--output", tmp_path / "out", "--weights", workdir)

    assert "holds no config.json" in refused(tmp_path / "none")
    workdir = tmp_path / "run"
    shutil.copytree(weights[0], workdir)
    record = workdir / "config.json"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"channels": [8]}, "has a different architecture"),
        ({"depth": 3}, "no model that this version knows"),
        ({"architecture": "transformer"}, "'transformer': expected adregnet"),
    ]
    for changes, message in cases:
        record.write_text(json.dumps({"config": {"model": dataclasses.asdict(TINY) | changes}}))
        assert message in refused(workdir)
    record.write_text("{")
    assert "no model that this version knows" in refused(workdir)
    shutil.copy(weights[0] / "config.json", record)
    shutil.rmtree(workdir / "checkpoints")
    assert "holds no checkpoint" in refused(workdir)
    assert names(tmp_path) == {"in", "run"}
    scans.assert_not_called()


def test_export(weights, tmp_path):
    out = tmp_path / "program.bin"
    arguments = ["export", "-o", out, "--shape", 8, 10, 8, "--spacing", 1, 1.5, 2]
    arguments += ["--weights", weights[0], "--method", "network", "--platforms", "cpu"]
    succeed(*arguments)
    assert "exists already" in refusal(*arguments)
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    assert program.platforms == ("cpu",)
    pair = np.random.default_rng(0).random((2, 3, 8, 10, 8, 1), np.float32)
    displacement, _ = jax.jit(program.call)(*pair)
    expected = jax.jit(functools.partial(register, weights[1], model=make_model(TINY)))(*pair)
    np.testing.assert_allclose(displacement, expected.displacement, atol=1e-4)
    assert np.abs(displacement).max() > 0.1


def test_what_export_refuses(tmp_path):
    out = ["export", "-o", tmp_path / "a", "--shape", 8, 8, 8]
    assert "spacings above 0" in refusal(*out, "--spacing", 1, 1, 0)
    assert "'abacus' is none of cpu" in refusal(*out, "--spacing", 1, 1, 1, "--platforms", "cpu,abacus")
    assert "needs --weights" in refusal(*out, "--spacing", 1, 1, 1, "--method", "both")
    assert "--shape" in refusal("export", "-o", "a", "--shape", 8, 8, "x", "--spacing", 1, 1, 1)
    assert not names(tmp_path)


SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
from adregnet_jax.registration import files
files.register_scans = lambda *_, **__: (print("computing", flush=True), time.sleep(60))
from adregnet_jax.cli.app import main
main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_nothing(files, tmp_path, number, status):
    out = tmp_path / "out"
    arguments = [str(argument) for argument in (*pair(files), "--output", out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=environment,
    )
    assert process.stdout.readline() == "computing\n", process.communicate()
    assert any(path.name.startswith(".") for path in tmp_path.iterdir())  # where it would be written
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert names(tmp_path) - {"cache"} == {"in"}


def test_a_sample_is_a_pair_to_register(scans, nothing_measured, tmp_path):
    folder = tmp_path / "a pair"
    printed = succeed("sample", folder).stdout
    assert names(folder) == {"fixed.nii.gz", "fixed.csv", "moving.nii.gz", "moving.csv"}
    _, _, command = printed.partition("adregnet ")
    succeed(*shlex.split(command.replace("\\\n", " ")), "--preview")
    fixed, moving = scans.call_args.args
    assert 0 < np.abs(fixed.values - moving.values).mean() < 0.2
    points_mm = [read_points(folder / f"{scan}.csv") for scan in ("fixed", "moving")]
    assert 3 < np.linalg.norm(points_mm[0] - points_mm[1], axis=1).mean() < 30
    again, other = tmp_path / "again", tmp_path / "other"
    succeed("sample", again)
    succeed("sample", other, "--seed", 1)
    same, different = ((path / "fixed.csv").read_text() for path in (again, other))
    assert same == (folder / "fixed.csv").read_text() != different
    assert "exists and is not empty" in refusal("sample", folder)
    assert "isn't ours" in refusal("sample", files_of_others(folder), "--overwrite")


def files_of_others(folder):
    (folder / "thesis.txt").touch()
    return folder


def test_a_gpu_without_its_plugin(monkeypatch):
    cpu = jax.devices("cpu")

    def devices(platform=None):
        if platform in ("gpu", "cuda"):
            raise RuntimeError(f"Unknown backend: '{platform}' requested")
        return cpu

    monkeypatch.setattr(jax, "devices", devices)
    for name in ("gpu", "cuda:0"):
        with pytest.raises(UserError, match=rf"--device {name}: .*pip install 'adregnet-jax\[cuda12\]'"):
            start_jax(name)
    with pytest.raises(UserError, match="--device tpu: there is no such device; JAX has cpu:0, cpu:1"):
        monkeypatch.setattr(jax, "devices", create_autospec(devices, side_effect=[cpu[:2], RuntimeError]))
        start_jax("tpu")


def test_a_jax_that_is_not_supported_is_refused(monkeypatch, files, scans, tmp_path):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9.2")
    expected = "JAX is 0.9.2; expected 0.10 or newer"
    for arguments in (
        [*pair(files), "-o", tmp_path / "out"],
        ["info", files / "field.nii.gz"],
        ["pack", tmp_path, "-o", tmp_path / "packed"],
    ):
        assert expected in refusal(*arguments)
    scans.assert_not_called()


def test_warmup_reports_its_programs(monkeypatch):
    monkeypatch.setattr("adregnet_jax.launch.process.cache_every_program", lambda: None)
    options = ["--method", "instance", "--no-affine", "--set", "search_range_mm=0", "--effort", "fast"]
    said = succeed("warmup", "--shape", 15, 16, 17, "--spacing", 2, 2, 2, *options).stdout
    found = re.fullmatch(
        r"(\d+) programs, (\d+) of them from the cache, in [\d.]+ s,"
        r" for scans of 15-16 x 15-16 x 17-18 voxels\n",
        said,
    )
    assert found
    programs, from_cache = map(int, found.groups())  # the cache may have some from an earlier run
    assert 0 <= from_cache <= programs and programs > 0


def test_help_needs_no_jax():
    program = (
        "import sys; from adregnet_jax.cli.app import app\n"
        "try: app(['register', '--help'])\n"
        "except SystemExit as stop: status = stop.code\n"
        "print(status, sorted({'jax', 'numpy', 'nibabel', 'ml_collections'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "--moving-landmarks" in done.stdout
    assert succeed("--version").stdout.startswith("adregnet ")
