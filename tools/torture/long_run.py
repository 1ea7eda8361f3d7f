"""Hours of training without a pause: do memory, files or open descriptors grow?

    python -m tools.torture.long_run [--hours 3] [--config configs/phantom_demo.py] [--workdir DIR]
        [--figure docs/long_run.png] [--json FILE]

Trains in a process of its own and looks at it twice a minute: anonymous memory (not that of files, which
depends on the system), open descriptors and threads, of the process and its children, and files in the
workdir. Each complete line of metrics.jsonl must be a record. At the end it stops the training by SIGTERM,
compares the last third of the time with the middle one, prints a table and exits with 1 if anything grew.
The figure and the JSON file are rewritten at every look, so that a run can be watched or cut short.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure

from adregnet_jax.benchmark.timing import report
from tools.torture.runs import ROOT

LOOK_SECONDS = 30.0
GROWTH = {"MiB": 0.02, "descriptors": 0.0, "threads": 0.0, "files": 0.0}  # tolerated as noise, as a share
MIB = 2**20


def look(pid: int, workdir: Path) -> dict[str, float]:
    """The present resources of the processes, and the last step in the metrics.

    Raises:
      ValueError: a complete line of metrics.jsonl is no record.
    """
    found = {"MiB": 0.0, "descriptors": 0, "threads": 0}
    for process in [pid, *_descendants(pid)]:
        place = Path("/proc", str(process))
        try:
            status = dict(
                line.split(":", 1) for line in (place / "status").read_text().splitlines() if ":" in line
            )
            descriptors = len(list((place / "fd").iterdir()))
        except FileNotFoundError:  # it has ended
            continue
        found["MiB"] += int(status["RssAnon"].split()[0]) / 1024
        found["threads"] += int(status["Threads"])
        found["descriptors"] += descriptors
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    files = sum(path.is_file() for path in workdir.rglob("*"))
    return found | {"files": files, "step": max((record["step"] for record in records), default=0)}


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path("/proc", str(pid), "task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def draw(looks: list[dict[str, float]], path: Path) -> None:
    hours = [one["s"] / 3600 for one in looks]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(hours, [one["MiB"] for one in looks], color="C0")
    axes.set(xlabel="hours of training", ylabel="anonymous memory (MiB)", ylim=(0, None))
    other = axes.twinx()
    for name, colour in (("descriptors", "C1"), ("threads", "C2"), ("files", "C3")):
        other.plot(hours, [one[name] for one in looks], color=colour, label=name)
    other.set(ylabel="count", ylim=(0, None))
    other.legend(loc="center right")
    figure.savefig(path, dpi=110)


def growth(looks: list[dict[str, float]]) -> list[dict]:
    """A row for each quantity, with the last third of the looks and the middle one.

    They are compared by medians: counts rise while a checkpoint is written.
    """
    third = len(looks) // 3
    rows = []
    for name, noise in GROWTH.items():
        thirds = (looks[third:-third], looks[-third:])
        middle, last = (statistics.median(one[name] for one in part) for part in thirds)
        grew = last > middle * (1 + noise)
        row = {"what": name, "middle third": round(middle, 1), "last third": round(last, 1), "grew": grew}
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hours", type=float, default=3)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/phantom_demo.py")
    parser.add_argument("--workdir", type=Path, metavar="DIR")
    parser.add_argument("--figure", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = options.workdir or Path(temporary, "run")
        settings = ["--config.optimiser.epochs=100000", "--config.optimiser.halve_every_epochs=100000"]
        settings += ["--config.run.patience_epochs=0"]
        command = ["train.py", "--config", str(options.config), "--workdir", str(workdir), *settings]
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        looks: list[dict[str, float]] = []
        try:
            while time.monotonic() - began < options.hours * 3600:
                time.sleep(LOOK_SECONDS)
                if process.poll() is not None:
                    print(f"the training ended with status {process.returncode}")
                    return 1
                looks.append({"s": time.monotonic() - began} | look(process.pid, workdir))
                if options.json:
                    options.json.write_text(json.dumps({"looks": looks}) + "\n")
                if options.figure:
                    draw(looks, options.figure)
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
    rows = growth(looks)
    report(rows, None)
    print(f"{looks[-1]['step']:.0f} steps in {looks[-1]['s'] / 3600:.2f} hours, ended with status {status}")
    return int(any(row["grew"] for row in rows) or status != 128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
