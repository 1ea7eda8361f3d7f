"""Small runs of the real commands, and checks of their files after a kill.

The scans are tiny and the network compiles in seconds: the runs test the loop, the files and the checkpoints.
"""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np

from adregnet_jax.launch.config_file import load_config
from adregnet_jax.nn.models import make_model
from adregnet_jax.training.checkpoint import Checkpoints
from adregnet_jax.training.loop import abstract_state
from adregnet_jax.training.sharding import make_mesh
from adregnet_jax.training.state import make_init
from adregnet_jax.training.step import make_optimiser

ROOT = Path(__file__).parents[2]
STEPS = 400
SAVE_EVERY = 5
PATIENCE_SECONDS = 300.0  # longest wait for anything
CONFIG = """
from adregnet_jax.config import *

def get_config():
    phantom = PhantomConfig(
        shape=(16, 16, 16), spacing_mm=(20.0, 20.0, 20.0), landmarks=8,
        train_cases=4, validation_cases=1, test_cases=2,
    )
    return Config(
        data=DataConfig(phantom=phantom, flip_axes=(0,), exchange=True, intensity_jitter=0.05),
        model=ModelConfig(
            channels=(4,), dropout=0.2,
            cross_attention=False, regional_attention=False, multi_resolution=False,
        ),
        loss=LossConfig(ncc_window=0, jacobian=0),
        optimiser=OptimiserConfig(
            epochs=4, steps_per_epoch={steps_per_epoch}, learning_rate=1e-3, average_decay=0.9
        ),
        run=RunConfig(patience_epochs=0, checkpoint_every_steps={save_every}, log_every_steps=2),
    )
"""
# Runs the command in sys.argv after a change to the process.
CHANGED = "import runpy, sys\n{change}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
RECORDED = """
import json
from adregnet_jax.training.checkpoint import Checkpoints
from tools.torture.runs import digest
save = Checkpoints.save
def recorded(self, step, state, *, metric=None):
    with open({path!r}, "a") as file:
        file.write(json.dumps([step, digest(state)]) + "\\n")
    save(self, step, state, metric=metric)
Checkpoints.save = recorded
"""


class LostError(Exception):
    """Something that a run must keep was lost."""


class Place:
    """A folder with the config, the cache of compiled programs, and the undisturbed run of `steps` steps."""

    def __init__(self, folder: Path, *, steps: int = STEPS):
        self.folder = folder
        self.steps = steps
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG.format(steps_per_epoch=steps // 4, save_every=SAVE_EVERY))
        self.reference = folder / "undisturbed"
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
        digests = folder / "digests.jsonl"
        finish(self.start("train.py", self.reference, change=RECORDED.format(path=str(digests))))
        self.digests = dict(json.loads(line) for line in digests.read_text().splitlines())
        self._read_state = _state_reader(self.config)
        if self.newest_state(self.reference) != (self.steps, self.digests[self.steps]):
            raise LostError("the checkpoint of the undisturbed run differs from the saved state")

    def start(self, program: str, workdir: Path, *, change: str = "") -> subprocess.Popen:
        """Starts train.py or eval.py on a workdir; `change` is Python that runs first."""
        command = [program, "--config", str(self.config), "--workdir", str(workdir)]
        if change:
            arguments = f"sys.argv = {command!r}\n"
            command = ["-c", "import sys\n" + arguments + CHANGED.format(change=change)]
        return self._process([sys.executable, *command])

    def start_adregnet(self, *arguments: str | Path) -> subprocess.Popen:
        program = "import sys; from adregnet_jax.cli.app import main; sys.exit(main())"
        return self._process([sys.executable, "-c", program, *map(str, arguments)])

    def _process(self, command: list[str]) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )

    def newest_state(self, workdir: Path) -> tuple[int, str] | None:
        """Step and digest of the state that a run would resume from; reads a copy of the files."""
        with tempfile.TemporaryDirectory(dir=self.folder) as copy:
            source = workdir / "checkpoints"
            if not source.is_dir():
                return None
            subprocess.run(["cp", "-r", source, copy], check=True)
            return self._read_state(Path(copy))

    def check_state(self, workdir: Path) -> None:
        """Requires that the newest state equals the undisturbed run's at that step, bit for bit."""
        found = self.newest_state(workdir)
        if found is not None and found[1] != self.digests[found[0]]:
            raise LostError(f"the state of step {found[0]} differs from that of the undisturbed run")

    def check_finished(self, workdir: Path) -> None:
        """Requires parameters, optimiser state and metrics of the undisturbed run, bit for bit."""
        if self.newest_state(workdir) != (self.steps, self.digests[self.steps]):
            raise LostError("the run ends in another state than the undisturbed one")
        if metrics(workdir) != metrics(self.reference):
            raise LostError("metrics.jsonl differs from that of the undisturbed run")

    def finish_training(self, workdir: Path) -> str:
        """Runs the same command again to its end; returns its stderr."""
        output = finish(self.start("train.py", workdir))
        self.check_finished(workdir)
        return output


