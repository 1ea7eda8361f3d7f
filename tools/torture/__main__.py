"""Tests the commands under bad input, kills at random moments, and faults of disk, clock and memory.

    python -m tools.torture [--kills 50] [--faults NAME ...] [--seed 0] [--json FILE] [--keep DIR]

Runs the corpus of bad input (tests/bad_inputs). Kills trainings (three fifths of the kills), evaluations and
batches by SIGKILL at random moments and starts them again. Exposes a training to each fault in `faults`.
Afterwards the files must equal those of an undisturbed run, bit for bit, and so must the finished run. Prints
a table of what was tried, survived and lost; the exit status is 1 if anything was lost.

--kills 0 and --faults none skip a part. --keep DIR keeps the runs there. Takes about half an hour on two
cores.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from absl import logging

from adregnet_jax.benchmark.timing import report
from tools.torture import faults, kills
from tools.torture.runs import ROOT, LostError, Place


def bad_inputs() -> dict:
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-n", "0", "tests/bad_inputs"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False).stdout
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|error)", output)}
    lost = re.findall(r"^FAILED (\S+)", output, flags=re.MULTILINE)
    return _row("bad input", sum(counts.values()), lost + ["it did not run"] * (not counts), began)


def tried(name: str, outcomes: Iterable[str]) -> dict:
    began = time.monotonic()
    lost: list[str] = []
    count = 0
    for outcome in outcomes:
        count += 1
        lost += [outcome] if outcome else []
        print(f"{name} {count}: {outcome or 'survived'}", flush=True)
    return _row(name, count, lost, began)


def of_faults(place: Place, names: list[str]) -> Iterable[str]:
    for fault in faults.FAULTS:
        if names and fault.__name__ not in names:
            continue
        lost = ""
        try:
            fault(place, place.folder / fault.__name__)
        except (LostError, subprocess.TimeoutExpired) as error:
            lost = f"{fault.__name__}: {error}"
        print(f"  {fault.__name__.replace('_', ' ')}", flush=True)
        yield lost


def _row(name: str, count: int, lost: list[str], began: float) -> dict:
    seconds = round(time.monotonic() - began)
    row = {"what": name, "tried": count, "survived": count - len(lost), "lost": len(lost)}
    return row | {"s": seconds, "which": lost}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--faults", nargs="+", default=[], choices=["none", *(fault.__name__ for fault in faults.FAULTS)]
    )
    parser.add_argument("--no-bad-input", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    options = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # Orbax warns about checkpoints that a kill cut off
    moments = random.Random(options.seed)
    rows = [] if options.no_bad_input else [bad_inputs()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder)
        of_training = -(-options.kills * 3 // 5)
        of_batch = (options.kills - of_training) // 2
        of_evaluation = options.kills - of_training - of_batch
        for count, kind in (
            (of_training, kills.training),
            (of_evaluation, kills.evaluation),
            (of_batch, kills.batch),
        ):
            if count:
                rows.append(tried(f"kills of {kind.__name__}", kind(place, count, moments)))
        if "none" not in options.faults:
            rows.append(tried("faults", of_faults(place, options.faults)))
    for row in rows:
        for lost in row["which"]:
            print(f"LOST, {row['what']}: {lost}")
    print()
    report([{name: value for name, value in row.items() if name != "which"} for row in rows], options.json)
    return int(any(row["lost"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
