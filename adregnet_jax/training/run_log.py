"""The log of a training run: `metrics.jsonl`, TensorBoard, and the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from adregnet_jax.atomic import write_file
from adregnet_jax.errors import UserError

PLAIN_LINE_SECONDS = 30.0  # between two progress lines, where the output is not a terminal


class RunLog:
    """Writes the metrics of one run and shows its progress.

    Args:
        workdir: folder of the run.
        step: the last step done. Lines and events that an earlier start wrote beyond it are dropped.
        total_steps: steps of the whole run.
        active: False writes and prints nothing; only one of several processes logs.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, *, active: bool = True) -> None:
        self._active = active
        self.restart_clock(step)
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        _drop_lines_beyond(self._path, step)
        self._lines = self._path.open("a", buffering=1)  # line by line: the file can be read at any time
        self._tensorboard = _TensorBoard(workdir / "tensorboard", step)
        self._console = rich.console.Console(file=sys.stderr)
        self._bar = _make_bar(self._console)
        self._task = self._bar.add_task("", total=total_steps, completed=step, loss="", rate="")
        self._total_steps = total_steps
        self._said_at = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()

    def say(self, text: str) -> None:
        """Prints a line on the terminal."""
        if not self._active:
            return
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._said_at = time.monotonic()

    def restart_clock(self, step: int) -> None:
        """Starts measuring steps per second anew, so that compilation and validation don't count."""
        self._clock_step, self._clock, self._waited = step, time.monotonic(), 0.0

    def steps_per_second(self, step: int) -> float:
        """Mean rate since the clock was restarted."""
        return (step - self._clock_step) / (time.monotonic() - self._clock)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures the block: the wait for the next batch, while the previous step may still run."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - began

    def waiting_share(self) -> float:
        """Share of the time since the last restart spent in `waiting`, an upper bound on idle devices."""
        return self._waited / (time.monotonic() - self._clock)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Logs a step, and updates the progress bar or occasionally prints a line."""
        if not self._active:
            return
        self._show(step, metrics["train/loss"], metrics["steps_per_second"])
        try:
            self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
            self._tensorboard.write(step, metrics)
        except OSError as error:
            raise UserError(
                f"can't write {self._path}: {error.strerror}; the last checkpoint is kept:"
                " make room and run the same command again"
            ) from error

    def close(self) -> None:
        if not self._active:
            return
        if self._console.is_terminal:
            self._bar.stop()
        self._tensorboard.close()
        self._lines.close()

    def _show(self, step: int, loss: float, rate: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"loss {loss:.4f}", rate=f"{rate:.3g} steps/s")
        if not self._console.is_terminal and time.monotonic() - self._said_at > PLAIN_LINE_SECONDS:
            minutes = (self._total_steps - step) / rate / 60
            self.say(
                f"step {step}/{self._total_steps}  loss {loss:.4f}  {rate:.3g} steps/s  ETA {minutes:.0f} min"
            )


class _TensorBoard:
    """Writes scalars as TensorBoard events, without delay.

    `SummaryWriter` would pass them to a thread and block forever once that thread has died, because the disk
    is full or the clock was set back.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{step}")
        # Makes TensorBoard hide the events of an interrupted run beyond `step`.
        self._event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._event(step, summary=Summary(value=values))

    def _event(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _make_bar(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[rate]}"),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[loss]}"),
        console=console,
    )


def _drop_lines_beyond(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; a line cut off by a kill is dropped as well."""
    if not path.exists():
        return
    kept = [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step
    ]
    write_file(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return float("inf")