def _state_reader(path: Path) -> Callable[[Path], tuple[int, str] | None]:
    config = load_config(path)
    mesh = make_mesh(0, 1)
    optimiser = make_optimiser(config.optimiser, config.optimiser.steps_per_epoch)
    init = make_init(make_model(config.model), optimiser, (16, 16, 16), mesh, averaged=True)
    abstract = abstract_state(init, jax.random.key(config.seed), mesh)

    def read(workdir: Path) -> tuple[int, str] | None:
        checkpoints = Checkpoints(workdir, say=lambda _: None)
        state = checkpoints.restore(abstract)
        checkpoints.close()
        return None if state is None else (int(state.step), digest(state))

    return read


def digest(tree: Any) -> str:
    """SHA-256 of all arrays in a tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def metrics(workdir: Path) -> list[dict]:
    """The complete lines of metrics.jsonl, without measured times."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {name: value for name, value in record.items() if name not in ("steps_per_second", "waiting_share")}
        for record in records
    ]


def finish(process: subprocess.Popen, *, status: int = 0) -> str:
    """Waits for a process to end with this status; returns its stderr.

    Raises:
      LostError: another status, or a traceback.
    """
    output = process.communicate(timeout=PATIENCE_SECONDS)[1]
    if "Traceback (most recent call last)" in output:
        raise LostError(f"a traceback: {output.strip().splitlines()[-1]}")
    if process.returncode != status:
        raise LostError(f"status {process.returncode} instead of {status}: {output.strip()[-300:]}")
    return output


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(done: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until `done()` or the end of the process."""
    until = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and not done():
        if time.monotonic() > until:
            kill(process)
            raise LostError(f"nothing happened for {PATIENCE_SECONDS:.0f} s")
        time.sleep(0.002)


def steps_logged(workdir: Path) -> int:
    try:
        return max((record["step"] for record in metrics(workdir)), default=0)
    except ValueError as error:
        raise LostError(f"metrics.jsonl can't be read during the run: {error}") from None


def check_files(folder: Path) -> None:
    """Requires that every file under its final name is complete; hidden files may be unfinished."""
    for path in folder.rglob("*"):
        if path.is_dir() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            whole = _whole(path)
        except Exception as error:  # readers raise anything on half a file
            raise LostError(f"{path.name} can't be read: {error}") from None
        if not whole:
            raise LostError(f"{path.name} is half a file")


def _whole(path: Path) -> bool:
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".csv":
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        return path.read_text(encoding="utf-8").endswith("\n") and len({len(row) for row in rows}) == 1
    elif path.suffix == ".png":
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
    elif path.suffix == ".html":
        return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    elif path.name.endswith(".nii.gz"):
        nib.Nifti1Image.from_filename(path).get_fdata()
    return path.stat().st_size > 0
