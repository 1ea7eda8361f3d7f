"""Points in the world, RAS mm: CSV, and 3D Slicer's two formats of markups. NumPy only."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float, Real

from adregnet_jax.atomic import new_file
from adregnet_jax.errors import UserError

COLUMNS = ["x", "y", "z"]
SUFFIXES = (".csv", ".fcsv", ".mrk.json")
# Slicer writes the coordinate system as a word or, up to version 4.10, as a number.
SIGNS = {"RAS": (1, 1, 1), "0": (1, 1, 1), "LPS": (-1, -1, 1), "1": (-1, -1, 1)}


def read_points(path: str | Path) -> Float[np.ndarray, "n 3"]:
    """Reads points: .csv with the header x,y,z in RAS mm, or 3D Slicer's .fcsv or .mrk.json.

    Returns:
      [n, 3] RAS mm.

    Raises:
      UserError: unknown suffix, unreadable text, wrong columns, or numbers that aren't finite.
    """
    path = Path(path)
    _check_suffix(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file that can be read ({error})") from None
    try:
        if path.name.endswith(".mrk.json"):
            points = _parse_markups(path, text)
        elif path.suffix == ".fcsv":
            points = _parse_fcsv(path, text)
        else:
            points = _parse_csv(path, text)
    except csv.Error as error:
        raise UserError(f"{path}: not a table of points that can be read ({error})") from None
    if not points or not np.isfinite(points).all():
        raise UserError(f"{path}: has {len(points)} points; expected at least one, of finite numbers x, y, z")
    return np.array(points)


def has_header(path: Path) -> bool:
    """Whether a file is in a format of `read_points`: one of Slicer's, or a .csv that starts with x,y,z."""
    if path.name.endswith((".fcsv", ".mrk.json")):
        return True
    if path.suffix != ".csv":
        return False
    try:
        first = path.read_text(encoding="utf-8-sig").lstrip().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return False  # the reader reports the error
    return [name.strip().lower() for name in first.split(",")] == COLUMNS


def write_points(path: str | Path, points_mm: Real[np.ndarray, "n 3"], *, overwrite: bool = False) -> None:
    """Writes points [n, 3] in RAS mm as .csv, .fcsv or .mrk.json.

    Raises:
      UserError: unknown suffix, the file already exists, or it can't be written.
      ValueError: points that are not [n, 3].
    """
    path = Path(path)
    _check_suffix(path)
    if points_mm.ndim != 2 or points_mm.shape[1] != 3:
        raise ValueError(f"points must be [n, 3], got shape {points_mm.shape}")
    rows = [[float(value) for value in point] for point in points_mm]
    if path.name.endswith(".mrk.json"):
        text = _markups(rows)
    elif path.suffix == ".fcsv":
        head = "# Markups fiducial file version = 4.11\n# CoordinateSystem = RAS\n# columns = id,x,y,z\n"
        text = head + "".join(f"{number},{x!r},{y!r},{z!r}\n" for number, (x, y, z) in enumerate(rows, 1))
    else:
        text = "x,y,z\n" + "".join(f"{x!r},{y!r},{z!r}\n" for x, y, z in rows)
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _check_suffix(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: not a kind of points file; expected one of {', '.join(SUFFIXES)}")


def _parse_csv(path: Path, text: str) -> list[list[float]]:
    header, *rows = csv.reader(io.StringIO(text)) if text.strip() else [[]]
    found = [name.strip() for name in header]
    # With a fourth column it may be a file for ANTs, which uses LPS: guessing could mirror the points.
    if [name.lower() for name in found] != COLUMNS:
        raise UserError(f"{path}: columns are {', '.join(found) or 'none'}; expected x, y, z in RAS mm")
    return [_numbers(path, number, row) for number, row in enumerate(rows, 2) if row]


def _parse_fcsv(path: Path, text: str) -> list[list[float]]:
    lines = text.splitlines()
    head = dict(line.lstrip("# ").partition(" = ")[::2] for line in lines if line.startswith("#"))
    signs = _signs(path, head.get("CoordinateSystem", "unknown").strip())
    # The columns are id, x, y, z and further attributes that Slicer stores.
    rows = [
        _numbers(path, number, next(csv.reader([line]))[1:4])
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    return [[sign * value for sign, value in zip(signs, row, strict=True)] for row in rows]


def _parse_markups(path: Path, text: str) -> list[list[float]]:
    try:
        (markup,) = json.loads(text)["markups"]
        units = markup.get("coordinateUnits", "mm")
        system = str(markup["coordinateSystem"])
        controls = list(enumerate(markup["controlPoints"], 1))
        for number, point in controls:
            if _is_unplaced(point):
                label = f" ({point['label']})" if point.get("label") else ""
                raise UserError(
                    f"{path}: point {number}{label} isn't placed: place it or delete it in 3D Slicer"
                )
        positions = [[float(value) for value in point["position"]] for _, point in controls]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{path}: not one list of markups of 3D Slicer: export the points again") from None
    if units not in ("mm", ["mm", "mm", "mm"]):
        raise UserError(f"{path}: expected points in mm, got units {units}: export the points again")
    if wrong := [position for position in positions if len(position) != 3]:
        raise UserError(f"{path}: expected points of three coordinates in mm, got {len(wrong[0])}")
    signs = _signs(path, system)
    return [[sign * value for sign, value in zip(signs, point, strict=True)] for point in positions]


def _is_unplaced(point: dict) -> bool:
    """Whether a point was never placed, or was skipped as missing."""
    return not point.get("position") or point.get("positionStatus") in ("undefined", "missing", "preview")


def _signs(path: Path, system: str) -> tuple[int, int, int]:
    if system not in SIGNS:
        raise UserError(f"{path}: coordinates are {system}; expected RAS or LPS: export the points again")
    return SIGNS[system]


def _numbers(path: Path, line: int, row: list[str]) -> list[float]:
    try:
        x, y, z = map(float, row)
    except ValueError:
        raise UserError(
            f"{path}, line {line}: expected three numbers x, y, z, got '{','.join(row)}'"
        ) from None
    return [x, y, z]


def _markups(points: list[list[float]]) -> str:
    controls = [{"id": str(number), "position": point} for number, point in enumerate(points, 1)]
    markup = {
        "type": "Fiducial",
        "coordinateSystem": "RAS",
        "coordinateUnits": "mm",
        "controlPoints": controls,
    }
    schema = (
        "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema"
    )
    return json.dumps({"@schema": f"{schema}/markups-schema-v1.0.3.json#", "markups": [markup]}, indent=1)
