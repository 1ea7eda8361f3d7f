"""Packed weights: two files to share, arrays and a description. One set comes with the package.

`weights.npz` holds only the parameters by name, float16; no pickle is read. `weights.json` holds
the network's settings, the grids it was trained on, its training record, and a checksum of everything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import PyTree

from adregnet_jax.errors import UserError, one_line
from adregnet_jax.nn.models import model_from_record
from adregnet_jax.provenance import __version__
from adregnet_jax.weights.trained_network import TrainedNetwork, TrainingDomain

ARRAYS = "weights.npz"
RECORD = "weights.json"
FORMAT = 1  # of the two files
SHIPPED = Path(__file__).parent
PRETRAINED = "pretrained"  # the name of the shipped weights


def load_pretrained(folder: str | Path | None = None) -> TrainedNetwork:
    """Loads a network from packed weights: those in a folder, or the bundled ones (any anatomy and contrast).

    Args:
      folder: written by `pack_weights`; None for the bundled weights (`adregnet_jax/weights/MODEL_CARD.md`).

    Returns:
      A `TrainedNetwork` with float32 parameters for `register_scans`; to work on a grid of your own, pass its
      `model` and `params` to `register`.

    Raises:
      UserError: the weights are missing, damaged, or from another version.

    Examples:
      >>> network = load_pretrained()
      >>> found = register_scans(read_image("fixed.nii.gz"), read_image("moving.nii.gz"), network=network)
    """
    name = PRETRAINED if folder is None else str(folder)
    folder = SHIPPED if folder is None else Path(folder)
    record, arrays = _read(folder)
    try:
        model = model_from_record(record["config"]["model"])
        scans = TrainingDomain(**{key: _tuple(value) for key, value in record["scans"].items()})
        with np.load(io.BytesIO(arrays), allow_pickle=False) as file:
            params = {key: jnp.asarray(file[key], jnp.float32) for key in file.files}
    except (UserError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{folder}: holds no weights that this version knows "
            f"({type(error).__name__}: {one_line(error)}): {_advice(folder)}"
        ) from None
    name = f"{name} ({record['sha256'][:12]})"
    return TrainedNetwork(model, traverse_util.unflatten_dict(params, sep="/"), scans, name)


def is_packed(folder: Path) -> bool:
    """Whether the folder looks as if written by `pack_weights`."""
    return (folder / RECORD).exists()


def pack_weights(
    folder: Path,
    params: PyTree[ArrayLike],
    *,
    config: dict[str, Any],
    scans: TrainingDomain,
    training: dict[str, Any],
) -> str:
    """Writes `weights.npz` and `weights.json` into a folder.

    Args:
      folder: an existing folder.
      params: parameters of the network.
      config: settings of the network, as in config.json of its run.
      scans: grid and contrast of the training scans.
      training: training record of the network, storable as JSON.

    Returns:
      The checksum.

    Raises:
      UserError: float16 can't hold the parameters.
    """
    arrays = {key: np.asarray(value) for key, value in traverse_util.flatten_dict(params, sep="/").items()}
    for key, value in arrays.items():
        if not (np.abs(value) < np.finfo(np.float16).max).all():
            raise UserError(f"parameter {key} is not finite, or too large for float16: train again")
    buffer = io.BytesIO()
    halves: dict[str, Any] = {key: value.astype(np.float16) for key, value in arrays.items()}
    np.savez(buffer, **halves)
    record = {
        "format": FORMAT,
        "adregnet_jax": __version__,
        "parameters": sum(value.size for value in arrays.values()),
        "config": config,
        "scans": dataclasses.asdict(scans),
        "training": training,
    }
    record = json.loads(json.dumps(record))  # tuples become lists, as they will be read
    record["sha256"] = _checksum(record, buffer.getvalue())
    (folder / ARRAYS).write_bytes(buffer.getvalue())
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record["sha256"]


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of `weights.json`, once the checksum has been verified.

    Raises:
      UserError: see `load_pretrained`.
    """
    return _read(folder)[0]


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        arrays = (folder / ARRAYS).read_bytes()
        form, expected = record["format"], record["sha256"]
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: can't be read ({error.strerror}): expected a folder with {RECORD}"
            f" and {ARRAYS}: {_advice(folder)}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / RECORD}: doesn't describe weights "
            f"({type(error).__name__}: {one_line(error)}): {_advice(folder)}"
        ) from None
    if form != FORMAT:
        raise UserError(
            f"{folder}: weights of format {form}, this version of adregnet_jax ({__version__}) reads format"
            f" {FORMAT}: install the version that wrote them, {record.get('adregnet_jax')}, or repack them"
        )
    found = _checksum(record, arrays)
    if found != expected:
        raise UserError(
            f"{folder}: the weights or their record were changed or damaged: checksum {found[:12]}...,"
            f" expected {str(expected)[:12]}...: {_advice(folder)}"
        )
    return record, arrays


def _checksum(record: dict[str, Any], arrays: bytes) -> str:
    described = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode() + arrays).hexdigest()


def _advice(folder: Path) -> str:
    return "install adregnet_jax again" if folder == SHIPPED else "copy the folder again"


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
