"""The benchmarks run, at sizes too small to tell anything, and write what their tables say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_evaluation(tmp_path):
    rows = rows_of("evaluation", tmp_path / "table.json", "--shape", "20", "24", "18", "--labels", "3")
    assert [row["part"] for row in rows] == ["metrics", "landmarks", "labels", "figures"]
    assert all(0 < row["min s"] <= row["median s"] <= row["max s"] for row in rows)
    assert rows[-1]["peak GiB so far"] >= rows[0]["peak GiB so far"] > 0
