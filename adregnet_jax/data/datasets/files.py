"""Pairs of NIfTI files, listed in a CSV or found in a folder, padded to a common shape. NumPy and nibabel.

A CSV has one row per pair and the columns `split` (train, validation or test), `fixed` and `moving`; optional
are `fixed_labels` and `moving_labels`, `fixed_landmarks` and `moving_landmarks`. Paths are relative to the
CSV. Fixed and moving scans lie on one grid, with the same shape and affine. Landmark files in RAS mm are
those of `adregnet register`: .fcsv, .mrk.json, and .csv with the header x,y,z. Any other text file holds
0-based voxels of its own scan, one x y z per line, separated by commas or blanks.

A folder has `images/` with one NIfTI file per subject and, optionally, `labels/` with the same file names.
Each pair has two different subjects, and no subject is in two splits. Here shapes may differ, and scans are
aligned at their centres; spacing and axes must agree.

Every scan is padded with zeros, evenly on both sides, to the largest shape of all files, which is read from
the headers. Each scan's 0.5 and 99.5 percentiles are mapped to 0 and 1.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from adregnet_jax.config import FilesConfig
from adregnet_jax.data.io import nifti
from adregnet_jax.data.io.points import has_header, read_points
from adregnet_jax.data.pair import Pair, PairMaker
from adregnet_jax.data.preprocessing import rescale_percentiles
from adregnet_jax.errors import UserError

SPLITS = ("train", "validation", "test")
OPTIONAL = ("fixed_labels", "moving_labels", "fixed_landmarks", "moving_landmarks")
GRID_TOLERANCE_MM = 1e-3  # affines are stored as float32


@dataclasses.dataclass(frozen=True)
class PairFiles:
    """The files of one pair."""

    split: str
    fixed: Path
    moving: Path
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None


def file_splits(
    config: FilesConfig, seed: int = 0
) -> tuple[list[PairMaker], list[PairMaker], list[PairMaker]]:
    """Pairs for training, validation and test; each entry reads its pair when called.

    All headers are read at once, so that a missing file or a grid that doesn't fit is found before training.

    Args:
      config: `config.pairs` is a CSV or a folder.
      seed: for the split of a folder by subject and the choice of partners; unused for a CSV.
    """
    source = Path(config.pairs)
    if config.pairs and source.is_dir():
        rows = _rows_of_folder(source, config, seed)
    elif config.pairs and source.is_file():
        rows = _rows_of_csv(source)
    else:
        raise UserError(f"data.files.pairs is '{config.pairs}': expected a CSV file or a folder with images/")

    _check_splits(rows)
    images = dict.fromkeys(path for row in rows for path in (row.fixed, row.moving))
    grids = {path: nifti.read_grid(path) for path in images}
    for row in rows:
        _check_grids(row, grids, same_shape=source.is_file())
    shape = tuple(np.max([grid[0] for grid in grids.values()], axis=0).tolist())
    loaders: dict[str, list[PairMaker]] = {split: [] for split in SPLITS}
    base = source / "images" if source.is_dir() else source.parent
    for row in rows:
        fixed, moving = (_subject(path, base) for path in (row.fixed, row.moving))
        loaders[row.split].append(PairMaker(fixed, moving, functools.partial(_load, row, shape)))
    return loaders["train"], loaders["validation"], loaders["test"]


def read_voxel_points(path: Path) -> np.ndarray:
    """Points [n, 3] from a text file: x y z per line, separated by commas or blanks; a header is skipped."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not a text file that can be read ({error}); expected x y z a line"
        ) from None
    points: list[tuple[float, float, float]] = []
    for number, line in enumerate(lines, 1):
        fields = line.replace(",", " ").split()
        if not fields or (not points and [field.lower() for field in fields] == ["x", "y", "z"]):
            continue
        try:
            x, y, z = map(float, fields)
        except ValueError:
            raise UserError(
                f"{path}, line {number}: expected three numbers x y z, got '{line.strip()}'"
            ) from None
        points.append((x, y, z))
    if not points or not np.isfinite(points).all():
        raise UserError(f"{path}: expected three finite numbers x y z a line, got {points[:1] or 'no line'}")
    return np.array(points)


