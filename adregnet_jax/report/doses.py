"""Dose-volume histograms: their numbers and their figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from adregnet_jax.report import tables

BINS = 200  # from no dose to the largest
MANY = 10  # structures with colours of their own


class Histogram(NamedTuple):
    """Cumulative dose-volume histograms of a structure before and after, on common doses."""

    name: str
    doses: Float[np.ndarray, " n"]
    before_percent: Float[np.ndarray, " n"]  # of the volume, with that dose and more
    after_percent: Float[np.ndarray, " n"]
    colour: tuple[float, float, float] | None = None


def cumulative(
    doses: Float[np.ndarray, "*shape"], shares: Float[np.ndarray, "*shape"], at: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Percent of a volume that has a dose and more.

    Args:
      doses: of each voxel.
      shares: how much of each voxel belongs to the volume.
      at: increasing doses.

    Returns:
      [n]; zeros for an empty volume.
    """
    within = shares > 0
    tolerance = 1e-6 * max(1.0, float(at[-1]))  # doses are float32
    reached = np.searchsorted(at - tolerance, doses[within], side="right")  # how many of the given doses
    volumes = np.bincount(reached, shares[within], minlength=len(at) + 1)
    total = volumes.sum()
    if not total:
        return np.zeros(len(at))
    return 100 * np.cumsum(volumes[::-1])[::-1][1:] / total


def mean_dose(doses: Float[np.ndarray, "*shape"], shares: Float[np.ndarray, "*shape"]) -> float | None:
    """The mean dose of a volume; None of an empty one."""
    total = float(shares.sum(dtype=np.float64))
    return float((doses * shares).sum(dtype=np.float64)) / total if total else None


def rows(histograms: Sequence[Histogram]) -> list[tables.Row]:
    """One row for each structure and dose."""
    return [
        {"name": one.name, "dose": dose, "before_percent": before, "after_percent": after}
        for one in histograms
        for dose, before, after in zip(*(v.tolist() for v in one[1:4]), strict=True)
    ]


def histogram_figure(histograms: Sequence[Histogram], *, unit: str) -> Figure:
    """Dose-volume histograms before (dashed) and after (solid)."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    for number, one in enumerate(histograms):
        colour = one.colour or f"C{number % MANY}"
        axes.plot(one.doses, one.before_percent, "--", color=colour, linewidth=1)
        axes.plot(one.doses, one.after_percent, "-", color=colour, linewidth=1.5, label=one.name)
    axes.set(xlabel=f"dose, {unit}", ylabel="volume with that dose and more, %", ylim=(0, 102))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.set_title("dashed: before; solid: carried over")
    if histograms:
        axes.legend(loc="upper right", fontsize="small")
    return figure
