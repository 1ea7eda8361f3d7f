"""Uncertainty of the network at the landmarks, and how well it predicts the error.

There are two measures: the entropy of the match, from a single pass of the network, and the SD of the
displacement over networks drawn by dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float
from matplotlib.figure import Figure
from scipy import stats

from adregnet_jax.data.pair import Pair
from adregnet_jax.registration.measure import landmark_errors_mm
from adregnet_jax.registration.network import dropout_sd_mm
from adregnet_jax.report import figures, tables


class Uncertainty(NamedTuple):
    column: str  # of landmarks.csv
    label: str  # name and unit
    figure: str  # name of the figure of its calibration


UNCERTAINTIES = (
    Uncertainty("match_entropy", "entropy of the match, nats", "calibration_of_the_uncertainty"),
    Uncertainty("dropout_sd_mm", "SD by dropout, mm", "calibration_of_the_dropout_uncertainty"),
)


class Calibration(NamedTuple):
    """An uncertainty and the error at the same landmarks."""

    uncertainty: np.ndarray  # [n]
    error_mm: np.ndarray  # [n]
    rank_correlation: float  # Spearman's


def dropout_scatter(
    model: nn.Module, params: Any, *, samples: int, seed: int
) -> Callable[[Pair], np.ndarray]:
    """`dropout_sd_mm` [x, y, z] as a function of a pair, with the same drawn networks for all pairs."""
    key = jax.random.key(seed)

    @jax.jit
    def scatter(params: Any, fixed: jax.Array, moving: jax.Array, spacing_mm: jax.Array) -> jax.Array:
        return dropout_sd_mm(params, fixed, moving, key, model=model, samples=samples, spacing_mm=spacing_mm)

    def of_pair(pair: Pair) -> np.ndarray:
        scans = [jnp.asarray(scan, jnp.float32)[None, ..., None] for scan in (pair.fixed, pair.moving)]
        return np.asarray(scatter(params, *scans, jnp.asarray(pair.spacing_mm, jnp.float32))[0])

    return of_pair


def landmark_rows(
    pair: Pair,
    displacement: Float[np.ndarray, "x y z 3"],
    *,
    match_entropy: Sequence[np.ndarray] = (),
    dropout_sd_mm: Float[np.ndarray, "x y z"] | None = None,
) -> list[tables.Row]:
    """One row per landmark: its 0-based number, its distance in mm before and after, and its uncertainties.

    The uncertainties are read at the voxel of the fixed landmark.

    Args:
        pair: the landmarks and the grid.
        displacement: [x, y, z, 3] in voxels.
        match_entropy: [x_l, y_l, z_l] of each level in nats; only the finest is used. Empty without
            attention.
        dropout_sd_mm: [x, y, z]; None without dropout samples.
    """
    before_mm, after_mm = landmark_errors_mm(pair, displacement)
    if pair.fixed_landmarks is None or before_mm is None or after_mm is None:
        return []
    shape = pair.fixed.shape
    voxels = np.clip(np.rint(pair.fixed_landmarks).astype(int), 0, np.array(shape) - 1)
    entropy, scatter_mm = (
        [None] * len(before_mm) if volume is None else volume[tuple(voxels.T)]
        for volume in (figures.enlarged(match_entropy[-1], shape) if match_entropy else None, dropout_sd_mm)
    )
    return [
        {
            "name": pair.name,
            "landmark": n,
            "before_mm": float(b),
            "after_mm": float(a),
            "match_entropy": tables.finite(e),
            "dropout_sd_mm": tables.finite(s),
        }
        for n, (b, a, e, s) in enumerate(zip(before_mm, after_mm, entropy, scatter_mm, strict=True))
    ]


def calibrate(landmarks: Sequence[tables.Row], uncertainty: Uncertainty) -> Calibration | None:
    """An uncertainty against the error, from rows of `landmark_rows`; None where either doesn't vary."""
    known = [row for row in landmarks if row[uncertainty.column] is not None]
    values, error_mm = (np.array([row[name] for row in known]) for name in (uncertainty.column, "after_mm"))
    if not known or np.ptp(values) == 0 or np.ptp(error_mm) == 0:
        return None
    return Calibration(values, error_mm, float(stats.spearmanr(values, error_mm).statistic))


def calibration_figures(landmarks: Sequence[tables.Row]) -> dict[str, Figure]:
    """Figures by name, one for each uncertainty that varies."""
    return {
        uncertainty.figure: figures.calibration_figure(*calibration, measure=uncertainty.label)
        for uncertainty in UNCERTAINTIES
        if (calibration := calibrate(landmarks, uncertainty)) is not None
    }


def rank_correlations(landmarks: Sequence[tables.Row]) -> list[str]:
    """The rank correlation with the error, as one line for each uncertainty that varies."""
    lines = []
    for uncertainty in UNCERTAINTIES:
        if (calibration := calibrate(landmarks, uncertainty)) is None:
            continue
        cases = [
            calibrate([row for row in landmarks if row["name"] == name], uncertainty)
            for name in dict.fromkeys(row["name"] for row in landmarks)
        ]
        rho = [case.rank_correlation for case in cases if case is not None]
        within = f"; within a case {np.mean(rho):+.2f} ({min(rho):+.2f} to {max(rho):+.2f})" if rho else ""
        lines.append(
            f"Spearman's rank correlation of {uncertainty.label}, with the error:"
            f" {calibration.rank_correlation:+.2f} over all landmarks{within}."
        )
    return lines
