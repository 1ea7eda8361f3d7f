"""Trains and evaluates the network without each of its parts, over several seeds: Table V.

    python -m adregnet_jax.evaluation.ablation --config configs/phantom.py --workdir runs/table_v

Each row and seed has its own folder in the workdir, in the format of `train.py` and `eval.py`. Running the
same command again skips finished rows. At the end the table is printed and written to table_v.csv and
table_v.md. --seeds N takes the seeds 0 to N - 1 (default: 3); --baselines adds VoxelMorph-1 and -2. Any field
of the config can be set, as in training.

With --row, which can be repeated, your own rows replace those of the paper. Each is the config with the given
fields changed; the first row is the unchanged config. The table is then written to ablation.csv and
ablation.md.

    python -m adregnet_jax.evaluation.ablation --config configs/phantom.py --workdir runs/ablation \\
        --row model.align_features=False --row "loss.smoothness=2 loss.jacobian=20"
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adregnet_jax.atomic import write_file
from adregnet_jax.config import Config
from adregnet_jax.errors import UserError
from adregnet_jax.launch.config_file import override
from adregnet_jax.launch.main import main as entry_main
from adregnet_jax.report import tables

Rows = dict[str, Sequence[str]]  # settings such as "model.region_size=8" by the name of the row

ROWS: Rows = {
    "full": (),
    "without cross-attention": ("model.cross_attention=False",),
    "without regional attention": ("model.regional_attention=False",),
    "without multi-resolution synthesis": ("model.multi_resolution=False",),
    "without both attentions": ("model.cross_attention=False", "model.regional_attention=False"),
}
BASELINES: Rows = {name: (f"model.architecture={name}",) for name in ("voxelmorph-1", "voxelmorph-2")}
# Fields that may change when a run is resumed.
FREE_FIELDS = ("optimiser.epochs", "data.workers", "data.files.pairs", "data.dirlab.root", "data.ixi.root")
FREE_SECTIONS = ("run", "instance", "affine")
COLUMNS = (  # heading, metric (its name in cases.csv), format
    ("TRE, mm", "tre_mm", ".2f"),
    ("Dice", "dice", ".3f"),
    ("NCC", "ncc", ".3f"),
    ("MSE", "mse", ".4f"),
    ("SSIM", "ssim", ".3f"),
    ("folded, %", "folded_percent", ".3f"),
)


def table_v(config: Config, workdir: Path, *, seeds: int = 3, baselines: bool = False) -> None:
    """Produces the paper's Table V with `ablate`.

    Raises:
        UserError: the config isn't that of the full network, or training or evaluation fails.
    """
    model = config.model
    parts = (model.cross_attention, model.regional_attention, model.multi_resolution)
    if model.architecture != "adregnet" or not all(parts):
        raise UserError(
            "the config lacks a part that the rows remove, expected the full network: set"
            " model.architecture=adregnet, and cross_attention, regional_attention, multi_resolution to True"
        )
    rows = ROWS | BASELINES if baselines else ROWS
    ablate(config, workdir, rows, seeds=seeds, name="table_v", title="Table V")


def ablate(
    config: Config,
    workdir: Path,
    rows: Rows,
    *,
    seeds: int = 3,
    name: str = "ablation",
    title: str = "Ablation",
) -> None:
    """Trains and evaluates every row with every seed unless it is finished; prints and writes the table.

    Raises:
        UserError: rows set unknown fields or would share a folder, or a folder holds another run (all found
            before training); or training or evaluation fails.
    """
    configs = {row: row_config(config, changes) for row, changes in rows.items()}
    check_folders(workdir, rows)
    from adregnet_jax.evaluation.evaluate import evaluate  # with JAX
    from adregnet_jax.ops.convolution import check_implementation
    from adregnet_jax.training.loop import train

    for of_row in configs.values():
        of_row.check()
        check_implementation(of_row.model.convolution)  # before the first row is trained
    for seed in range(seeds):  # seeds outside: an interruption leaves all rows, with fewer seeds
        for row, of_row in configs.items():
            changed, folder = dataclasses.replace(of_row, seed=seed), row_folder(workdir, row, seed)
            if is_finished(changed, folder):
                print(f"{folder} is finished.")
                continue
            print(f"{folder}:")
            check_earlier_run(changed, folder)
            # After an interruption, results of an earlier config could otherwise pass for this one's.
            with contextlib.suppress(NotADirectoryError):  # the training refuses such a workdir
                (folder / "eval" / "summary.json").unlink(missing_ok=True)
            train(changed, folder)
            evaluate(changed, folder, figures=0)

    folders = {row: [row_folder(workdir, row, seed) for seed in range(seeds)] for row in rows}
    check_cases([folder for of_row in folders.values() for folder in of_row])
    lines = [table_row(row, folders[row]) for row in rows]
    columns = table_columns(with_sd=seeds > 1)
    write_file(workdir / f"{name}.csv", tables.to_csv(lines))
    write_file(workdir / f"{name}.md", tables.to_markdown(lines, columns))
    numbers = f"mean (sample SD) over {seeds} seeds" if seeds > 1 else "one seed"
    print(f"\n{title} on the test split of {config.data.kind} data: means over the cases, {numbers}.")
    print("Measured as in the tables above; network alone, best checkpoint of each run.\n")
    print(tables.to_text(lines, columns))
    print(f"Written to {workdir / f'{name}.csv'} and {workdir / f'{name}.md'}.")


def parse_row(text: str) -> tuple[str, ...]:
    """The settings in an option `--row "a.b=1 a.c=(2, 3)"`."""
    changes = tuple(re.split(r"\s+(?=[\w.]+=)", text.strip()))
    if not all(re.match(r"[\w.]+=", change) for change in changes):
        raise UserError(
            f"--row {text!r}: expected fields and values, for instance --row model.align_features=False"
        )
    return changes


def row_config(config: Config, changes: Sequence[str]) -> Config:
    if any(change.startswith("seed=") for change in changes):
        raise UserError("a row can't set the seed: choose the number of seeds with --seeds")
    return override(copy.deepcopy(config), [f"--config.{change}" for change in changes])


def row_folder(workdir: Path, row: str, seed: int) -> Path:
    return workdir / f"{re.sub(r'[/ ]', '-', row)}-seed{seed}"


def check_folders(workdir: Path, rows: Rows) -> None:
    row_of: dict[Path, str] = {}
    for row in rows:
        folder = row_folder(workdir, row, seed=0)
        if len(os.fsencode(folder.name)) > 200:  # most file systems take 255
            raise UserError(
                f"--row {row!r} is too long for the name of a folder: set what all rows share in the config"
            )
        if folder in row_of:
            raise UserError(f"the rows {row_of[folder]!r} and {row!r} would share the folder {folder}")
        row_of[folder] = row


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The config of the run in a folder; None without a readable record.

    Settings that are newer than the run get their defaults.
    """
    try:
        record = json.loads((folder / "config.json").read_text())["config"]
        return _completed(record, as_recorded(Config()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # training refuses a workdir with another kind of file there


def _completed(record: Any, defaults: Any) -> Any:
    """Completes nested dictionaries with the entries of `defaults` that they lack."""
    if not (isinstance(record, dict) and isinstance(defaults, dict)):
        return record
    return defaults | {name: _completed(value, defaults.get(name)) for name, value in record.items()}


def is_finished(config: Config, folder: Path) -> bool:
    """Whether a folder holds the evaluation of a run with exactly this config."""
    if not (folder / "eval" / "summary.json").is_file():
        return False
    return not differing_fields(as_recorded(config), recorded_config(folder))


def check_earlier_run(config: Config, folder: Path) -> None:
    """Refuses a folder that holds a run with other settings, whose parameters could pass for this one's."""
    recorded = recorded_config(folder)
    if isinstance(recorded, dict):
        others = [
            name
            for name in differing_fields(as_recorded(config), recorded)
            if name not in FREE_FIELDS and name.split(".")[0] not in FREE_SECTIONS
        ]
        if others:
            raise UserError(
                f"{folder} holds a run with another {', '.join(others)}: use another --workdir, or delete it"
            )


def as_recorded(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as in the file


def differing_fields(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Paths of the fields in our nested dictionary that differ in theirs."""
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [path]
    found = [differing_fields(ours[name], theirs.get(name), f"{path}.{name}".lstrip(".")) for name in ours]
    return [name for names in found for name in names]


def check_cases(folders: Sequence[Path]) -> None:
    """Refuses evaluations of different cases, which eval.py with another test split may have left."""
    names = [[case["name"] for case in _read_cases(folder)] for folder in folders]
    for folder, of_folder in zip(folders, names, strict=True):
        if of_folder != names[0]:
            raise UserError(
                f"{folder} was evaluated on other cases than {folders[0]}: delete its folder eval"
            )


def table_row(name: str, folders: Sequence[Path]) -> tables.Row:
    """Mean and SD, over the folders (one per seed), of each metric's mean over the cases."""
    runs = [_read_cases(folder) for folder in folders]
    row: tables.Row = {"network": name, "seeds": len(folders), "cases": len(runs[0])}
    for _, metric, _ in COLUMNS:
        means = [tables.mean_and_sd(case[metric] for case in cases)[0] for cases in runs]
        row[metric], row[f"{metric}_sd"] = tables.mean_and_sd(means)
    return row


def table_columns(*, with_sd: bool) -> list[tables.Column]:
    columns = [tables.Column("network", "{network}")]
    for heading, metric, form in COLUMNS:
        sd = f" ({{{metric}_sd:{form}}})" if with_sd else ""
        columns.append(tables.Column(heading, f"{{{metric}:{form}}}{sd}"))
    return columns


def _read_cases(folder: Path) -> list[tables.Row]:
    return tables.read_cases(folder / "eval" / "cases.csv")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", nargs="?", default="3", const="")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--row", action="append", nargs="?", const="", default=[], dest="rows")
    own, shared = parser.parse_known_args(argv)

    def run(config: Config, workdir: Path) -> None:
        if not own.seeds.isdecimal() or int(own.seeds) < 1:
            raise UserError(f"--seeds must be a whole number, at least 1; got {own.seeds!r}: for instance 3")
        if own.rows:
            rows: Rows = {"config": ()}
            for changes in map(parse_row, own.rows):
                if " ".join(changes) in rows:
                    raise UserError(f"there are two rows {' '.join(changes)}")
                rows[" ".join(changes)] = changes
            ablate(config, workdir, rows | (BASELINES if own.baselines else {}), seeds=int(own.seeds))
        else:
            table_v(config, workdir, seeds=int(own.seeds), baselines=own.baselines)

    return entry_main(run, __doc__, shared)


if __name__ == "__main__":
    sys.exit(main())
