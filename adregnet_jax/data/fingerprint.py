"""A fingerprint of the data files of a run, which shows whether they changed between two starts."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adregnet_jax.config import DataConfig

HEAD_BYTES = 2**16  # read of each file: whole scans would take minutes at every start


def data_fingerprint(config: DataConfig) -> dict[str, Any] | None:
    """Number, bytes and SHA-256 of the files that the config names; None for generated data.

    The SHA-256 covers the names (relative to the folder or the CSV), the sizes and the first 64 KiB of the
    files, sorted by name: it stays the same when the folder moves, and changes when a scan is replaced.
    """
    match config.kind:
        case "files":
            place = Path(config.files.pairs)
        case "dirlab":
            place = Path(config.dirlab.root)
        case "ixi":
            place = Path(config.ixi.root)
        case _:
            return None
    if place.is_dir():
        return _of_files(place, (path for path in place.rglob("*") if path.is_file()))
    return _of_files(place.parent, {place, *_named_by(place)})


def _named_by(table: Path) -> list[Path]:
    """The files that the cells of a CSV name."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        cells = {cell.strip() for row in csv.reader(file) for cell in row}
    return [table.parent / cell for cell in cells if cell and (table.parent / cell).is_file()]


def _of_files(root: Path, files: Iterable[Path]) -> dict[str, Any]:
    total, size, count = hashlib.sha256(), 0, 0
    for path in sorted(files):
        name = path.relative_to(root) if path.is_relative_to(root) else path
        bytes_ = path.stat().st_size
        try:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError:  # an unreadable file next to the data must not stop the run
            head = b""
        total.update(f"{name.as_posix()}\0{bytes_}\0".encode() + head)
        size, count = size + bytes_, count + 1
    return {"files": count, "bytes": size, "sha256": total.hexdigest()}