def _rows_of_csv(path: Path) -> list[PairFiles]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        columns = [name.strip() for name in next(csv.reader(lines), [])]
        reader = csv.DictReader(lines[1:], columns, skipinitialspace=True)
        table = [(reader.line_num + 1, cells) for cells in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file that can be read ({error})") from None
    unknown = [name for name in columns if name not in ("split", "fixed", "moving", *OPTIONAL)]
    if unknown or not {"split", "fixed", "moving"} <= set(columns):
        raise UserError(
            f"{path}: columns are {', '.join(columns) or 'none'}; expected split, fixed, moving, "
            f"and optional {', '.join(OPTIONAL)}, with commas between"
        )
    rows = [_row_of_csv(path, line, cells) for line, cells in table]
    if not rows:
        raise UserError(f"{path}: has no rows; expected one per pair")
    return rows


def _row_of_csv(path: Path, line: int, cells: dict) -> PairFiles:
    if None in cells or None in cells.values():
        raise UserError(f"{path}, line {line}: expected as many cells as there are columns")
    values = {name: value.strip() for name, value in cells.items() if value.strip()}
    if values.get("split") not in SPLITS:
        raise UserError(
            f"{path}, line {line}: split is '{values.get('split', '')}'; use one of {', '.join(SPLITS)}"
        )
    files = {name: path.parent / value for name, value in values.items() if name != "split"}
    for one, other in (("fixed", "moving"), OPTIONAL[:2], OPTIONAL[2:]):
        if (one in files) != (other in files):
            raise UserError(f"{path}, line {line}: has only one of {one} and {other}; give both or none")
    if "fixed" not in files:
        raise UserError(f"{path}, line {line}: fixed and moving are empty; expected two NIfTI files")
    for name, file in files.items():
        if not file.is_file():
            raise UserError(
                f"{path}, line {line}: {name} is {file}, which doesn't exist; paths are relative to the CSV"
            )
    return PairFiles(split=values["split"], **files)


def _rows_of_folder(folder: Path, config: FilesConfig, seed: int) -> list[PairFiles]:
    """Pairs each subject with others of its split: random ones for training, else the next ones."""
    images = sorted(path for path in folder.glob("images/*.nii*") if not path.name.startswith("."))
    counts = [round(len(images) * share) for share in (config.validation_fraction, config.test_fraction)]
    counts = [len(images) - sum(counts), *counts]
    if min(counts) < 2:
        raise UserError(
            f"{folder}: {len(images)} NIfTI files in images/ give {' / '.join(map(str, counts))} subjects to "
            "train / validate / test; a pair needs two: add subjects or change data.files' fractions"
        )
    labels = {image: folder / "labels" / image.name for image in images}
    if (folder / "labels").is_dir():
        if missing := [path for path in labels.values() if not path.is_file()]:
            raise UserError(f"{folder}: {len(missing)} images have no labels, the first is {missing[0]}")
    else:
        labels = {}

    random = np.random.default_rng(seed)
    subjects = [images[index] for index in random.permutation(len(images))]
    rows = []
    for split, count in zip(SPLITS, counts, strict=True):
        members, subjects = subjects[:count], subjects[count:]
        for index, fixed in enumerate(members):
            others = np.arange(1, count)
            partners = {"train": config.partners, "validation": 1, "test": config.test_partners}[split]
            for step in (random.permutation(others) if split == "train" else others)[:partners]:
                moving = members[(index + step) % count]
                rows.append(PairFiles(split, fixed, moving, labels.get(fixed), labels.get(moving)))
    return rows


def _check_splits(rows: Sequence[PairFiles]) -> None:
    """Refuses a fixed scan that is also in another split. An atlas may be the moving scan everywhere."""
    split_of = {row.fixed.resolve(): row.split for row in rows}
    for row in rows:
        for path in (row.fixed, row.moving):
            other = split_of.get(path.resolve(), row.split)
            if other != row.split:
                raise UserError(
                    f"{path} is in the splits {row.split} and {other}: the test would include scans "
                    "of the training; put each fixed scan into one split"
                )


def _check_grids(row: PairFiles, grids: dict, *, same_shape: bool) -> None:
    (fixed_shape, fixed_affine, _), (moving_shape, moving_affine, _) = grids[row.fixed], grids[row.moving]
    columns = 4 if same_shape else 3  # the last column is the position of voxel 0
    same_axes = np.allclose(fixed_affine[:, :columns], moving_affine[:, :columns], atol=GRID_TOLERANCE_MM)
    if (same_shape and fixed_shape != moving_shape) or not same_axes:
        raise UserError(
            f"{row.fixed} is {fixed_shape} and {row.moving} {moving_shape}, affines {_row(fixed_affine)} and "
            f"{_row(moving_affine)}: expected one grid, resample the moving scan to the fixed one"
        )


def _row(affine: np.ndarray) -> str:
    return np.array2string(affine[:3], precision=3, suppress_small=True, separator=",").replace("\n", "")


def _load(files: PairFiles, shape: tuple[int, ...]) -> Pair:
    fixed, affine, spacing_mm = nifti.read_volume(files.fixed)
    moving, moving_affine, _ = nifti.read_volume(files.moving)
    low, fixed_inside = _padding(fixed.shape, shape)
    moving_low, moving_inside = _padding(moving.shape, shape)
    shift = np.eye(4)
    shift[:3, 3] = -low
    pair = Pair(
        name=f"{_stem(files.fixed)}_{_stem(files.moving)}",
        fixed=_pad(rescale_percentiles(fixed, str(files.fixed)), shape),
        moving=_pad(rescale_percentiles(moving, str(files.moving)), shape),
        spacing_mm=spacing_mm,
        affine=affine @ shift,
        mask=fixed_inside & moving_inside,
        native_offset=-low,
        native_spacing_mm=spacing_mm,
    )
    if files.fixed_labels and files.moving_labels:
        pair = dataclasses.replace(
            pair,
            fixed_labels=_pad(_labels(files.fixed_labels, fixed.shape), shape),
            moving_labels=_pad(_labels(files.moving_labels, moving.shape), shape),
        )
    if files.fixed_landmarks and files.moving_landmarks:
        fixed_points = _landmarks(files.fixed_landmarks, fixed.shape, affine)
        moving_points = _landmarks(files.moving_landmarks, moving.shape, moving_affine)
        if len(fixed_points) != len(moving_points):
            raise UserError(
                f"{files.fixed_landmarks} has {len(fixed_points)} landmarks, {files.moving_landmarks} "
                f"{len(moving_points)}: expected pairs, line by line"
            )
        pair = dataclasses.replace(
            pair, fixed_landmarks=fixed_points + low, moving_landmarks=moving_points + moving_low
        )
    return pair


def _padding(inner: tuple[int, ...], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of padding before the scan along each axis, [3], and a mask [x, y, z], True within the scan."""
    low = (np.array(shape) - inner) // 2
    return low, _pad(np.ones(inner, bool), shape)


def _pad(volume: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    missing = [outer - inner for outer, inner in zip(shape, volume.shape, strict=True)]
    return np.pad(volume, [(n // 2, n - n // 2) for n in missing])


def _labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    labels, _, _ = nifti.read_labels(path)
    if labels.shape != shape:
        raise UserError(f"{path}: labels are {labels.shape}, their image is {shape}: expected one grid")
    return labels


def _landmarks(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Reads landmarks [n, 3] in voxels of a scan."""
    in_the_world = has_header(path)
    if in_the_world:
        points = (read_points(path) - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    else:
        points = read_voxel_points(path)
    outside = ((points < -0.5) | (points > np.array(shape) - 0.5)).any(axis=1)
    if outside.any():
        raise UserError(
            f"{path}: {outside.sum()} of {len(points)} landmarks are outside of the {shape} voxels, "
            f"the first is {points[outside][0]}: expected "
            + ("RAS mm of this scan" if in_the_world else "0-based voxels; RAS mm have the header x,y,z")
        )
    return points


def _subject(path: Path, base: Path) -> str:
    """The path relative to the data, since a file name may occur twice in a CSV."""
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
