"""The script for a machine with a GPU: its dry run on CPU, and its comparison of results on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xla_flags import QUICK_TO_COMPILE

ROOT = Path(__file__).parents[2]
CASES = {"warp", "jacobian", "exponential", "align"} | {
    f"network, {name}" for name in ("paper", "default", "bundled")
}


def run(folder, *options, environment):
    command = [sys.executable, "benchmarks/gpu.py", "--output", str(folder), *options]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def rows_of(folder):
    rows: dict[str, list[dict]] = {}
    for row in json.loads((folder / "gpu.json").read_text())["rows"]:
        rows.setdefault(row["part"], []).append(row)
    return rows


@pytest.mark.program
def test_every_part_runs_on_cpu_at_toy_sizes(tmp_path):
    environment = os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}
    done = run(tmp_path, "--dry-run", "--rounds", "1", environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    parts = ("reference", "agreement", "speed", "torch", "register", "synthesis", "profile")
    assert tuple(rows) == parts
    # Every row was printed, and the machine before them.
    assert len(done.stdout.splitlines()) == 1 + sum(map(len, rows.values()))
    assert {row["case"] for row in rows["agreement"]} == CASES
    assert all(row["error"] <= row["bound"] for row in rows["agreement"])
    assert any(row["error"] > 0 for row in rows["agreement"])  # two forms were compared
    assert [row["pass"] for row in rows["speed"]] == ["forward", "training step"]
    assert all(row["median ms"] > 0 and row["compile s"] > 0 for row in rows["speed"])
    first, cached, *_ = rows["register"]
    assert first["case"] == "first call, empty cache" and cached["case"] == "first call, with cache"
    assert cached["whole process s"] < first["whole process s"]
    assert rows["synthesis"][0]["pairs a second"] > 0
    longest = [row["ms a step"] for row in rows["profile"]]
    assert len(longest) > 3 and longest == sorted(longest, reverse=True)


@pytest.mark.program
def test_a_part_ends_at_its_limit_and_keeps_its_rows(tmp_path):
    done = run(tmp_path, "--dry-run", "--parts", "agreement", "--minutes", "0.2", environment=os.environ)
    assert done.returncode == 1
    failed = [row["failed"] for part in rows_of(tmp_path).values() for row in part if "failed" in row]
    assert failed and all(why.startswith(("stopped after", "no time left")) for why in failed)


@pytest.mark.program
def test_without_a_gpu_there_is_one_line_and_no_folder(tmp_path):
    done = run(tmp_path / "results", environment=os.environ)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: no GPU (JAX has cpu); --dry-run runs on the CPU\n"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory, gpu_environment):
    """Rows of the comparison with the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run(folder, "--parts", "agreement", environment=gpu_environment)
    assert done.returncode in (0, 1), done.stderr
    return rows_of(folder)["agreement"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", sorted(CASES))
def test_a_gpu_agrees_with_the_cpu(case, on_gpu):
    of_case = [row for row in on_gpu if row.get("case") == case]
    dtypes = {"float32", "tf32", "bfloat16"} if case == "network, default" else {"float32"}
    assert {row["dtype"] for row in of_case} == dtypes
    assert all(row["error"] <= row["bound"] for row in of_case), of_case
