"""The command `batch`: many pairs, one after the other, each recorded in results.csv."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from adregnet_jax.cli.options import (
    REGISTRATION_FIELDS,
    VERDICT_STATUS,
    CompositeOption,
    DeviceOption,
    FailOnOption,
    ReportOption,
    in_option_words,
    registration_options,
    takes_registration_options,
)
from adregnet_jax.cli.register import MEMORY_ADVICE, accepted, check_fail_on, register_to_folder
from adregnet_jax.errors import UserError
from adregnet_jax.registration.options import RegistrationOptions, Report, ScanFiles

if TYPE_CHECKING:
    from adregnet_jax.report.tables import Row
    from adregnet_jax.weights.trained_network import TrainedNetwork

REQUIRED = ("fixed", "moving")
OPTIONAL = tuple(name for name in ScanFiles.__dataclass_fields__ if name not in REQUIRED)
RESULTS = "results.csv"
MEASURES = (
    "verdict",
    "score",
    "predicted_error_mm",
    "predicted_error_90_low_mm",
    "predicted_error_90_high_mm",
    "taken_back",
    "similarity_measure",
    "similarity_before",
    "similarity_affine",
    "similarity_network",
    "similarity",
    "folded_percent",
    "folded_volume_percent",
    "jacobian_min",
    "jacobian_max",
    "dice_before",
    "dice",
    "landmarks",
    "tre_before_mm",
    "tre_before_sd_mm",
    "tre_mm",
    "tre_sd_mm",
)


class NamedPair(NamedTuple):
    name: str  # name of its folder
    files: ScanFiles


@takes_registration_options(*REGISTRATION_FIELDS)
def batch(
    pairs: Annotated[
        Path, typer.Argument(metavar="PAIRS.csv", help="One row per pair; paths relative to this file.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder with a folder for each pair.")
    ],
    device: DeviceOption = None,
    h5: CompositeOption = False,
    report: ReportOption = "static",
    fail_on: FailOnOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Register finished pairs again.")] = False,
    **choices: Any,
) -> None:
    """Registers every pair in a CSV and summarises the results in results.csv.

    Columns: fixed, moving and, optionally, name, fixed_labels, moving_labels, fixed_landmarks,
    moving_landmarks, fixed_mask, moving_mask. Running the same command again continues an interrupted batch.
    If a pair fails, its error is recorded, the others are still registered, and the exit status is 1.
    """
    options = registration_options(choices)
    check_fail_on(fail_on, options)
    rows = read_pairs(pairs)
    from adregnet_jax.cli.execution import load_network, start_jax

    chosen = start_jax(device)
    results = register_batch(
        rows,
        output,
        options,
        network=load_network(options.weights, chosen) if options.by_network else None,
        device=chosen,
        composite=h5,
        report=report,
        overwrite=overwrite,
    )
    failed = sum(row["status"] == "failed" for row in results)
    print(f"{len(rows) - failed} of {len(rows)} pairs registered, see {output / RESULTS}")
    if options.assess != "off":
        verdicts = [row["verdict"] for row in results if row["status"] != "failed"]
        print(", ".join(f"{verdicts.count(name)} {name}" for name in ("pass", "check", "fail")))
    if failed:
        raise typer.Exit(1)
    if fail_on and not all(accepted({"results": row}, fail_on) for row in results):
        raise typer.Exit(VERDICT_STATUS)


def read_pairs(path: Path) -> list[NamedPair]:
    """The rows of a CSV with the columns fixed, moving and, optionally, name and those of `OPTIONAL`.

    Paths are relative to the CSV. By default, a pair is named after its two files.

    Raises:
      UserError: the CSV can't be read, has wrong columns or an incomplete row, or a name occurs twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        columns = [name.strip() for name in next(csv.reader(lines), [])]
        reader = csv.DictReader(lines[1:], columns, skipinitialspace=True)
        table = [(reader.line_num + 1, cells) for cells in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file that can be read ({error})") from None
    unknown = [name for name in columns if name not in ("name", *REQUIRED, *OPTIONAL)]
    if unknown or not set(REQUIRED) <= set(columns):
        raise UserError(
            f"{path}: columns are {', '.join(columns) or 'none'}; expected fixed, moving and, as an option, "
            f"name, {', '.join(OPTIONAL)}"
        )
    rows = [_pair(path, line, cells) for line, cells in table]
    if not rows:
        raise UserError(f"{path}: has no rows; expected one per pair")
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two pairs are called {twice[0]}: add a column name that tells them apart")
    return rows


def register_batch(
    pairs: Sequence[NamedPair],
    output: Path,
    options: RegistrationOptions,
    *,
    network: TrainedNetwork | None,
    device: Any,
    composite: bool,
    report: Report,
    overwrite: bool,
) -> list[Row]:
    """Registers each pair into its own folder, and rewrites results.csv after each.

    A pair with a summary.json is left unchanged. If its files or options have changed since, it is recorded
    as failed.

    Returns:
      The rows of results.csv.
    """
    from adregnet_jax.atomic import write_errors_as_user_errors, write_file
    from adregnet_jax.cli.execution import show_stages
    from adregnet_jax.registration.files import STAGES
    from adregnet_jax.report.tables import to_csv

    with write_errors_as_user_errors(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with show_stages((len(STAGES) + 1) * len(pairs)) as show:
        for number, pair in enumerate(pairs, 1):
            prefix = f"{number}/{len(pairs)} {pair.name}: "

            def on_stage(stage: str, prefix: str = prefix) -> None:
                show(prefix + stage)

            def work(pair: NamedPair = pair, on_stage: Callable[[str], None] = on_stage) -> dict[str, Any]:
                folder = output / pair.name
                record = options.record() | {"composite": composite}
                return (None if overwrite else _summary(folder, record, pair.files)) or register_to_folder(
                    pair.files,
                    folder,
                    options,
                    network=network,
                    device=device,
                    composite=composite,
                    report=report,
                    overwrite=True,  # unfinished or outdated results, never other files
                    on_stage=on_stage,
                )

            rows.append(_row(pair, work))
            if rows[-1]["status"] == "failed":
                print(f"{prefix}failed: {rows[-1]['message']}", file=sys.stderr)
            write_file(output / RESULTS, to_csv(rows))
    return rows


def _pair(path: Path, line: int, cells: dict[str, Any]) -> NamedPair:
    where = f"{path}, line {line}"
    if None in cells or None in cells.values():
        raise UserError(f"{where}: expected as many cells as there are columns")
    values = {name: value.strip() for name, value in cells.items() if value.strip()}
    if absent := [name for name in REQUIRED if name not in values]:
        raise UserError(f"{where}: {absent[0]} is empty; expected a file")
    name = values.pop("name", "")
    try:
        files = ScanFiles(**{kind: path.parent / value for kind, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    name = name or f"{_stem(files.fixed)}_{_stem(files.moving)}"
    if "/" in name or "\\" in name or name.startswith(".") or name == RESULTS:
        raise UserError(f"{where}: name is '{name}'; expected one that a folder can have")
    return NamedPair(name, files)


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] or name


def _summary(folder: Path, record: dict[str, Any], files: ScanFiles) -> dict[str, Any] | None:
    """The summary of a finished pair; None for an unfinished one."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        sums = {name: source["sha256"] for name, source in summary["sources"].items()}
        options, _, _ = summary["options"], summary["results"], summary["seconds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if options != record:
        raise UserError(f"{folder} was made with other options: use another --output, or add --overwrite")
    if sums != {name: source["sha256"] for name, source in files.record().items()}:
        raise UserError(
            f"{folder} was made from other files, or they changed: add --overwrite to register again"
        )
    return summary


def _row(pair: NamedPair, work: Callable[[], dict[str, Any]]) -> Row:
    from adregnet_jax.launch.devices import memory_errors_as_user_errors

    files = {name: str(getattr(pair.files, name)) for name in REQUIRED}
    row: Row = {"name": pair.name} | files
    try:
        with memory_errors_as_user_errors(MEMORY_ADVICE):
            summary = work()
    except UserError as error:
        return row | _failure(in_option_words(str(error)))
    except Exception as error:  # whatever it is, the other pairs are not to blame
        return row | _failure(f"{type(error).__name__}: {error}")
    results = summary["results"]
    low, high = results.get("predicted_error_90_mm") or (None, None)
    results |= {"predicted_error_90_low_mm": low, "predicted_error_90_high_mm": high}
    measures = {name: results.get(name) for name in MEASURES}
    return row | {"status": "done", "message": "", "seconds": sum(summary["seconds"].values())} | measures


def _failure(message: str) -> Row:
    empty = dict.fromkeys(MEASURES)
    return {"status": "failed", "message": " ".join(message.split()), "seconds": None} | empty
