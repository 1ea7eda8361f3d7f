"""The commands on DICOM studies: the files they write, the input they refuse."""

import base64
import gzip
import json
import re
import sys
from unittest.mock import create_autospec

import pydicom
import pytest
from typer.testing import CliRunner

from adregnet_jax.cli.app import app
from adregnet_jax.registration.scans import register_scans
from tests.data.dicom import studies
from tests.registration.test_carried_dose import DOSE_LPS, SCALING, doses
from tests.registration.test_carried_structures import write_carried_study
from tests.registration.test_dicom_results import made_up_registration, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    mock = create_autospec(register_scans, side_effect=made_up_registration)
    monkeypatch.setattr("adregnet_jax.registration.files.register_scans", mock)
    monkeypatch.setattr("adregnet_jax.registration.result_files.png", lambda figure: b"png")
    monkeypatch.setattr("adregnet_jax.launch.process.use_compilation_cache", lambda: None)
    monkeypatch.setattr("adregnet_jax.launch.process.keep_freed_memory", lambda: None)


def adregnet(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_register_writes_dicom_objects_and_replaces_them(study, tmp_path):
    command = ("register", study / "fixed", study / "moving", "-o", tmp_path / "out", "--dicom")
    instance = ("--method", "instance")
    assert adregnet(*command, *instance).exit_code == 0
    written = {path.name for path in (tmp_path / "out" / "dicom").iterdir()}
    assert written == {"warped", "registration.dcm", "inverse.dcm", "affine.dcm"}
    page = (tmp_path / "out" / "report.html").read_text()
    packed = re.findall(r'id="volume-0-\w+">(.*?)</script>', page)
    assert len(packed) >= 5
    for text in (page.encode(), *(gzip.decompress(base64.b64decode(one)) for one in packed)):
        assert b"QZ77431" not in text and b"Rosenkrantz" not in text
    first = pydicom.dcmread(tmp_path / "out" / "dicom" / "affine.dcm")
    assert adregnet(*command, *instance, "--overwrite", "--anonymize").exit_code == 0
    second = pydicom.dcmread(tmp_path / "out" / "dicom" / "affine.dcm")
    assert first.PatientName == studies.PATIENT and second.PatientName != studies.PATIENT
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "sources" not in summary and "command" not in summary["origin"]
    assert str(study) not in (tmp_path / "out" / "report.html").read_text()


def refusal(*words):
    done = adregnet(*words)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    return line


def test_register_chooses_series_in_one_folder(study, tmp_path):
    together = tmp_path / "study"
    together.mkdir()
    for name in ("fixed", "moving"):
        for path in (study / name).iterdir():
            (together / f"{name}_{path.name}").write_bytes(path.read_bytes())
    fixed, moving = (studies.headers_of(study / name)[0].SeriesInstanceUID for name in ("fixed", "moving"))
    command = ("register", together, together, "-o", tmp_path / "out", "--method", "instance", "--dicom")
    line = refusal(*command)
    assert "holds 2 DICOM series" in line and fixed in line and moving in line and "--fixed-series" in line
    chosen = ("--fixed-series", fixed, "--moving-series", moving)
    assert adregnet(*command, *chosen).exit_code == 0
    made = pydicom.dcmread(tmp_path / "out" / "dicom" / "registration.dcm")
    assert made.FrameOfReferenceUID == studies.FRAME
    sources = json.loads((tmp_path / "out" / "summary.json").read_text())["sources"]
    assert sources["moving"]["series"] == moving
    assert "has no series 1.2.9" in refusal(*command, "--overwrite", *chosen, "--moving-series", "1.2.9")
    instance = command[:-1]
    assert "choose one by its UID (--series UID; of two scans, --fix" in refusal(*instance, "--overwrite")

    assert "choose one by its UID (--series UID" in refusal("info", together)
    one = ("--series", moving)
    assert adregnet("info", together, *one).stdout == adregnet("info", study / "moving").stdout
    field, warped = tmp_path / "out" / "field.nii.gz", tmp_path / "warped.nii.gz"
    assert adregnet("apply", field, together, "-o", warped, *one).exit_code == 0
    assert adregnet("apply", field, study / "moving", "-o", tmp_path / "other.nii.gz").exit_code == 0
    assert warped.read_bytes() == (tmp_path / "other.nii.gz").read_bytes()


def test_options_that_contradict_each_other(study, tmp_path):
    command = ("register", study / "fixed", study / "moving", "-o", tmp_path / "out", "--method", "instance")
    assert "add --dicom" in refusal(*command, "--anonymize")
    assert "drop it or --dicom" in refusal(*command, "--dicom", "--preview")


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    return write_carried_study(tmp_path_factory.mktemp("planned"))


def test_contours_prints_volumes_and_writes_a_folder(planned, tmp_path):
    series = ("--fixed", planned / "fixed", "--moving", planned / "moving")
    command = ("contours", planned / "structures.dcm", planned / "field.nii.gz", *series, "--only", "Lungs")
    done = adregnet(*command, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "change, %" in done.output and "Lungs" in done.output and "Empty" not in done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"structures.dcm", "volumes.csv"}
    assert "exists and is not empty" in refusal(*command, "-o", tmp_path / "out")
    assert adregnet(*command, "-o", tmp_path / "out", "--overwrite").exit_code == 0
    exchanged = ("--moving", planned / "fixed", "--fixed", planned / "moving")
    line = refusal(*command[:3], *exchanged, "-o", tmp_path / "other")
    assert "frame of reference" in line and "give the series" in line


def test_dose_prints_means_and_writes_a_folder(planned, tmp_path):
    other = studies.OTHER_FRAME
    path = studies.write_rtdose(tmp_path / "dose.dcm", doses(), DOSE_LPS, scaling=SCALING, frame=other)
    series = ("--fixed", planned / "fixed", "--moving", planned / "moving")
    command = ("dose", path, planned / "field.nii.gz", *series, "-o", tmp_path / "out")
    structures = ("--structures", planned / "structures.dcm")
    done = adregnet(*command, *structures, "--only", "Lungs")
    assert done.exit_code == 0, done.output
    assert "mean before" in done.stdout and "Lungs" in done.stdout
    assert "energy and mass are not conserved" in done.stderr
    written = {each.name for each in (tmp_path / "out").iterdir()}
    assert written == {"dose.dcm", "dvh.csv", "dvh.png", "means.csv"}
    assert "add --structures" in refusal(*command, "--only", "Lungs")
    assert adregnet(*command, "--overwrite").exit_code == 0
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"dose.dcm"}


def test_missing_pydicom_is_reported_with_the_command_to_install_it(planned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    series = ("--fixed", planned / "fixed", "--moving", planned / "moving")
    command = ("contours", planned / "structures.dcm", planned / "field.nii.gz", *series)
    assert "pip install 'adregnet-jax[dicom]'" in refusal(*command, "-o", tmp_path / "out")
