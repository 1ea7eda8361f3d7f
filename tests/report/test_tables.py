"""Rows to text, CSV, Markdown; and the SD of the published tables."""

import csv
import io
import json
import math
from typing import Any

import numpy as np
import pytest

from adregnet_jax.report import tables

ROWS: list[dict[str, Any]] = [
    {"name": "a", "tre_mm": 1.25, "tre_sd_mm": 0.5, "dice": None},
    {"name": "b, with a comma", "tre_mm": 1.0 / 3.0, "tre_sd_mm": 1.5, "dice": None},
]
COLUMNS = (
    tables.Column("case", "{name}"),
    tables.Column("TRE, mm", "{tre_mm:.2f} ({tre_sd_mm:.2f})"),
    tables.Column("Dice", "{dice:.3f}"),
)


def test_csv_round_trips():
    read = list(csv.DictReader(io.StringIO(tables.to_csv(ROWS))))
    assert [row["name"] for row in read] == ["a", "b, with a comma"]
    assert [float(row["tre_mm"]) for row in read] == [1.25, 1.0 / 3.0]  # to the last digit
    assert [row["dice"] for row in read] == ["", ""]


def test_text_is_aligned_and_leaves_out_a_column_that_applies_to_no_row():
    lines = tables.to_text(ROWS, COLUMNS).splitlines()
    assert lines[0].split("  ")[0] == "case"
    assert "Dice" not in lines[0]
    assert len({len(line) for line in lines}) == 1
    assert lines[3].endswith("0.33 (1.50)")


def test_markdown_marks_what_does_not_apply():
    rows = [*ROWS, {"name": "c|d", "tre_mm": 2.0, "tre_sd_mm": None, "dice": 0.5}]
    lines = tables.to_markdown(rows, COLUMNS).splitlines()
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[2] == "| a | 1.25 (0.50) | - |"
    assert lines[4] == r"| c\|d | - | 0.500 |"


def test_mean_and_sd_pass_over_what_does_not_apply():
    assert tables.mean_and_sd([1.0, None, math.nan, 3.0]) == (2.0, math.sqrt(2.0))
    assert tables.mean_and_sd([2.0]) == (2.0, None)
    assert tables.mean_and_sd([None, math.nan, math.inf]) == (None, None)


def test_the_last_rows_are_mean_and_sd():
    mean, sd = tables.with_mean_and_sd(ROWS)[2:]
    assert (mean["name"], sd["name"]) == ("mean", "SD")
    assert mean["tre_sd_mm"] == 1.0
    assert sd["tre_sd_mm"] == pytest.approx(math.sqrt(0.5))
    assert mean["dice"] is None
    json.dumps([mean, sd], allow_nan=False)


def test_sd_is_that_of_the_published_landmark_distances(real_data):
    root = real_data("dirlab_landmarks")
    fixed, moving = (np.loadtxt(root / f"Case4_300_{phase}_xyz.txt") for phase in ("T00", "T50"))
    distance_mm = np.linalg.norm((fixed - moving) * (1.13, 1.13, 2.5), axis=1)
    mean, sd = tables.mean_and_sd(distance_mm)
    assert (round(mean, 2), round(sd, 2)) == (9.83, 4.86)  # 4.85 with the divisor n


def test_latex_and_html_escape_what_they_must():
    rows: list[dict[str, Any]] = [{"name": r"a_b & 5 % <\x>", "value": 1.5}, {"name": "c", "value": None}]
    columns = (tables.Column("case", "{name}"), tables.Column("TRE, %", "{value:.1f}"))
    latex = tables.to_latex(rows, columns)
    assert r"a\_b \& 5 \% <\textbackslash{}x> & 1.5 \\" in latex
    assert latex.startswith("\\begin{tabular}{lr}\n\\toprule\ncase & TRE, \\% \\\\\n")
    assert latex.endswith("\\bottomrule\n\\end{tabular}\n")
    page = tables.to_html(rows, columns)
    assert "<td>a_b &amp; 5 % &lt;\\x&gt;</td><td>1.5</td>" in page
    assert "<td>c</td><td>-</td>" in page
