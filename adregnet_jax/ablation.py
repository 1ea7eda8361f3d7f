"""Table V: trains and evaluates the network without each of its parts, over several seeds.

    python -m adregnet_jax.ablation --config configs/phantom.py --workdir runs/table_v

Each row and seed has its own folder in the workdir, which `train.py` and `eval.py` could have made as well.
The same command again reads the rows that are finished and goes on with the others. At the end the table is
printed and written to table_v.csv and table_v.md. --seeds N takes the seeds 0 to N - 1, or else 0 to 2;
--baselines adds VoxelMorph-1 and -2. Any field of the config can be set, as for training.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adregnet_jax.config import Config
from adregnet_jax.entry import main as entry_main
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import tables

Rows = dict[str, dict[str, Any]]  # by name, what a row changes in `ModelConfig`

ROWS: Rows = {
    "full": {},
    "without cross-attention": {"cross_attention": False},
    "without regional attention": {"regional_attention": False},
    "without multi-resolution synthesis": {"multi_resolution": False},
    "without both attentions": {"cross_attention": False, "regional_attention": False},
}
BASELINES: Rows = {name: {"architecture": name} for name in ("voxelmorph-1", "voxelmorph-2")}
COLUMNS = (  # heading, metric (its name in cases.csv), format
    ("TRE, mm", "tre_mm", ".2f"),
    ("Dice", "dice", ".3f"),
    ("NCC", "ncc", ".3f"),
    ("MSE", "mse", ".4f"),
    ("SSIM", "ssim", ".3f"),
    ("folded, %", "folded_percent", ".3f"),
)


def ablate(config: Config, workdir: Path, *, seeds: int = 3, rows: Rows = ROWS) -> None:
    """Trains and evaluates what isn't finished of every row and seed, then prints and writes the table.

    Raises:
        UserError: a base that isn't the full network, and whatever stops a training or an evaluation.
    """
    from adregnet_jax.evaluation.evaluate import evaluate, write_atomically  # JAX, once the config is good
    from adregnet_jax.training.loop import train

    model = config.model
    parts = (model.cross_attention, model.regional_attention, model.multi_resolution)
    if model.architecture != "adregnet" or not all(parts):
        raise UserError(
            "the config must be of the full network, it lacks a part that the rows take away: set"
            " model.architecture=adregnet, and cross_attention, regional_attention, multi_resolution to True"
        )
    for seed in range(seeds):  # one after the other: an interruption leaves whole rows, of fewer seeds
        for row, changes in rows.items():
            changed, folder = row_config(config, changes, seed), row_folder(workdir, row, seed)
            if is_finished(changed, folder):
                print(f"{folder} is finished.")
                continue
            print(f"{folder}:")
            # Else, after an interruption, the results of an earlier config would pass for those of this one.
            with contextlib.suppress(NotADirectoryError):  # the training refuses such a workdir
                (folder / "eval" / "summary.json").unlink(missing_ok=True)
            train(changed, folder)
            evaluate(changed, folder, figures=0)

    lines = [table_row(row, [row_folder(workdir, row, seed) for seed in range(seeds)]) for row in rows]
    columns = table_columns(with_sd=seeds > 1)
    write_atomically(workdir / "table_v.csv", tables.to_csv(lines).encode())
    write_atomically(workdir / "table_v.md", tables.to_markdown(lines, columns).encode())
    what = f"mean (sample SD) over {seeds} seeds" if seeds > 1 else "one seed"
    print(f"\nTable V on the test split of {config.data.kind} data: means over the cases, {what}.")
    print("Measured as in the tables above; network alone, best checkpoint of each run.\n")
    print(tables.to_text(lines, columns))
    print(f"Written to {workdir / 'table_v.csv'} and {workdir / 'table_v.md'}.")


def row_config(config: Config, changes: Mapping[str, Any], seed: int) -> Config:
    return dataclasses.replace(config, seed=seed, model=dataclasses.replace(config.model, **changes))


def row_folder(workdir: Path, row: str, seed: int) -> Path:
    return workdir / f"{row.replace(' ', '-')}-seed{seed}"


def is_finished(config: Config, folder: Path) -> bool:
    """Whether `folder` holds the evaluation of a run with just this config."""
    record = folder / "config.json"
    if not (record.is_file() and (folder / "eval" / "summary.json").is_file()):
        return False
    ours = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists, as in the file
    try:
        return json.loads(record.read_text())["config"] == ours
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False  # the training refuses the record


def table_row(name: str, folders: Sequence[Path]) -> tables.Row:
    """Of each metric the mean over the cases, and of these the mean and the SD over the seeds' folders."""
    runs = []
    for folder in folders:
        with (folder / "eval" / "cases.csv").open(newline="") as file:
            runs.append(tables.from_cells(csv.DictReader(file)))
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", nargs="?", default="3", const="")
    parser.add_argument("--baselines", action="store_true")
    own, shared = parser.parse_known_args(argv)

    def run(config: Config, workdir: Path) -> None:
        if not own.seeds.isdecimal() or int(own.seeds) < 1:
            raise UserError(f"--seeds must be a whole number from 1, it is {own.seeds!r}: for instance 3")
        ablate(config, workdir, seeds=int(own.seeds), rows=ROWS | BASELINES if own.baselines else ROWS)

    return entry_main(run, __doc__, shared)


if __name__ == "__main__":
    sys.exit(main())
