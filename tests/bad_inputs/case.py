"""A case of bad input, and makers of files that several kinds of cases share."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.nifti1 import header_dtype

from adregnet_jax.data.io import transforms

Make = Callable[[Path], object]
SHAPE = (6, 7, 8)
AFFINE = np.diag([-2.0, 2.0, 3.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Case:
    """Bad input, and the expected message about it.

    Attributes:
      name: name of the test.
      command: as typed, or a function that reads from the folder and raises a `UserError`.
      make: fills the folder.
      expected: regular expression to be found in the line: what was expected, what came, what to do.
      status: exit status of the process; 1 means that a pair of a batch failed.
      leaves: new files that the command may leave.
      child: whether to run in a separate process with a limited address space.
    """

    name: str
    command: str | Callable[[Path], object]
    make: Make
    expected: str
    status: int = 2
    leaves: tuple[str, ...] = ()
    child: bool = False


def make_all(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


def nothing(_folder: Path) -> None:
    pass


def raw(name: str, content: bytes | Callable[[], bytes]) -> Make:
    """A file; the content of a large one is made when it is needed."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())

    return make


def text(name: str, content: str) -> Make:
    return raw(name, content.encode())


def directory(name: str) -> Make:
    return lambda folder: (folder / name).mkdir(parents=True)


def loop(name: str) -> Make:
    """A link to itself."""
    return lambda folder: (folder / name).symlink_to(name)


def ramp(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def nifti_bytes(
    values: np.ndarray | None = None,
    affine: np.ndarray = AFFINE,
    *,
    big_endian: bool = False,
    **header: Any,
) -> bytes:
    """A NIfTI file whose header is then overwritten with the raw values `header`."""
    image = nib.Nifti1Image(ramp() if values is None else values, affine)
    image.header.set_xyzt_units("mm")
    if big_endian:
        swapped = image.header.as_byteswapped(">")
        image = nib.Nifti1Image(image.dataobj, affine, swapped)
    content = bytearray(image.to_bytes())
    fields = np.frombuffer(content, header_dtype.newbyteorder(">" if big_endian else "<"), 1)
    for name, value in header.items():
        fields[name] = value
    return bytes(content)


def scan(name: str = "scan.nii", values: np.ndarray | None = None, *, share: float = 1.0, **options) -> Make:
    """A NIfTI file cut off after the fraction `share`."""

    def make(folder: Path) -> None:
        content = nifti_bytes(values, **options)
        content = gzip.compress(content) if name.endswith(".gz") else content
        raw(name, content[: round(share * len(content))])(folder)

    return make


def noise(shape: tuple[int, ...] = (16, 16, 16)) -> np.ndarray:
    """Voxels that can't be compressed, so that a fraction of the file is a fraction of the voxels."""
    return np.random.default_rng(0).random(shape, np.float32)


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    values: np.ndarray = ramp().astype(dtype)
    values[1, 2, 3] = value
    return values


def pair(fixed: Make | None = None, moving: Make | None = None) -> Make:
    return make_all(fixed or scan("fixed.nii.gz"), moving or scan("moving.nii.gz"))


def field(name: str = "field.nii.gz", displacement: np.ndarray | None = None) -> Make:
    if displacement is None:
        displacement = np.zeros((*SHAPE, 3), np.float32)
    return lambda folder: transforms.write_field(folder / name, displacement, AFFINE)


def config(content: str = "from adregnet_jax.config import Config as get_config\n") -> Make:
    return text("config.py", content)


def pairs_csv(*rows: str, columns: str = "split,fixed,moving") -> Make:
    return text("pairs.csv", "\n".join([columns, *rows]) + "\n")


class Shell:
    """An object that runs a program when unpickled."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


def run_folder(record: str | None = None, checkpoint: str | None = None) -> Make:
    """A workdir with the given config.json, and a file in its checkpoint folder."""
    makes = [config(), directory("run/checkpoints/1")]
    if record is not None:
        makes.append(text("run/config.json", record))
    if checkpoint is not None:
        makes.append(text("run/checkpoints/1/params", checkpoint))
    return make_all(*makes)


SMALL_MODEL: dict[str, Any] = {"channels": (4,), "cross_attention": False, "regional_attention": False}


def trained(*damages: Make, **model: Any) -> Make:
    """A workdir with the checkpoint of a small network, to which `damages` are then applied."""

    def make(folder: Path) -> None:
        import jax
        import jax.numpy as jnp

        from adregnet_jax.config import Config, ModelConfig
        from adregnet_jax.nn.models import make_model
        from adregnet_jax.training.checkpoint import Checkpoints
        from adregnet_jax.training.state import TrainState
        from tests.random_parameters import random_parameters

        settings = ModelConfig(**SMALL_MODEL | model)
        volume = jax.ShapeDtypeStruct((1, 16, 16, 16, 1), np.float32)
        params = random_parameters(make_model(settings), volume, volume)
        one = jnp.ones((), jnp.int32)
        state = TrainState(step=one, params=params, opt_state=(), best_metric=jnp.zeros(()), best_step=one)
        (folder / "run").mkdir()
        checkpoints = Checkpoints(folder / "run")
        checkpoints.save(1, state)
        checkpoints.close()
        record = {"config": dataclasses.asdict(Config(model=ModelConfig(**SMALL_MODEL)))}
        (folder / "run" / "config.json").write_text(json.dumps(record))
        for each in (config(), *damages):
            each(folder)

    return make


def cut_checkpoint(folder: Path) -> None:
    """Cuts off the second half of every file of the parameters."""
    for path in sorted((folder / "run" / "checkpoints" / "1" / "params").rglob("*")):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


ENDLESS = "[" * 200_000
