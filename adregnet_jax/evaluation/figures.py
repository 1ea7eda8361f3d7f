"""Figures of the evaluation: of single cases, of all cases together, and of the training run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from adregnet_jax import metrics
from adregnet_jax.data.pair import Pair
from adregnet_jax.evaluation.inference import RegisteredPair
from adregnet_jax.evaluation.uncertainty import calibration_figures
from adregnet_jax.report import figures, tables


def case_figures(
    pair: Pair,
    registered: RegisteredPair,
    *,
    jacobian: Float[np.ndarray, "x y z"],
    title: str,
) -> dict[str, Figure]:
    """The figures of a registered pair, by the end of their file names.

    Args:
        pair: the scans.
        registered: the result of registering them.
        jacobian: [x, y, z], Jacobian determinant of the displacement.
        title: shown above the panels.
    """
    return {
        "": figures.registration_figure(
            pair.fixed,
            pair.moving,
            registered.warped,
            registered.displacement,
            jacobian,
            spacing_mm=pair.spacing_mm,
            affine=pair.affine,
            title=title,
        ),
        "_levels": figures.levels_figure(
            pair.fixed,
            pair.moving,
            registered.warped,
            registered.match_entropy,
            [metrics.jacobian(displacement) for displacement in registered.pyramid],
            spacing_mm=pair.spacing_mm,
            affine=pair.affine,
            dropout_sd_mm=registered.dropout_sd_mm,
            title=title,
        ),
    }


def summary_figures(
    landmarks: Sequence[tables.Row], jacobians: Mapping[str, np.ndarray]
) -> dict[str, Figure]:
    """The figures over the cases, by name: landmark distances, uncertainty against error, the Jacobian.

    Args:
        landmarks: rows of `uncertainty.landmark_rows`.
        jacobians: determinants [n] by the name of the case.
    """
    drawn = {"landmark_distances": landmark_figure(landmarks)} if landmarks else {}
    drawn |= calibration_figures(landmarks)
    if jacobians:
        drawn["jacobian"] = figures.jacobian_figure(list(jacobians), list(jacobians.values()))
    return drawn


def landmark_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """`report.figures.tre_figure` of rows from `landmark_rows`, or of the lines of a landmarks.csv."""
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    before, after = (
        [np.array([float(row[column]) for row in rows if row["name"] == name]) for name in names]
        for column in ("before_mm", "after_mm")
    )
    return figures.tre_figure(names, before, after)


def training_figure(logged: Path) -> Figure | None:
    """The curves of a `metrics.jsonl`; None without the file. A line cut off by a kill is left out."""
    records = []
    for line in logged.read_text(encoding="utf-8").splitlines() if logged.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return figures.training_figure(records) if records else None
