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
from scipy import integrate, stats

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


class Sparsification(NamedTuple):
    """How the error of the rest falls when the places with the largest estimates are left out.

    Attributes:
      removed: [k], shares of the places that are left out, from 0 up.
      error: [k], mean error of the rest, as a share of that of all places.
      ideal: [k], likewise, if those with the largest errors are left out.
      area: between the two curves: 0 for the best estimate; about `area` of a random one at worst.
    """

    removed: Float[np.ndarray, " k"]
    error: Float[np.ndarray, " k"]
    ideal: Float[np.ndarray, " k"]
    area: float


class Calibration(NamedTuple):
    """An uncertainty and the error at the same landmarks."""

    uncertainty: np.ndarray  # [n]
    error_mm: np.ndarray  # [n]
    rank_correlation: float  # Spearman's
    sparsification: Sparsification


def sparsify(estimate: Float[np.ndarray, " n"], error: Float[np.ndarray, " n"]) -> Sparsification:
    """Sparsification of an error by an estimate of it.

    Args:
        estimate: [n], of any unit; more means a larger error.
        error: [n], not all of it 0.

    Examples:
        >>> error = np.array([4.0, 3.0, 2.0, 1.0])
        >>> sparsify(error**2, error).area
        0.0
        >>> bool(sparsify(-error, error).area > 0.3)
        True

    Reference:
        Ilg et al., Uncertainty estimates and multi-hypotheses networks for optical flow, ECCV 2018 (the area
        between the curves is their AUSE).
    """
    removed = np.linspace(0, 0.95, 20)

    def rest(order: np.ndarray) -> np.ndarray:
        means = np.cumsum(error[order]) / np.arange(1, len(error) + 1)  # of the first 1, 2, ... places
        kept = np.maximum(1, np.rint((1 - removed) * len(error))).astype(int)
        return means[kept - 1] / error.mean()

    by_estimate, ideal = rest(np.argsort(estimate, kind="stable")), rest(np.argsort(error, kind="stable"))
    area = float(integrate.trapezoid(by_estimate - ideal, removed))
    return Sparsification(removed, by_estimate, ideal, area)


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
    rho = float(stats.spearmanr(values, error_mm).statistic)
    return Calibration(values, error_mm, rho, sparsify(values, error_mm))


def calibration_figures(landmarks: Sequence[tables.Row]) -> dict[str, Figure]:
    """Figures by name, one for each uncertainty that varies."""
    return {
        uncertainty.figure: figures.calibration_figure(
            calibration.uncertainty,
            calibration.error_mm,
            calibration.rank_correlation,
            removed=calibration.sparsification.removed,
            rest=calibration.sparsification.error,
            ideal=calibration.sparsification.ideal,
            area=calibration.sparsification.area,
            measure=uncertainty.label,
        )
        for uncertainty in UNCERTAINTIES
        if (calibration := calibrate(landmarks, uncertainty)) is not None
    }


def rank_correlations(landmarks: Sequence[tables.Row]) -> list[str]:
    """Rank correlation with the error and area of the sparsification curve, a line for each that varies."""
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
            f" {calibration.rank_correlation:+.2f} over all landmarks{within};"
            f" area between its sparsification curve and the ideal one {calibration.sparsification.area:.3f}."
        )
    return lines
