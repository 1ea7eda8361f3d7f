"""The benchmarks run, at sizes too small to tell anything, and write what their tables say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage

from adregnet_jax.data import nifti
from adregnet_jax.data.splits import load_splits
from adregnet_jax.entry import load_config
from adregnet_jax.metrics import dice

ROOT = Path(__file__).parents[1]
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
ROUTES = {"adregnet_jax", "lax", "PyTorch", "padded slices", "grid_sample", "grid_sample, from displacement"}


def rows_of(script: str, json_path: Path, *options: str) -> list[dict]:
    command = [sys.executable, f"benchmarks/{script}.py", *options, "--rounds", "1", "--json", str(json_path)]
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(json_path.read_text())
    assert set(written) == {"benchmark", "command", "machine", "rows"}
    assert written["benchmark"] == script
    assert {"cpu", "cores", "device", "python", "jax", "torch"} == set(written["machine"])
    printed = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(printed) == 2 + len(written["rows"])
    return written["rows"]


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


def test_training_step(tmp_path):
    rows = rows_of("training_step", tmp_path / "table.json", "--shape", "8", "8", "8", "--channels", "2")
    measures = ["trace", "compile", "step"]
    starts = [f"{start} start, {measure}" for start in ("first", "second") for measure in measures]
    assert [row["measure"] for row in rows] == ["import adregnet_jax", *starts]
    seconds = {row["measure"]: row["median s"] for row in rows}
    assert seconds["second start, compile"] < seconds["first start, compile"]  # the cache is found


def test_sharding(tmp_path):
    path = tmp_path / "table.json"
    options = ["--shape", "16", "4", "4", "--channels", "2", "--devices", "1", "2", "--json", str(path)]
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
    command = [sys.executable, "benchmarks/sharding.py", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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


def test_peers(tmp_path):
    """A head of three labels and the same one four voxels on: scores before are right, ours are better."""
    place = np.linalg.norm(np.moveaxis(np.indices((52, 48, 44)), 0, -1) - [25, 24, 22], axis=-1)
    labels = np.digitize(-place, [-17, -12, -6])
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
        shape = rng.integers(12, 18, 3)
        place = np.moveaxis(np.indices(shape), 0, -1) - shape / 2 - rng.uniform(-2, 2, 3)
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
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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
