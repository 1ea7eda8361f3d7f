"""Figures of the evaluation: of single cases, of all cases together, and of the training run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from adregnet_jax import metrics
from adregnet_jax.data.pair import Pair
from adregnet_jax.evaluation.inference import RegisteredPair
from adregnet_jax.evaluation.uncertainty import calibration_figures
from adregnet_jax.registration.measure import warp_nearest
from adregnet_jax.report import figures, tables
from adregnet_jax.report.viewer import ViewedPair


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


def viewed(pair: Pair, registered: RegisteredPair, *, jacobian: Float[np.ndarray, "x y z"]) -> ViewedPair:
    """A registered pair as the interactive report shows it.

    Args:
        pair: the scans.
        registered: the result of registering them.
        jacobian: [x, y, z], Jacobian determinant of the displacement.
    """
    labels, displacement = pair.moving_labels, registered.displacement
    # The affine may lack the spacing, by which distances are measured.
    affine = np.asarray(pair.affine, np.float64)
    affine = affine @ np.diag([*(pair.spacing_mm / nib.affines.voxel_sizes(affine)), 1.0])
    fixed, moving = pair.fixed_landmarks, pair.moving_landmarks
    mapped = None if fixed is None else metrics.map_points(displacement, fixed)
    in_mm = [
        None if points is None else nib.affines.apply_affine(affine, points)
        for points in (fixed, moving, mapped)
    ]
    return ViewedPair(
        pair.name,
        affine=affine,
        fixed=pair.fixed,
        moving=pair.moving,
        warped=registered.warped,
        displacement=displacement,
        jacobian=jacobian,
        fixed_labels=pair.fixed_labels,
        moving_labels=labels,
        warped_labels=None if labels is None else warp_nearest(labels, displacement),
        fixed_landmarks_mm=in_mm[0],
        moving_landmarks_mm=in_mm[1],
        mapped_landmarks_mm=in_mm[2],
    )


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
