"""Faults around a training run: disk, files, clock, memory, signals, numbers."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tools.torture.runs import LostError, Place, finish, kill, metrics, steps_logged, wait_until

ERROR_LINE = "error: "
CLOCK = """
import time
true, calls = time.time, [0]
def jumping():
    calls[0] += 1
    return true() + (0.0, -86400.0, 31536000.0)[min(calls[0] // 200, 2)]
time.time = jumping
"""
NAN = """
import numpy
from adregnet_jax.data import pipeline
collate, batches = pipeline.collate, [0]
def poisoned(*arguments, **options):
    batch = collate(*arguments, **options)
    batches[0] += 1
    return batch if batches[0] != 60 else batch | {"fixed": numpy.full_like(batch["fixed"], numpy.nan)}
pipeline.collate = poisoned
"""
FULL_FILE = 20_000  # bytes, fewer than a checkpoint's arrays
LITTLE_MEMORY = 2**30  # bytes of address space, hardly more than loading JAX takes
LIMIT = "import resource; resource.setrlimit(resource.{name}, ({size}, {size}))"


def disk_full(place: Place, workdir: Path) -> None:
    """A limit on file sizes imitates a full disk, from the start of the run."""
    limit = LIMIT.format(name="RLIMIT_FSIZE", size=FULL_FILE)
    _refused(place.start("train.py", workdir, change=limit), "make room")
    place.finish_training(workdir)


def disk_fills_up(place: Place, workdir: Path) -> None:
    """A limit on file sizes in the middle of a run, when there are checkpoints."""
    process = _started(place, workdir, 40)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FULL_FILE, FULL_FILE))
    _refused(process, "make room")
    place.check_state(workdir)
    if place.newest_state(workdir) is None:
        raise LostError("no checkpoint is left")
    place.finish_training(workdir)


def newest_checkpoint_damaged(place: Place, workdir: Path) -> None:
    """Each of its files is cut in half: the run uses the checkpoint before and reports that."""
    kill(_started(place, workdir, 40))
    newest = max(_checkpoints(workdir), key=lambda path: int(path.name))
    for path in newest.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    output = place.finish_training(workdir)
    if f"step {newest.name} can't be read" not in output:
        raise LostError("the run does not report that a checkpoint was damaged")


def checkpoints_damaged_under_the_run(place: Place, workdir: Path) -> None:
    """The run has everything it needs in memory."""
    process = _started(place, workdir, 40)
    for path, _, names in os.walk(workdir / "checkpoints"):  # tolerates files that the run deletes
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.truncate(Path(path, name), Path(path, name).stat().st_size // 2)
    _ends(place, workdir, process)


def checkpoints_deleted_under_the_run(place: Place, workdir: Path) -> None:
    process = _started(place, workdir, 40)
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    _ends(place, workdir, process)


def workdir_deleted_under_the_run(place: Place, workdir: Path) -> None:
    process = _started(place, workdir, 40)
    shutil.rmtree(workdir, ignore_errors=True)
    _ends(place, workdir, process)


def clock_jumps(place: Place, workdir: Path) -> None:
    """A day back, then a year ahead. Orbax may see a time-out and end the run, with a one-line error."""
    _ends(place, workdir, place.start("train.py", workdir, change=CLOCK))


def two_runs(place: Place, workdir: Path) -> None:
    """The second run in a workdir is refused, and the first continues undisturbed."""
    process = _started(place, workdir, 10)
    os.kill(process.pid, signal.SIGSTOP)  # otherwise it would end before the second has started
    try:
        _refused(place.start("train.py", workdir), f"another run trains in {workdir} (process {process.pid}")
    finally:
        os.kill(process.pid, signal.SIGCONT)
    finish(process)
    place.check_finished(workdir)


def lock_of_a_dead_process(place: Place, workdir: Path) -> None:
    kill(_started(place, workdir, 10))
    if not (workdir / "lock").read_text():
        raise LostError("there was no lock")
    place.finish_training(workdir)


def out_of_memory(place: Place, workdir: Path) -> None:
    """A limit on the address space ends the run somehow; it can be resumed from its files."""
    kill(_started(place, workdir, 40))
    limit = LIMIT.format(name="RLIMIT_AS", size=LITTLE_MEMORY)
    process = place.start("train.py", workdir, change=limit)
    process.communicate()
    if process.returncode == 0:
        raise LostError("the limit had no effect")
    place.finish_training(workdir)


def sigterm(place: Place, workdir: Path) -> None:
    _stopped_by(place, workdir, signal.SIGTERM)


def sigint(place: Place, workdir: Path) -> None:
    _stopped_by(place, workdir, signal.SIGINT)


def nan_in_a_batch(place: Place, workdir: Path) -> None:
    """Training stops, names the step, and the checkpoint before it is kept."""
    output = _refused(place.start("train.py", workdir, change=NAN), "is nan at step")
    step = int(output.split("is nan at step ")[1].split(",")[0])
    newest = place.newest_state(workdir)
    if newest is None or newest[0] >= step:
        raise LostError(f"nan at step {step}, but the newest checkpoint is {newest}")
    place.check_state(workdir)
    place.finish_training(workdir)


def torn_metrics(place: Place, workdir: Path) -> None:
    """metrics.jsonl ends within a line, as after a power cut."""
    kill(_started(place, workdir, 40))
    path = workdir / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 7)
    place.finish_training(workdir)


def damaged_record(place: Place, workdir: Path) -> None:
    """config.json is cut off: the run reports it in one line or rewrites the file, without a traceback."""
    kill(_started(place, workdir, 40))
    path = workdir / "config.json"
    os.truncate(path, path.stat().st_size // 2)
    process = place.start("train.py", workdir)
    output = process.communicate()[1]
    if process.returncode == 2 and output.strip().splitlines()[-1].startswith(ERROR_LINE):
        path.unlink()
        place.finish_training(workdir)
        return
    if process.returncode or "Traceback" in output:
        raise LostError(f"status {process.returncode}: {output.strip()[-300:]}")
    place.check_finished(workdir)


def terminal_closed(place: Place, workdir: Path) -> None:
    """The reader closes the pipe of stderr, as a closed terminal does."""
    process = _started(place, workdir, 20)
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    process.wait()
    place.check_state(workdir)
    place.finish_training(workdir)


def stopped_for_a_while(place: Place, workdir: Path) -> None:
    """SIGSTOP, like a laptop that sleeps."""
    process = _started(place, workdir, 20)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGCONT)
    finish(process)
    place.check_finished(workdir)


FAULTS: tuple[Callable[[Place, Path], None], ...] = (
    disk_full,
    disk_fills_up,
    newest_checkpoint_damaged,
    checkpoints_damaged_under_the_run,
    checkpoints_deleted_under_the_run,
    workdir_deleted_under_the_run,
    clock_jumps,
    two_runs,
    lock_of_a_dead_process,
    out_of_memory,
    sigterm,
    sigint,
    nan_in_a_batch,
    torn_metrics,
    damaged_record,
    terminal_closed,
    stopped_for_a_while,
)


def _started(place: Place, workdir: Path, step: int) -> subprocess.Popen:
    """A run that has logged this step and has a checkpoint."""
    process = place.start("train.py", workdir)
    wait_until(lambda: steps_logged(workdir) >= step and bool(_checkpoints(workdir)), process)
    if process.poll() is not None:
        raise LostError(f"the run ended before step {step}: {finish(process)}")
    return process


def _checkpoints(workdir: Path) -> list[Path]:
    return [path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()]


def _refused(process: subprocess.Popen, message: str) -> str:
    """The stderr of a process that must end with status 2 and one error line with this message."""
    output = process.communicate()[1]
    if "Traceback (most recent call last)" in output:
        raise LostError(f"a traceback: {output.strip().splitlines()[-1]}")
    if process.returncode != 2:
        raise LostError(f"status {process.returncode} instead of 2: {output.strip()[-300:]}")
    last = output.strip().splitlines()[-1]
    if not (last.startswith(ERROR_LINE) and message in last):
        raise LostError(f"expected '{message}', got: {last}")
    return output


def _ends(place: Place, workdir: Path, process: subprocess.Popen) -> None:
    """Waits until the run ends, normally or with one error line; the same command must then complete it."""
    output = process.communicate()[1]
    if "Traceback (most recent call last)" in output:
        raise LostError(f"a traceback: {output.strip().splitlines()[-1]}")
    if process.returncode not in (0, 2):
        raise LostError(f"status {process.returncode}: {output.strip()[-300:]}")
    if process.returncode == 2 and not output.strip().splitlines()[-1].startswith(ERROR_LINE):
        raise LostError(f"status 2 without an error line: {output.strip()[-300:]}")
    if place.newest_state(workdir) is not None:
        place.check_state(workdir)
    finish(place.start("train.py", workdir))
    if place.newest_state(workdir) != (place.steps, place.digests[place.steps]):
        raise LostError("the run ends in another state than the undisturbed one")


def _stopped_by(place: Place, workdir: Path, number: signal.Signals) -> None:
    process = _started(place, workdir, 40)
    os.kill(process.pid, number)
    output = finish(process, status=128 + number)
    step = int(output.split(f"stopped by {number.name} at step ")[1].split(";")[0])
    newest = place.newest_state(workdir)
    if newest is None or newest[0] != step:
        raise LostError(f"it reports that it stopped at step {step}, but its checkpoint is {newest}")
    if any(record["step"] > step for record in metrics(workdir)):
        raise LostError("metrics beyond the last step")
    place.finish_training(workdir)
