"""SIGKILL at random moments of training, of the evaluation and of a batch of registrations."""

import csv
import functools
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from adregnet_jax.config import PhantomConfig
from adregnet_jax.data.datasets.phantom import phantom_pair
from tools.torture.runs import LostError, Place, check_files, finish, kill, steps_logged, wait_until

STARTING_SHARE = 0.2  # share of the kills of a training before its first step


def training(place: Place, kills: int, moments: random.Random) -> Iterator[str]:
    """Kills and restarts training runs; at the end the last one must complete.

    Yields:
      For each kill, a description of the loss; empty if nothing was lost.
    """
    for n in range(kills):
        workdir = place.folder / "killed"
        steps = steps_logged(workdir)
        try:
            process = place.start("train.py", workdir)
            if moments.random() < STARTING_SHARE:
                time.sleep(moments.uniform(0, 8))
            else:
                wait_until(functools.partial(_has_progressed, workdir, steps), process)
                time.sleep(moments.expovariate(2))
            ended = process.poll() is not None
            kill(process)
            place.check_state(workdir)
            if ended:  # this run is complete: start another
                place.check_finished(workdir)
                workdir.rename(place.folder / f"killed_{n}")
            yield ""
        except LostError as lost:
            workdir.rename(place.folder / f"lost_{n}")
            yield f"kill {n}: {lost}"
    if workdir.exists():
        try:
            place.finish_training(workdir)
        except LostError as lost:
            yield f"at the end: {lost}"


def _has_progressed(workdir: Path, steps: int) -> bool:
    return steps_logged(workdir) > steps


def evaluation(place: Place, kills: int, moments: random.Random) -> Iterator[str]:
    """Kills eval.py: named files must be complete, and the same command again must give the same numbers."""
    began = time.monotonic()
    finish(place.start("eval.py", place.reference))
    seconds = time.monotonic() - began
    names = ("cases.csv", "landmarks.csv")
    expected = {name: _without_seconds(place.reference / "eval" / name) for name in names}
    for n in range(kills):
        try:
            if n % 2:
                shutil.rmtree(place.reference / "eval", ignore_errors=True)
            process = place.start("eval.py", place.reference)
            time.sleep(moments.uniform(0.3, 1) * seconds)
            kill(process)
            if (place.reference / "eval").exists():
                check_files(place.reference / "eval")
            yield ""
        except LostError as lost:
            yield f"kill {n}: {lost}"
    try:
        finish(place.start("eval.py", place.reference))
        for name in names:
            if _without_seconds(place.reference / "eval" / name) != expected[name]:
                raise LostError(f"{name} differs")
        check_files(place.reference / "eval")
    except LostError as lost:
        yield f"at the end: {lost}"


def batch(place: Place, kills: int, moments: random.Random) -> Iterator[str]:
    """Kills `adregnet batch`: finished pairs stay, and the table equals that of an uninterrupted batch."""
    pairs = _write_pairs(place.folder / "scans", count=4)
    arguments = ("batch", pairs, "--method", "instance", "--no-affine", "--effort", "fast", "--output")
    whole, killed = place.folder / "batch", place.folder / "killed_batch"
    began = time.monotonic()
    finish(place.start_adregnet(*arguments, whole))
    seconds = time.monotonic() - began
    expected = _without_seconds(whole / "results.csv")
    for n in range(kills):
        done = {path.parent.name: path.stat().st_mtime_ns for path in killed.glob("[!.]*/summary.json")}
        try:
            process = place.start_adregnet(*arguments, killed)
            time.sleep(moments.uniform(0.2, 1) * seconds)
            kill(process)
            if killed.exists():
                check_files(killed)
            for path in killed.glob("[!.]*/summary.json"):
                if done.get(path.parent.name, path.stat().st_mtime_ns) != path.stat().st_mtime_ns:
                    raise LostError(f"{path.parent.name} was finished and was registered again")
            yield ""
        except LostError as lost:
            yield f"kill {n}: {lost}"
        if n % 3 == 2:
            shutil.rmtree(killed, ignore_errors=True)
    try:
        finish(place.start_adregnet(*arguments, killed))
        if _without_seconds(killed / "results.csv") != expected:
            raise LostError("results.csv differs from that of an uninterrupted batch")
        check_files(killed)
    except LostError as lost:
        yield f"at the end: {lost}"


def _write_pairs(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["name,fixed,moving"]
    for n in range(count):
        pair = phantom_pair(PhantomConfig(shape=(24, 24, 24), spacing_mm=(12.0,) * 3), n)
        for kind in ("fixed", "moving"):
            image = nib.Nifti1Image(np.asarray(getattr(pair, kind), np.float32), pair.affine)
            nib.save(image, folder / f"{kind}{n}.nii.gz")
        lines.append(f"pair{n},fixed{n}.nii.gz,moving{n}.nii.gz")
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def _without_seconds(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in csv.DictReader(file)
        ]
