"""Many pairs, one after the other: what is done is kept, what fails is told, the rest goes on."""

from __future__ import annotations

import csv
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adregnet_jax.atomic import write_errors_as_user_errors, write_file
from adregnet_jax.cli.execution import interruptible, memory_errors_as_user_errors, told_stages
from adregnet_jax.errors import UserError
from adregnet_jax.registration.files import STAGES, Sources, register_pair
from adregnet_jax.registration.options import Procedure
from adregnet_jax.report import tables
from adregnet_jax.weights.trained_network import TrainedNetwork

REQUIRED = ("fixed", "moving")
OPTIONAL = tuple(name for name in Sources.__dataclass_fields__ if name not in REQUIRED)
RESULTS = "results.csv"
MEASURES = (
    "similarity_measure",
    "similarity_before",
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
    name: str  # of its folder
    sources: Sources


def read_pairs(path: Path) -> list[NamedPair]:
    """The rows of a CSV with the columns fixed, moving and, as an option, name and those of `OPTIONAL`.

    Paths are relative to the CSV. Without a name, a pair has that of its two files.

    Raises:
      UserError: no CSV that can be read, other columns, a row that is incomplete, a name twice.
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
        raise UserError(f"{path}: has no rows; expected one a pair")
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: two pairs are called {twice[0]}: add a column name that tells them apart")
    return rows


def register_batch(
    pairs: Sequence[NamedPair],
    output: Path,
    procedure: Procedure,
    *,
    network: TrainedNetwork | None,
    device: Any,
    overwrite: bool,
    memory_advice: str,
) -> int:
    """Registers each pair into a folder of its own, and writes results.csv anew after each.

    A pair whose summary.json is there is left as it is, unless files or options have changed since, which is
    told as a failure.

    Returns:
      How many failed.
    """
    with write_errors_as_user_errors(f"--output {output}"):
        output.mkdir(parents=True, exist_ok=True)
    rows: list[tables.Row] = []
    with told_stages(len(STAGES) * len(pairs)) as tell:
        for number, pair in enumerate(pairs, 1):
            prefix = f"{number}/{len(pairs)} {pair.name}: "

            def on_stage(stage: str, prefix: str = prefix) -> None:
                tell(prefix + stage)

            def work(pair: NamedPair = pair, on_stage: Callable[[str], None] = on_stage) -> dict[str, Any]:
                done = None if overwrite else _summary(output / pair.name, procedure, pair.sources)
                return done or register_pair(
                    pair.sources,
                    output / pair.name,
                    procedure,
                    network=network,
                    compute=functools.partial(interruptible, device=device),
                    overwrite=True,  # what isn't finished, or is to be done again; never files of others
                    on_stage=on_stage,
                )

            rows.append(_row(pair, work, memory_advice))
            if rows[-1]["status"] == "failed":
                print(f"{prefix}failed: {rows[-1]['message']}", file=sys.stderr)
            write_file(output / RESULTS, tables.to_csv(rows))
    return sum(row["status"] == "failed" for row in rows)


def _pair(path: Path, line: int, cells: dict) -> NamedPair:
    where = f"{path}, line {line}"
    if None in cells or None in cells.values():
        raise UserError(f"{where}: expected as many cells as there are columns")
    values = {name: value.strip() for name, value in cells.items() if value.strip()}
    if absent := [name for name in REQUIRED if name not in values]:
        raise UserError(f"{where}: {absent[0]} is empty; expected a file")
    name = values.pop("name", "")
    sources = Sources(**{kind: path.parent / value for kind, value in values.items()})
    try:
        sources.check(str)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    name = name or f"{_stem(sources.fixed)}_{_stem(sources.moving)}"
    if "/" in name or "\\" in name or name.startswith(".") or name == RESULTS:
        raise UserError(f"{where}: name is '{name}'; expected one that a folder can have")
    return NamedPair(name, sources)


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] or name


def _summary(folder: Path, procedure: Procedure, sources: Sources) -> dict[str, Any] | None:
    """What a finished pair holds; None where it is not finished."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        options, files = summary["options"], summary["sources"]
        sums = {name: source["sha256"] for name, source in files.items()}
        summary["results"], summary["seconds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if options != procedure.record():
        raise UserError(f"{folder} was made with other options: take another --output, or add --overwrite")
    if sums != {name: source["sha256"] for name, source in sources.record().items()}:
        raise UserError(f"{folder} is of other files, or they changed since: add --overwrite to do it again")
    return summary


def _row(pair: NamedPair, work: Callable[[], dict[str, Any]], memory_advice: str) -> tables.Row:
    files = {name: str(getattr(pair.sources, name)) for name in REQUIRED}
    row: tables.Row = {"name": pair.name} | files
    try:
        with memory_errors_as_user_errors(memory_advice):
            summary = work()
    except UserError as error:
        return row | _failure(str(error))
    except Exception as error:  # whatever it is, the other pairs are not to blame
        return row | _failure(f"{type(error).__name__}: {error}")
    measures = {name: summary["results"].get(name) for name in MEASURES}
    return row | {"status": "done", "message": "", "seconds": sum(summary["seconds"].values())} | measures


def _failure(message: str) -> tables.Row:
    empty = dict.fromkeys(MEASURES)
    return {"status": "failed", "message": " ".join(message.split()), "seconds": None} | empty
