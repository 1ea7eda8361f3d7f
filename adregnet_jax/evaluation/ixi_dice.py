"""Dice on IXI, averaged over left and right as in publications, and tables of single subjects.

    >>> dice, folded_percent = read_results("X.csv")
    >>> summarise(dice)

TransMorph publishes a table of 46 Dice scores for each of the 115 test subjects. Its headline figures are
plain means: over left and right of each structure, which turns the 30 scored labels into 17 groups; then
over all groups and subjects. A structure thus counts once, whether it has two sides or one. The mean of the
30 labels differs: it is 0.406 for affine alignment, where the groups give 0.386. The published SD is taken
over groups x subjects, with divisor n, not n - 1.

The published tables have 0 where a label is absent from both the scan and the warped atlas. Here it is NaN
and left out of each mean: a group with one side takes its score. The published tables have no NaN.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adregnet_jax.atomic import write_file
from adregnet_jax.data.datasets.ixi import GROUPS, LABEL_NAMES, SCORED_LABELS
from adregnet_jax.errors import UserError
from adregnet_jax.evaluation import published
from adregnet_jax.report import tables

FOLDING_COLUMN = "non_jec"  # the fraction of voxels with a Jacobian determinant <= 0
COLUMNS = ["", *LABEL_NAMES, FOLDING_COLUMN]
# How the labels of each score were warped; the first two fold nothing.
WARPINGS = {
    "dice_before": "before",
    "dice_affine": "affine",
    "dice": "nearest",
    "dice_onehot": "one-hot trilinear",
}
WITHOUT_FOLDS = ("dice_before", "dice_affine")
TABLE_3 = (
    tables.Column("method", "{name}"),
    tables.Column("Dice, 17 groups", "{mean:.3f}"),
    tables.Column("SD, groups x cases", "{sd_groups_and_cases:.3f}"),
    tables.Column("SD, case means", "{sd_case_means:.3f}"),
    tables.Column("Dice, 30 labels", "{flat_mean:.3f}"),
    tables.Column("folded, %", "{folded_percent:.3f}"),
    tables.Column("SD", "{folded_sd_percent:.3f}"),
)


def group_scores(dice: np.ndarray) -> np.ndarray:
    """Dice [cases, 46] of all labels -> [cases, 17]: left and right averaged, in the order of `GROUPS`."""
    return np.stack([_mean_of_rows(dice[:, list(labels)]) for labels in GROUPS.values()], axis=1)


def summarise(dice: np.ndarray) -> dict[str, float]:
    """The means and SDs of Dice [cases, 46] that papers report, by name.

    Returns:
      `mean`, `sd_groups_and_cases` and `sd_case_means` of the 17 groups; `flat_mean`, `flat_sd` (over
      labels x cases) and `flat_sd_case_means` of the 30 labels. SDs have divisor n.
    """
    groups, labels = group_scores(dice), dice[:, list(SCORED_LABELS)]
    if np.isnan(groups).all():
        raise UserError(
            "none of the scored labels has a Dice score: does the segmentation have other numbers?"
        )
    return {
        "mean": float(np.nanmean(groups)),
        "sd_groups_and_cases": float(np.nanstd(groups)),
        "sd_case_means": float(np.nanstd(_mean_of_rows(groups))),
        "flat_mean": float(np.nanmean(labels)),
        "flat_sd": float(np.nanstd(labels)),
        "flat_sd_case_means": float(np.nanstd(_mean_of_rows(labels))),
    }


def _mean_of_rows(values: np.ndarray) -> np.ndarray:
    """`np.nanmean` along axis 1, without a warning for rows that are all NaN."""
    known = ~np.isnan(values)
    counts = known.sum(axis=1)
    sums = np.where(known, values, 0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def read_results(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads a table of single subjects: Dice [cases, 46] and folded voxels in percent [cases]."""
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a CSV file that can be read ({error})") from None
    if len(rows) < 2 or rows[1] != COLUMNS:
        raise UserError(
            f"{path}: line 2 isn't the names of the 46 labels and '{FOLDING_COLUMN}': expected a table of "
            "IXI subjects as TransMorph publishes it"
        )
    subjects = []
    for number, row in enumerate(rows[2:], 3):
        if not any(row):
            continue
        try:
            subjects.append([float(cell) for cell in row[1:]])
        except ValueError:
            raise UserError(f"{path}, line {number}: has a cell that isn't a number") from None
        if len(row) != len(COLUMNS):
            raise UserError(f"{path}, line {number}: has {len(row)} cells, expected {len(COLUMNS)}")
    if not subjects:
        raise UserError(f"{path}: has no subjects; expected one line per subject")
    values = np.array(subjects)
    return values[:, :-1], 100 * values[:, -1]


def results_csv(title: str, dice: np.ndarray, folded_percent: np.ndarray) -> str:
    """Dice [cases, 46] and folded voxels in percent [cases], in the layout that `read_results` reads."""
    if dice.shape != (len(folded_percent), len(LABEL_NAMES)):
        raise ValueError(
            f"dice is {dice.shape}, folded_percent {folded_percent.shape}: expected [cases, 46] and [cases]"
        )
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([title, *[""] * (len(COLUMNS) - 1)])
    table.writerow(COLUMNS)
    for case, (scores, folded) in enumerate(zip(dice.tolist(), folded_percent.tolist(), strict=True)):
        table.writerow([f"p_{case}", *scores, folded / 100])
    return text.getvalue()


def table_3(ours: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> list[tables.Row]:
    """The paper's Table III with our rows below: by name, Dice [cases, 46] and folded percent [cases]."""
    rows: list[tables.Row] = [
        {"name": name, "mean": dice, "sd_groups_and_cases": sd, "sd_case_means": None, "flat_mean": None}
        | {"folded_percent": folded, "folded_sd_percent": folded_sd}
        for name, (dice, sd, folded, folded_sd) in published.IXI.items()
    ]
    for name, (dice, folded_percent) in ours.items():
        row: tables.Row = {"name": name} | summarise(dice)
        row["folded_percent"] = float(np.mean(folded_percent))
        row["folded_sd_percent"] = float(np.std(folded_percent))
        rows.append({key: row[key] for key in rows[0]})
    return rows


def write_tables(
    folder: Path, cases: Sequence[tables.Row], dice: Sequence[Mapping[str, Mapping[int, float]]]
) -> tables.Table:
    """Writes each subject's Dice in the published layout, and Table III; returns the latter.

    Args:
      folder: gets ixi_*.csv and table_3.*.
      cases: one row per subject with its "folded_percent".
      dice: by warping and label, of each subject (`registration.measure.label_scores`).
    """
    folded_percent = np.array([case["folded_percent"] for case in cases])
    ours = {}
    for name, warping in WARPINGS.items():
        if name not in dice[0]:
            continue
        scores = np.array([[case[name].get(k, np.nan) for k in range(len(LABEL_NAMES))] for case in dice])
        folds = np.zeros_like(folded_percent) if name in WITHOUT_FOLDS else folded_percent
        ours[f"this run, {warping}"] = (scores, folds)
        write_file(folder / f"ixi_{name}.csv", results_csv("adregnet_jax", scores, folds))
    rows = table_3(ours)
    for suffix, render in (("md", tables.to_markdown), ("tex", tables.to_latex)):
        write_file(folder / f"table_3.{suffix}", render(rows, TABLE_3))
    write_file(folder / "table_3.csv", tables.to_csv(rows))
    return tables.Table("Dice as published", rows, TABLE_3)
