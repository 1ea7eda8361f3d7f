"""The benchmarks run, at sizes too small to be meaningful, and write the contents of their tables."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.benchmark import __main__ as benchmark
from adregnet_jax.data.io import nifti
from adregnet_jax.data.splits import load_splits
from adregnet_jax.launch.config_file import load_config
from adregnet_jax.metrics import dice
from adregnet_jax.registration.assessment.evidence import predicted_error
from tests.data.dicom import studies
from tests.xla_flags import QUICK_TO_COMPILE

pytestmark = pytest.mark.program

ROOT = Path(__file__).parents[2]
ROUTES = {"adregnet_jax", "lax", "PyTorch", "padded slices", "grid_sample", "grid_sample, from displacement"}


def rows_of(script: str, json_path: Path, *options: str) -> list[dict]:
    return run([f"benchmarks/{script}.py", *options], script, json_path)["rows"]


def run(program: list[str], name: str, json_path: Path, about: frozenset[str] = frozenset()) -> dict:
    """The record that a benchmark writes, after checking that it equals the printed table."""
    command = [sys.executable, *program, "--rounds", "1", "--json", str(json_path)]
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(json_path.read_text(encoding="utf-8"))
    assert set(written) == {"benchmark", "command", "machine", "rows"}
    assert written["benchmark"] == name
    assert written["command"].startswith(f"python {' '.join(program[:2])}")
    assert {"cpu", "cores", "device", "python", "jax", "torch"} | about == set(written["machine"])
    printed = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(printed) == 2 + len(written["rows"])
    return written


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("convolution", ["--shape", "4", "5", "6", "--channels", "2"]),
        ("neighbourhood_attention", ["--shape", "3", "4", "5", "--channels", "2"]),
        ("warp", ["--sizes", "12"]),
    ],
)
def test_routes_are_compared(script, options, tmp_path):
    rows = rows_of(script, tmp_path / "table.json", *options)
    assert {row["pass"] for row in rows} == {"forward", "forward + gradients"}
    assert rows[0]["route"] == "adregnet_jax" and {row["route"] for row in rows} <= ROUTES
    for row in rows:
        assert 0 < row["min ms"] <= row["median ms"] <= row["max ms"]
        assert row["times ours"] == 1 or row["route"] != "adregnet_jax"


def test_attention_memory(tmp_path):
    rows = rows_of("attention_memory", tmp_path / "table.json", "--queries", "64", "--keys", "64", "2048")
    assert [row["keys"] for row in rows] == [64, 2048]
    assert rows[1]["plain, forward"] > rows[1]["blocked, forward"] > 0


@pytest.fixture(scope="module")
def against_torch(tmp_path_factory):
    routes = ["adregnet_jax"]
    if importlib.util.find_spec("torch"):
        routes += ["PyTorch", "PyTorch, channels last"]
    program = ["benchmarks/against_torch.py", "--shape", "32", "16", "16", "--channels", "2", "4"]
    path = tmp_path_factory.mktemp("against_torch") / "table.json"
    about = {f"off by {route}" for route in routes} if len(routes) > 1 else set()
    rows = run(program, "against_torch", path, frozenset(about))["rows"]
    assert [row["route"] for row in rows if row["pass"] == "forward"] == routes
    return rows


def test_against_torch(against_torch):
    assert {row["pass"] for row in against_torch} == {"forward", "training step"}
    for row in against_torch:
        assert row["part"] == "whole" and 0 < row["min ms"] <= row["median ms"] <= row["max ms"]
        assert row["times ours"] == 1 or row["route"] != "adregnet_jax"


@pytest.mark.torch
def test_the_network_is_that_of_pytorch(against_torch):
    """The script itself refuses results or gradients that differ: both attentions are in it."""
    assert {row["route"] for row in against_torch} == {"adregnet_jax", "PyTorch", "PyTorch, channels last"}


def test_affine(tmp_path):
    """A body in the middle of the scan is found where the benchmark moved it."""
    place = np.moveaxis(np.indices((20, 18, 16)), 0, -1) - [9, 8, 7]
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=place.shape[:3]), 1)
    body = (np.linalg.norm(place / [1.2, 1, 0.9], axis=-1) < 6) * (1 + 2 * texture)
    nifti.write_volume(tmp_path / "body.nii.gz", body.astype(np.float32), np.diag([8.0, 8.0, 8.0, 1.0]))
    options = ["--images", str(tmp_path / "body.nii.gz"), "--trials", "1"]
    (row,) = rows_of("affine", tmp_path / "table.json", *options)
    assert (row["image"], row["trial"]) == ("body.nii.gz", 0)
    assert row["mean mm"] < row["before mm"] / 4 and row["mean mm"] <= row["max mm"]
    assert row["first s"] >= row["again s"] > 0


def test_zoo(tmp_path):
    """One pair scored by points, one by labels, of a body that was shifted by two voxels."""
    place = np.moveaxis(np.indices((26, 24, 22)), 0, -1) - [12, 12, 10]
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=place.shape[:3]), 1.5)
    body = np.linalg.norm(place, axis=-1) < 8
    scan = (body * (1 + texture)).astype(np.float32)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for name, shift in (("fixed", 0), ("moving", 2)):
        nifti.write_volume(tmp_path / f"{name}.nii.gz", np.roll(scan, shift, axis=0), affine)
        labels = np.roll(body, shift, axis=0).astype(np.uint8)
        nifti.write_volume(tmp_path / f"{name}_labels.nii.gz", labels, affine)
        rows = [f"{2 * (x + shift)},{2 * y},20" for x in (8, 12, 16) for y in (9, 14)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["x,y,z", *rows]) + "\n")
    pairs = [
        "name,fixed,moving,measure,fixed_truth,moving_truth",
        "points,fixed.nii.gz,moving.nii.gz,points,fixed.csv,moving.csv",
        "labels,fixed.nii.gz,moving.nii.gz,labels,fixed_labels.nii.gz,moving_labels.nii.gz",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(pairs) + "\n")
    (tmp_path / "peers.csv").write_text("pair,best\nlabels,0.9\n")
    options = ["--sheet", str(tmp_path / "sheet.png"), "--options", "method=instance", "effort=fast"]
    points, labels = rows_of("zoo", tmp_path / "table.json", str(tmp_path), *options)
    assert points["before"] == 4 and points["affine"] < 0.5 and points["after"] < 1
    assert labels["before"] < 0.9 < labels["affine"] and labels["peers"] == 0.9
    assert points["contrast"] == "mono" and points["folded %"] == 0
    assert points["inverse mean"] <= points["inverse 99 %"] < 0.2
    assert matplotlib.image.imread(tmp_path / "sheet.png").std() > 0.05


def test_no_motion(tmp_path):
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(26, 24, 22)), 1.5)
    nifti.write_volume(
        tmp_path / "scan.nii.gz", (1 + 2 * texture).astype(np.float32), np.diag([2.0, 2, 2, 1])
    )
    options = ["--changes", "noise", "crop", "--options", "method=instance", "effort=fast"]
    rows = rows_of("no_motion", tmp_path / "table.json", str(tmp_path / "scan.nii.gz"), *options)
    assert [row["change"] for row in rows] == ["noise", "crop"]
    for row in rows:
        assert row["affine mm"] < 1 and row["mean mm"] <= row["99 % mm"] < 2  # half a voxel, and one
        assert row["contrast"] == "mono"


def test_scales(tmp_path):
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(26, 24, 22)), 1.5)
    for name, shift in (("fixed", 0), ("moving", 1)):
        values = np.roll(1 + 2 * texture, shift, axis=0).astype(np.float32)
        nifti.write_volume(tmp_path / f"{name}.nii.gz", values, np.diag([2.0, 2, 2, 1]))
    scans = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    options = ["--sizes", "2", "3e-5", "--rounds", "1", "--options", "method=instance", "effort=fast"]
    rows = rows_of("scales", tmp_path / "table.json", *scans, *options)
    assert [row["size mm"] for row in rows] == [2, 3e-5]
    assert rows[1]["largest voxels"] < 0.01 and rows[1]["moved voxels"] > 0.2


def test_dicom_files(tmp_path):
    values, lps = np.random.default_rng(0).integers(-500, 500, (12, 10, 8)), np.diag([2.0, 2, 3, 1])
    folders = [studies.write_ct(tmp_path / name, values, lps) for name in ("fixed", "moving")]
    square = np.array([[4.0, 4, 9], [16, 4, 9], [16, 14, 9], [4, 14, 9]])
    drawn = studies.write_rtstruct(
        tmp_path / "s.dcm", [("a", [1, 2, 3], [square], "ORGAN")], studies.headers_of(folders[1])
    )
    (row,) = rows_of("dicom_files", tmp_path / "table.json", *map(str, folders), "--structures", str(drawn))
    assert row["voxels"] == "12 x 10 x 8"
    parts = [row[f"{part}, s"] for part in ("reading", "NIfTI", "DICOM", "contours")]
    assert row["sum, s"] == pytest.approx(sum(parts), abs=0.1)


def test_assessment(tmp_path):
    rows = tmp_path / "rows.jsonl"
    make = ["make", str(rows), "--synthetic", "1", "--voxels", "24", "--kinds", "truth", "folds"]
    command = [sys.executable, "benchmarks/assessment.py", *make]
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    table = rows_of("assessment", tmp_path / "table.json", "report", str(rows))
    found = {row["kind"]: row for row in table}
    assert found["all good"]["results"] == 2 and found["folds"]["results"] == 2
    assert found["folds"]["fail"] == "100 %" and found["folds"]["AUC"] == 1


def test_predicted_errors(tmp_path):
    random = np.random.default_rng(0)
    for n in range(3):
        marks = {name: random.gamma(2.0, size=400) for name in ("distance", "offset", "strain")}
        error = predicted_error(marks)
        arrays: dict[str, Any] = {"error": error, "point": error, "voxel_mm": 2.0, **marks}
        np.savez(tmp_path / f"synthetic1-{n}-good-0.npz", **arrays)
    table = rows_of("assessment", tmp_path / "table.json", "errors", str(tmp_path))
    best, *others = table
    assert best["estimate"] == "predicted error"
    assert (best["results"], best["AUSE"], best["in place's 90 %"]) == (3, "0.000", "100")
    assert best["Spearman"] == "1.00 (1.00 to 1.00)" and best["predicted, mm"] == best["true, mm"]
    assert [row["estimate"] for row in others] == ["distance", "offset", "strain"]
    assert all(float(row["AUSE"]) > 0.05 for row in others)


def test_training_step(tmp_path):
    rows = rows_of("training_step", tmp_path / "table.json", "--shape", "8", "8", "8", "--channels", "2")
    measures = ["trace", "compile", "step"]
    starts = [f"{start} start, {measure}" for start in ("first", "second") for measure in measures]
    assert [row["measure"] for row in rows] == ["import adregnet_jax", *starts]
    seconds = {row["measure"]: row["median s"] for row in rows}
    assert seconds["second start, compile"] < seconds["first start, compile"]  # the cache is found


def test_sharding(tmp_path):
    path = tmp_path / "table.json"
    options = ["--shape", "16", "4", "4", "--config.model.channels=(2,)", "--devices", "1", "2"]
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
    command = [sys.executable, "benchmarks/sharding.py", *options, "--json", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["axis"], row["devices"]) for row in rows] == [
        (a, n) for a in ("data", "space") for n in (1, 2)
    ]
    assert rows[0]["of one device"] == 1 and rows[1]["of one device"] < 0.6  # half of the pairs


def test_evaluation(tmp_path):
    rows = rows_of("evaluation", tmp_path / "table.json", "--shape", "20", "24", "18", "--labels", "3")
    assert [row["part"] for row in rows] == ["metrics", "landmarks", "labels", "figures"]
    assert all(0 < row["min s"] <= row["median s"] <= row["max s"] for row in rows)
    assert rows[-1]["peak GiB so far"] >= rows[0]["peak GiB so far"] > 0


def test_instance(tmp_path):
    rows = rows_of("instance", tmp_path / "table.json", "--shape", "20", "24", "18", "--effort", "fast")
    assert rows[0]["shape"] == "20 x 24 x 18"
    assert rows[0]["peak of the process GiB"] > rows[0]["temporaries GiB"] >= 0


def test_network(tmp_path):
    (row,) = rows_of("network", tmp_path / "table.json", "--shape", "24", "20", "16", "--rounds", "1")
    assert row["shape"] == "24 x 20 x 16"
    assert 0 < row["s, median"] < 60 and row["peak of the process GiB"] > 0.1


def test_synthesis(tmp_path):
    picture = tmp_path / "pairs.png"
    options = ["--shape", "16", "16", "16", "--pairs", "2", "--picture", str(picture)]
    rows = rows_of("synthesis", tmp_path / "table.json", *options)
    routes = ["NumPy, one core", "JAX, one core", "JAX, two cores"]
    assert [row["route"] for row in rows] == routes[: 1 + len(os.sched_getaffinity(0))]
    assert all(0 < row["min ms"] <= row["ms a pair, median"] <= row["max ms"] for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_peers(tmp_path):
    """A head of three labels and the same one four voxels on: scores before are right, ours are better."""
    place = np.linalg.norm(np.moveaxis(np.indices((40, 36, 32)), 0, -1) - [19, 18, 16], axis=-1)
    labels = np.digitize(-place, [-12, -9, -5])
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=labels.shape), 2)
    image = np.choose(labels, [0, 40, 90, 60]) + (labels > 0) * 100 * texture
    maps = []
    for subject, shift in (("a", 0), ("b", 4)):
        maps.append(np.roll(labels, shift, axis=0))
        for name, values in (("t1", np.roll(image, shift, axis=0)), ("labels", maps[-1])):
            nifti.write_volume(tmp_path / f"subject_{subject}_{name}.nii.gz", values, np.eye(4))
    (tmp_path / "labels_30.txt").write_text("1 rim\n2 shell\n3 core\n")
    options = ["--brains", str(tmp_path), "--methods"]
    rows = rows_of("peers", tmp_path / "table.json", *options)
    assert [row["method"] for row in rows] == ["before", "ours, default", "ours, default, inverted"]
    assert rows[0]["Dice"] == pytest.approx(np.mean(dice(maps[0], maps[1], [1, 2, 3])), abs=1e-4)
    gains = [row["Dice"] - rows[0]["Dice"] for row in rows[1:]]
    assert min(gains) > 0.1, gains


@pytest.fixture
def hippocampi(tmp_path):
    """Twenty-six scans with two labels each, of different shapes."""
    rng = np.random.default_rng(0)
    for n in range(26):
        shape = tuple(rng.integers(12, 18, 3))
        place = np.moveaxis(np.indices(shape), 0, -1) - np.divide(shape, 2) - rng.uniform(-2, 2, 3)
        labels = (np.linalg.norm(place, axis=-1) < 4) * np.where(place[..., 0] > 0, 2, 1)
        image = (100 * labels + 5 * rng.random(shape)).astype(np.float32)
        for kind, values in (("images", image), ("labels", labels)):
            (tmp_path / kind).mkdir(exist_ok=True)
            nifti.write_volume(tmp_path / kind / f"h{n:02d}.nii.gz", values, np.diag([-1.0, 1, 1, 1]))
    return tmp_path


def test_hippocampus_peers(hippocampi):
    files = [hippocampi / name for name in ("table.json", "pairs.csv")]
    command = [sys.executable, "benchmarks/hippocampus_peers.py", str(hippocampi), "--limit", "2"]
    command += ["--json", str(files[0]), "--csv", str(files[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(files[0].read_text())["rows"]
    config = load_config(ROOT / "configs" / "hippocampus.py")
    config.data.files.pairs = str(hippocampi)
    test = load_splits(config.data).test
    pairs = [test[0], test[-1]]
    before = np.mean([dice(pair.fixed_labels, pair.moving_labels, (1, 2)) for pair in pairs])
    assert rows[0]["route"] == "before" and rows[0]["pairs"] == 2
    assert rows[0]["Dice"] == pytest.approx(before, abs=1e-3)
    if len(rows) > 1:  # greedy is installed: a field along the wrong axes would make it worse
        assert rows[1]["Dice"] > rows[0]["Dice"] + 0.05
        assert len(files[1].read_text().splitlines()) == 3
    else:
        assert "picsl_greedy is not installed: left out" in done.stdout


OF_THE_NETWORK = frozenset(
    {
        "shape",
        "batch",
        "dtype",
        "convolution",
        "devices",
        "matmul GFLOP/s",
        "peak of the device MiB",
        "peak of the process MiB",
    }
)
NETWORK = ["-m", "adregnet_jax.benchmark", "--config", "configs/phantom.py", "--shape", "8", "6", "4"]


def test_network_by_part(tmp_path):
    """Every part is there, the parts take what the whole takes, and XLA sees it where there is no loop."""
    options = [
        "--batch",
        "2",
        "--devices",
        "1",
        "--config.model.channels=(2,)",
        "--config.model.finest_level=0",
    ]
    options += ["--config.loss.landmark=0", "--config.model.cross_attention=False"]
    written = run([*NETWORK, *options], "benchmark", tmp_path / "table.json", OF_THE_NETWORK)
    assert written["machine"]["shape"] == "8 x 6 x 4" and written["machine"]["matmul GFLOP/s"] > 0
    rows = {(row["part"], row["pass"]): row for row in written["rows"]}
    network = ["backbone", "field synthesis, level 0", "regional attention, level 0"]
    losses = ["loss: ncc", "loss: smoothness", "loss: jacobian"]
    totals = {(part, of) for part in ("total", "sum of parts") for of in ("forward", "training step")}
    parts = {(part, of) for part in (*network, "warp", *losses) for of in ("forward", "forward + gradients")}
    assert set(rows) == parts | totals | {("optimiser", "update")}
    for (part, _), row in rows.items():
        assert part == "sum of parts" or 0 < row["min ms"] <= row["median ms"] <= row["max ms"]
    forward = rows["total", "forward"]
    # The median is written to a microsecond, which is more than a thousandth of a short one.
    assert 2e3 / forward["pairs/s"] == pytest.approx(forward["median ms"], rel=1e-3, abs=1e-3)
    model = forward["model GFLOP"]
    assert model == pytest.approx(sum(rows[part, "forward"]["model GFLOP"] for part in network), rel=1e-3)
    assert rows["total", "training step"]["model GFLOP"] == pytest.approx(3 * model, rel=1e-3)
    medians = sum(rows[part, "forward"]["median ms"] for part in (*network, "warp"))
    assert rows["sum of parts", "forward"]["median ms"] == pytest.approx(medians, abs=1e-2)
    # A third of the border's products are padding, and XLA's norms and activations come in addition.
    backbone = rows["backbone", "forward"]
    assert 0.5 < backbone["XLA GFLOP"] / backbone["model GFLOP"] < 2


def test_memory_is_reported_without_arrays(tmp_path):
    """Pairs of eight GiB are compiled for, one a device, in a process that takes less than half as much."""
    options = ["--shape", "1024", "1024", "1024", "--batch", "2", "--devices", "2", "--memory-only"]
    options += ["--forward-only", "--config.model.channels=(2,)", "--config.model.finest_level=0"]
    options += ["--config.model.cross_attention=False", "--config.model.regional_attention=False"]
    written = run([*NETWORK, *options], "benchmark", tmp_path / "table.json", OF_THE_NETWORK)
    assert [row["part"] for row in written["rows"]] == [
        "backbone",
        "field synthesis, level 0",
        "warp",
        "total",
    ]
    *_, total = written["rows"]
    assert total["median ms"] is None and total["of peak %"] is None and total["compile s"] > 0
    # One pair a device, two images, float32; the parameters are small.
    assert total["arguments MiB"] == pytest.approx(2 * 1024**3 * 4 / 2**20, rel=1e-3)
    assert total["temporary MiB"] > total["arguments MiB"]
    assert written["machine"]["peak of the process MiB"] < 4096


def test_a_single_call_of_a_slow_program(tmp_path):
    options = ["--once", "--total-only", "--forward-only", "--config.model.channels=(2,)"]
    options += ["--config.model.finest_level=0", "--config.model.cross_attention=False"]
    options += ["--config.model.regional_attention=False"]
    written = run([*NETWORK, *options], "benchmark", tmp_path / "table.json", OF_THE_NETWORK)
    (row,) = written["rows"]
    assert 0 < row["min ms"] == row["median ms"] == row["max ms"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--shape", "8", "6"], "argument --shape: expected 3 arguments"),
        (["--shape", "8", "6", "1"], "two voxels or more"),
        (["--batch", "0"], "optimiser.batch_size is 0: expected 1 or more"),
        (["--rounds", "0"], "--rounds is 0: it must be at least 1"),
        (["--json", "nowhere/table.json"], "there is no folder nowhere"),
        (["--config.model.chanels=(2,)"], "did you mean channels?"),
        (["--forward"], "--forward is not an option"),
        (["--dtype", "float16"], "choose from"),
        (["--config.data.kind=files"], "--shape is missing"),
    ],
)
def test_mistakes_are_reported_in_one_line(options, expected, capsys):
    assert benchmark.main(["--config", str(ROOT / "configs" / "phantom.py"), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1


def test_the_report_is_made_and_shown(tmp_path):
    (row,) = rows_of("report", tmp_path / "table.json", "--shape", "24", "28", "20")
    assert row["shape"] == "24 x 28 x 20" and 2 < row["size, MB"] < 3
    assert row["made, s"] > 0
    assert row["first picture, s"] is None or 0 < row["first picture, s"] < row["all panels, s"]
