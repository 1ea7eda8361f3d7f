"""Rows of results as text, CSV, Markdown, LaTeX and HTML, and their mean and SD.

A row is a dict from name to value. `None` stands for "does not apply" (no landmarks, no labels) and for a
value that isn't finite: it is an empty cell in CSV, a dash in a printed table and null in JSON.

Every standard deviation over cases or landmarks is the sample SD (divisor n - 1), as in the published DIR-Lab
tables: the landmark distances of case 4 give 4.86 mm with n - 1, the published figure, and 4.85 mm with n.
"""

from __future__ import annotations

import csv
import html
import io
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adregnet_jax.errors import UserError

Row = dict[str, Any]
SUMMARY = ("mean", "SD")  # names of the last rows of `with_mean_and_sd`
TEXTS = ("name", "fixed", "moving")  # the columns of cases.csv that hold no numbers


class Column(NamedTuple):
    """One printed column: `cell` is a format string with names of the row, such as "{tre_mm:.2f}"."""

    heading: str
    cell: str

    def text(self, row: Row) -> str:
        """The cell of a row; a dash if one of its values does not apply or was not measured."""
        fields = [name for _, name, _, _ in string.Formatter().parse(self.cell) if name]
        names = [name.partition("[")[0] for name in fields]
        return "-" if any(row.get(name) is None for name in names) else self.cell.format_map(row)


class Table(NamedTuple):
    """A table to print and to write."""

    caption: str
    rows: Sequence[Row]
    columns: Sequence[Column]


ALIGNMENT = (
    Column("case", "{name}"),
    Column("landmarks", "{landmarks:.0f}"),
    Column("TRE before, mm", "{tre_before_mm:.2f} ({tre_before_sd_mm:.2f})"),
    Column("TRE affine, mm", "{tre_affine_mm:.2f} ({tre_affine_sd_mm:.2f})"),
    Column("TRE, mm", "{tre_mm:.2f} ({tre_sd_mm:.2f})"),
    Column("snapped, mm", "{tre_snapped_mm:.2f}"),
    Column("Dice before", "{dice_before:.3f}"),
    Column("Dice affine", "{dice_affine:.3f}"),
    Column("Dice", "{dice:.3f}"),
    Column("Dice, one-hot", "{dice_onehot:.3f}"),
    Column("folded, %", "{folded_percent:.3f}"),
    Column("time, s", "{seconds:.2f}"),
)
SIMILARITY = (
    Column("case", "{name}"),
    Column("NCC before", "{ncc_before:.3f}"),
    Column("NCC affine", "{ncc_affine:.3f}"),
    Column("NCC", "{ncc:.3f}"),
    Column("MSE before", "{mse_before:.4f}"),
    Column("MSE", "{mse:.4f}"),
    Column("SSIM before", "{ssim_before:.3f}"),
    Column("SSIM", "{ssim:.3f}"),
    Column("Jacobian", "{jacobian_mean:.3f} ({jacobian_sd:.3f})"),
    Column("minimum", "{jacobian_min:.3f}"),
    Column("SDlogJ", "{sd_log_jacobian:.4f}"),
    Column("folded volume, %", "{folded_volume_percent:.4f}"),
)


def finite(value: float | np.floating | None) -> float | None:
    """A value as a Python float; None if it is missing or not finite, so that no table holds a NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def mean_and_sd(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample SD of the finite values; None without values, the SD also if there is only one."""
    known = [number for value in values if (number := finite(value)) is not None]
    mean = float(np.mean(known)) if known else None
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else None


def with_mean_and_sd(rows: Sequence[Row]) -> list[Row]:
    """The rows, followed by their mean and SD over the cases, column by column."""
    numbers = {name: mean_and_sd(row[name] for row in rows) for name in rows[0] if name not in TEXTS}
    mean: Row = {"name": SUMMARY[0]} | {name: pair[0] for name, pair in numbers.items()}
    sd: Row = {"name": SUMMARY[1]} | {name: pair[1] for name, pair in numbers.items()}
    return [*rows, mean, sd]


def to_csv(rows: Sequence[Row]) -> str:
    """All values of all rows at full precision, below a header; `None` is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_cells(cells: Iterable[Mapping[str, str]]) -> list[Row]:
    """Rows from the cells of `to_csv`: numbers as floats, empty cells as None."""
    return [
        {name: cell if name in TEXTS else (float(cell) if cell else None) for name, cell in line.items()}
        for line in cells
    ]


def read_cases(path: Path) -> list[Row]:
    """The rows of a `cases.csv`, numbers as floats, empty cells as None."""
    try:
        rows = from_cells(read_csv(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: is not a table of eval.py ({error}): evaluate the run again") from None
    if not rows or "name" not in rows[0]:
        raise UserError(f"{path}: holds no cases; expected the cases.csv of eval.py")
    if not all(row["name"] for row in rows):
        raise UserError(f"{path}: a case without a name, the table is cut off: evaluate the run again")
    return rows


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a table written by eval.py, by the names of its columns."""
    try:
        return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run eval.py with this workdir first") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as CSV ({error})") from None


def to_text(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """An aligned table for the terminal: first column left-aligned, the others right-aligned."""
    cells = _cells(rows, columns)
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]]) + "\n"


def to_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A Markdown table: first column left-aligned, the others right-aligned."""
    cells = _cells(rows, columns)
    rule = ["---"] + ["---:"] * (len(cells[0]) - 1)
    lines = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in [cells[0], rule, *cells[1:]]]
    return "".join(f"| {line} |\n" for line in lines)


def to_latex(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """A LaTeX `tabular` with booktabs rules."""
    heading, *cells = _cells(rows, columns)
    lines = [
        r"\begin{tabular}{l" + "r" * (len(heading) - 1) + "}",
        r"\toprule",
        _latex_line(heading),
        r"\midrule",
    ]
    lines += [_latex_line(line) for line in cells]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_html(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """An HTML table; mean and SD of `with_mean_and_sd` are its foot, and stay there when it is sorted."""
    heading, *cells = _cells(rows, columns)
    lines = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in cells]
    summary = len(rows) - sum(row.get("name") in SUMMARY for row in rows[-2:])
    parts = {"tbody": lines[:summary], "tfoot": lines[summary:]}
    top = "<thead><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in heading) + "</tr></thead>"
    body = "".join(f"<{tag}>\n" + "\n".join(part) + f"\n</{tag}>\n" for tag, part in parts.items() if part)
    return f"<table>\n{top}\n{body}</table>\n"


def _latex_line(cells: Sequence[str]) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    escaped = ["".join(special.get(character, character) for character in cell) for cell in cells]
    return " & ".join(escaped) + r" \\"


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """The headings, then one line per row. A column that applies to no row is left out."""
    shown = [column for column in columns if any(column.text(row) != "-" for row in rows)]
    return [[column.heading for column in shown], *([column.text(row) for column in shown] for row in rows)]
