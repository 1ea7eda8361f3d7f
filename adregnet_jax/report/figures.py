"""Figures for papers and reports: pure functions from arrays to a matplotlib `Figure`.

Volumes are first reoriented by their affine, so that axes 0, 1, 2 are right, anterior, superior. Panels show
the patient's right on the left, the radiological convention, and all have the same scale in mm.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np
from jaxtyping import Float, Real
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from scipy import ndimage

from adregnet_jax.report import tables


class TurnedPair(NamedTuple):
    """A registered pair in patient orientation: axes 0, 1, 2 are right, anterior, superior."""

    fixed: Float[np.ndarray, "x y z"]
    moving: Float[np.ndarray, "x y z"]
    warped: Float[np.ndarray, "x y z"]
    displacement_mm: Float[np.ndarray, "x y z 3"]
    jacobian: Float[np.ndarray, "x y z"]
    spacing_mm: Float[np.ndarray, " 3"]


class Scale(NamedTuple):
    norm: Normalize
    cmap: str | Colormap


class Colours(NamedTuple):
    """The scales that all planes share."""

    grey: Scale
    difference: Scale
    jacobian: Scale


class Plane(NamedTuple):
    """A cut through a volume whose axes are right, anterior, superior."""

    name: str
    normal: int  # the axis that is cut
    axes: tuple[int, int]  # the axes that run along the panel: to the left, and up
    letters: tuple[str, str, str, str]  # what is on the left, right, bottom and top of the panel


PLANES = (
    Plane("axial", 2, (0, 1), ("R", "L", "P", "A")),
    Plane("coronal", 1, (0, 2), ("R", "L", "I", "S")),
    Plane("sagittal", 0, (1, 2), ("A", "P", "I", "S")),
)
PANELS = ("fixed", "moving", "warped", "moving − fixed", "warped − fixed", "deformed grid", "Jacobian")
TRAINING, VALIDATION = "train/", "validation/"  # prefixes of the metrics of each split
FOLDED_COLOUR = "magenta"  # occurs in neither of the diverging colour maps
SIDES = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.03), (0.5, 0.97))  # left, right, bottom, top of a panel
ALIGNED = (("left", "center"), ("right", "center"), ("center", "bottom"), ("center", "top"))
OUTLINE = [withStroke(linewidth=1.5, foreground="black")]  # keeps letters readable on any grey

PLOT_INCHES = (7.0, 4.5)
# Layout of the panels in inches.
PANEL_WIDTH, GAP = 1.6, 0.08
LEFT, TOP, BOTTOM = 0.6, 0.5, 0.65  # room for names of planes, for titles, for colour bars


TITLE = (
    tables.Column("", "{similarity_measure} {similarity_before:.3f} before, {similarity:.3f} after"),
    tables.Column("", "TRE {tre_before_mm:.2f} mm before, {tre_mm:.2f} mm after"),
    tables.Column("", "Dice {dice_before:.3f} before, {dice:.3f} after"),
    tables.Column("", "{folded_percent:.3f} % folded"),
)


def figure_title(row: tables.Row) -> str:
    """One line with the metrics of a pair before and after, and its folds."""
    return ", ".join(text for part in TITLE if (text := part.text(row)) != "-")


def png(figure: Figure) -> bytes:
    """A figure as the contents of a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def registration_figure(
    fixed: Float[np.ndarray, "x y z"],
    moving: Float[np.ndarray, "x y z"],
    warped: Float[np.ndarray, "x y z"],
    displacement: Float[np.ndarray, "x y z 3"],
    jacobian: Float[np.ndarray, "x y z"],
    *,
    spacing_mm: Float[np.ndarray, " 3"],
    affine: Real[np.ndarray, "4 4"],
    title: str = "",
) -> Figure:
    """One registered pair in three planes through `central_point`.

    The scans share one grey window and the two differences one colour scale centred on 0. The Jacobian map
    is centred on 1, with folded voxels (determinant <= 0) in their own colour. The grid shows where p + u(p)
    maps straight lines of the fixed scan, on top of the moving scan.

    Args:
        fixed, moving, warped: [x, y, z], intensities in [0, 1].
        displacement: [x, y, z, 3] in voxels, pull-back.
        jacobian: [x, y, z], determinant of the map p + u(p).
        spacing_mm: [3].
        affine: [4, 4], voxel to RAS mm; only its orientation is used.
        title: shown above the panels.
    """
    orientation = nib.io_orientation(affine).astype(int)
    scan = _turned(fixed, moving, warped, displacement, jacobian, np.asarray(spacing_mm), orientation)
    colours = _colours(scan)
    point = central_point(scan.fixed, scan.moving, scan.displacement_mm)
    extent_mm = np.array(scan.fixed.shape) * scan.spacing_mm
    every_mm = _round_length(max(extent_mm) / 16)

    figure, rows = _panels(extent_mm, len(PANELS))
    width, height = figure.get_size_inches()
    figure.text(LEFT / width, 1 - 0.1 / height, title, fontsize=9, ha="left", va="top")
    for ax, name in zip(rows[0], PANELS, strict=True):
        ax.set_title(name, fontsize=8, pad=4)
    for plane, axes in zip(PLANES, rows, strict=True):
        _draw_plane(axes, scan, plane, point[plane.normal], colours, every_mm)
        index = _file_index(plane.normal, point, orientation, scan.fixed.shape)
        axes[0].set_ylabel(f"{plane.name}\n{index}", fontsize=8)

    last = rows[-1]
    _colour_bar(figure, last[0:3], colours.grey, "intensity (0 to 1)")
    _colour_bar(figure, last[3:5], colours.difference, "difference of intensity")
    last[5].set_xlabel(f"lines of the fixed scan,\nevery {every_mm:g} mm", fontsize=7, labelpad=3)
    _colour_bar(figure, last[6:7], colours.jacobian, "volume ratio, moving / fixed")
    if (jacobian <= 0).any():
        folded = Patch(color=FOLDED_COLOUR, label="folded (≤ 0)")
        figure.legend(handles=[folded], fontsize=7, frameon=False, loc="upper right", borderaxespad=0.3)
    return figure


def levels_figure(
    fixed: Float[np.ndarray, "x y z"],
    moving: Float[np.ndarray, "x y z"],
    warped: Float[np.ndarray, "x y z"],
    match_entropy: Sequence[Float[np.ndarray, "_x _y _z"]],
    jacobian: Sequence[Float[np.ndarray, "_x _y _z"]],
    *,
    spacing_mm: Float[np.ndarray, " 3"],
    affine: Real[np.ndarray, "4 4"],
    dropout_sd_mm: Float[np.ndarray, "x y z"] | None = None,
    title: str = "",
) -> Figure:
    """The paper's Fig. 5: the scans, uncertainty maps and Jacobian maps, coarse to fine, in three planes.

    The planes go through the centre. The maps of a level are drawn in its own voxels.

    Args:
        fixed, moving, warped: [x, y, z], intensities in [0, 1].
        match_entropy: of each level, coarse to fine, [x_l, y_l, z_l] in nats; may be empty.
        jacobian: of each level, coarse to fine, [x_l, y_l, z_l].
        spacing_mm: [3].
        affine: [4, 4], voxel to RAS mm; only its orientation is used.
        dropout_sd_mm: [x, y, z], SD of the displacement over networks drawn by dropout, as one more map.
        title: shown above the panels.
    """
    orientation = nib.io_orientation(affine).astype(int)
    order = np.argsort(orientation[:, 0])
    spacing_mm = np.asarray(spacing_mm)[order]
    grey = Scale(Normalize(*np.percentile(fixed, (0.5, 99.5))), "gray")
    columns = [(name, image, grey, "") for name, image in zip(PANELS, (fixed, moving, warped), strict=False)]
    for number, entropy in enumerate(match_entropy, 1):
        scale = Scale(Normalize(0, max(float(entropy.max()), 1e-3)), "magma")
        columns.append((f"uncertainty {number}", enlarged(entropy, fixed.shape), scale, "entropy, nats"))
    if dropout_sd_mm is not None:
        scale = Scale(Normalize(0, max(float(dropout_sd_mm.max()), 1e-3)), "magma")
        columns.append(("uncertainty, dropout", dropout_sd_mm, scale, "SD of the displacement, mm"))
    for number, determinant in enumerate(jacobian, 1):
        change = float(np.clip(np.percentile(np.abs(determinant - 1), 99.5), 0.1, 1.0))
        scale = Scale(Normalize(1 - change, 1 + change), "BrBG")
        columns.append((f"Jacobian {number}", enlarged(determinant, fixed.shape), scale, "volume ratio"))

    figure, rows = _panels(np.array(fixed.shape)[order] * spacing_mm, len(columns))
    width, height = figure.get_size_inches()
    figure.text(LEFT / width, 1 - 0.1 / height, title, fontsize=9, ha="left", va="top")
    for k, (name, as_filed, scale, unit) in enumerate(columns):
        volume = nib.apply_orientation(as_filed, orientation)
        rows[0][k].set_title(name, fontsize=8, pad=4)
        for plane, axes in zip(PLANES, rows, strict=True):
            image = volume.take(volume.shape[plane.normal] // 2, plane.normal)
            _show(axes[k], image, spacing_mm[list(plane.axes)], scale)
        if unit:
            _colour_bar(figure, rows[-1][k : k + 1], scale, unit)
    for plane, axes in zip(PLANES, rows, strict=True):
        axes[0].set_ylabel(plane.name, fontsize=8)
    _colour_bar(figure, rows[-1][0:3], grey, "intensity (0 to 1)")
    return figure


def tre_figure(
    names: Sequence[str],
    before_mm: Sequence[Float[np.ndarray, " _n"]],
    after_mm: Sequence[Float[np.ndarray, " _n"]],
) -> Figure:
    """Box plots of the landmark distances of each case, before and after; whiskers from 5 to 95 %."""
    figure = Figure(figsize=(2 + 0.9 * len(names), 4.5), dpi=150, layout="constrained")
    ax = figure.subplots()
    for values, shift, colour, label in ((before_mm, -0.18, "C7", "before"), (after_mm, 0.18, "C0", "after")):
        boxes = ax.boxplot(
            list(values),
            positions=np.arange(len(names)) + shift,
            widths=0.3,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "black"},
        )
        for box in boxes["boxes"]:
            box.set_facecolor(colour)
        boxes["boxes"][0].set_label(label)
    ax.set_xticks(range(len(names)), names, fontsize=7, rotation=30, ha="right")
    ax.set_ylabel("landmark distance, mm", fontsize=8)
    ax.tick_params(axis="y", labelsize=7)
    ax.grid(axis="y", linewidth=0.3)
    ax.legend(fontsize=7, frameon=False)
    return figure


def calibration_figure(
    uncertainty: Float[np.ndarray, " n"],
    error_mm: Float[np.ndarray, " n"],
    rank_correlation: float,
    *,
    removed: Float[np.ndarray, " k"],
    rest: Float[np.ndarray, " k"],
    ideal: Float[np.ndarray, " k"],
    area: float,
    measure: str = "entropy of the match, nats",
) -> Figure:
    """Calibration and sparsification of an uncertainty.

    Left, the mean error in ten groups of equal size, from the least to the most uncertain landmarks. Right,
    the mean error of the rest when the most uncertain landmarks are left out.

    Args:
        uncertainty: [n], at each landmark.
        error_mm: [n].
        rank_correlation: Spearman's, between the two; shown above the plot.
        removed: [k], shares of the landmarks that are left out.
        rest: [k], mean error of the others, as a share of that of all.
        ideal: [k], likewise, if those with the largest errors are left out.
        area: between these two curves.
        measure: name and unit of the uncertainty.
    """
    groups = np.array_split(np.argsort(uncertainty, kind="stable"), min(10, len(uncertainty)))
    figure = Figure(figsize=(2 * PLOT_INCHES[0], PLOT_INCHES[1]), dpi=150, layout="constrained")
    ax, sparse = figure.subplots(1, 2)
    means = [(uncertainty[group].mean(), error_mm[group].mean()) for group in groups]
    ax.plot(*zip(*means, strict=True), marker="o", linewidth=0.8)
    ax.set_title(f"Spearman's rank correlation {rank_correlation:+.2f}", fontsize=8)
    ax.set_xlabel(f"{measure} (mean of a tenth of the landmarks)", fontsize=7)
    ax.set_ylabel("mean TRE, mm", fontsize=8)
    sparse.plot(100 * removed, rest, linewidth=0.8, label="the most uncertain left out")
    sparse.plot(100 * removed, ideal, linewidth=0.8, linestyle="--", label="the worst left out")
    sparse.set_title(f"area between the curves {area:.3f}", fontsize=8)
    sparse.set_xlabel("landmarks left out, %", fontsize=7)
    sparse.set_ylabel("mean TRE of the rest, share of that of all", fontsize=8)
    sparse.legend(fontsize=6)
    for plot in (ax, sparse):
        plot.set_ylim(bottom=0)
        plot.tick_params(labelsize=7)
        plot.grid(linewidth=0.3)
    return figure


def jacobian_figure(names: Sequence[str], determinants: Sequence[Float[np.ndarray, " _n"]]) -> Figure:
    """Histograms of the Jacobian determinant of each case, clipped to -0.1 to 2."""
    figure = Figure(figsize=PLOT_INCHES, dpi=150, layout="constrained")
    ax = figure.subplots()
    for name, values in zip(names, determinants, strict=True):
        bins = np.linspace(-0.1, 2, 85).tolist()
        ax.hist(np.clip(values, bins[0], bins[-1]), bins, density=True, histtype="step", label=name)
    ax.axvline(0, color=FOLDED_COLOUR, linewidth=0.8)
    ax.set_xlabel("Jacobian determinant (0 or less: folded)", fontsize=8)
    ax.set_ylabel("density", fontsize=8)
    ax.tick_params(labelsize=7)
    if len(names) <= 10:
        ax.legend(fontsize=6, frameon=False)
    return figure


def training_figure(records: Sequence[Mapping[str, float]]) -> Figure:
    """The logged metrics of a run over its steps: one panel per metric, with the curves of both splits.

    Args:
        records: one mapping per logged step, with "step" and any metrics; "validation/loss" becomes a curve
            in the panel "loss", next to that of the training steps.
    """
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    panels = list(dict.fromkeys(name.removeprefix(TRAINING).removeprefix(VALIDATION) for name in names))
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(4 * columns, 2.8 * rows), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, panel in zip(axes, panels, strict=False):
        curves = (
            (panel, "training", "C0"),  # metrics without a split, such as the learning rate
            (TRAINING + panel, "training", "C0"),
            (VALIDATION + panel, "validation", "C1"),
        )
        for name, split, colour in curves:
            points = [(record["step"], record[name]) for record in records if name in record]
            if points:
                marker = "." if len(points) < 50 else ""
                ax.plot(*zip(*points, strict=True), label=split, color=colour, marker=marker, linewidth=0.8)
        ax.set_title(panel, fontsize=8)
        ax.set_xlabel("step", fontsize=7)
        ax.tick_params(labelsize=6)
        ax.grid(linewidth=0.3)
    shown = {line.get_label(): line for ax in axes for line in ax.lines}
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=2, fontsize=7, frameon=False
    )
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def central_point(
    fixed: Float[np.ndarray, "x y z"],
    moving: Float[np.ndarray, "x y z"],
    displacement_mm: Float[np.ndarray, "x y z 3"],
) -> tuple[int, ...]:
    """The voxel of largest motion in the body, in the inner half of each axis; the centre if nothing moves.

    Args:
        fixed, moving: [x, y, z], intensities in [0, 1]; below 0.05 in both is background.
        displacement_mm: [x, y, z, 3].
    """
    motion = ndimage.uniform_filter(np.linalg.norm(displacement_mm, axis=-1), size=3)
    motion = np.where(np.maximum(fixed, moving) > 0.05, motion, 0)
    inner = tuple(slice(n // 4, n - n // 4) for n in motion.shape)
    if not motion[inner].any():
        return tuple(n // 2 for n in motion.shape)
    place = np.unravel_index(motion[inner].argmax(), motion[inner].shape)
    return tuple(int(i) + cut.start for i, cut in zip(place, inner, strict=True))


def enlarged(level: Float[np.ndarray, "_x _y _z"], shape: Sequence[int]) -> Float[np.ndarray, "x y z"]:
    """Enlarges the volume of a level to the full grid, which the network padded at the high end.

    Args:
        level: [x_l, y_l, z_l], coarser than the full grid by a power of two.
        shape: (x, y, z) of the full grid.
    """
    for axis, size in enumerate(shape):
        factor = 1
        while level.shape[axis] * factor < size:
            factor *= 2
        level = np.repeat(level, factor, axis)
    return level[tuple(slice(size) for size in shape)]


def grid_lines(
    displacement_mm: Float[np.ndarray, "m n 2"], spacing_mm: Float[np.ndarray, " 2"], every_mm: float
) -> list[Float[np.ndarray, "_k 2"]]:
    """Straight lines of the fixed plane, mapped by p + u(p): first those along axis 0, then along axis 1.

    Args:
        displacement_mm: [m, n, 2], the two components within the plane.
        spacing_mm: [2].
        every_mm: distance between the lines, rounded to whole voxels.

    Returns:
        Lines [k, 2] in mm, with the centre of the first voxel at 0.
    """
    index = np.moveaxis(np.indices(displacement_mm.shape[:2]), 0, -1)
    carried = index * spacing_mm + displacement_mm  # [m, n, 2]
    step = np.maximum(1, np.rint(every_mm / np.asarray(spacing_mm))).astype(int)
    along_0 = [carried[:, k] for k in range(0, carried.shape[1], step[1])]
    along_1 = [carried[k] for k in range(0, carried.shape[0], step[0])]
    return along_0 + along_1


def _turned(
    fixed: np.ndarray,
    moving: np.ndarray,
    warped: np.ndarray,
    displacement: np.ndarray,
    jacobian: np.ndarray,
    spacing_mm: np.ndarray,
    orientation: np.ndarray,
) -> TurnedPair:
    """All arrays in patient orientation; `orientation` is that of `nibabel.io_orientation`."""
    order = np.argsort(orientation[:, 0])  # the file's axis for each axis of the patient
    displacement_mm = nib.apply_orientation(displacement * spacing_mm, orientation)
    fixed, moving, warped, jacobian = (
        nib.apply_orientation(volume, orientation) for volume in (fixed, moving, warped, jacobian)
    )
    displacement_mm = displacement_mm[..., order] * orientation[order, 1]
    return TurnedPair(fixed, moving, warped, displacement_mm, jacobian, spacing_mm[order])


def _file_index(axis: int, point: Sequence[int], orientation: np.ndarray, shape: Sequence[int]) -> str:
    """The index of the slice through `point` in the file, for instance "k = 38"."""
    file_axis = int(np.flatnonzero(orientation[:, 0] == axis)[0])
    index = point[axis] if orientation[file_axis, 1] > 0 else shape[axis] - 1 - point[axis]
    return f"{'ijk'[file_axis]} = {index}"


def _colours(scan: TurnedPair) -> Colours:
    largest = np.percentile(np.abs(scan.moving - scan.fixed), 99.5) or 1.0  # equal scans: any scale will do
    change = np.clip(np.percentile(np.abs(scan.jacobian - 1), 99.5), 0.1, 1.0)
    return Colours(
        Scale(Normalize(*np.percentile(scan.fixed, (0.5, 99.5))), "gray"),
        Scale(Normalize(-largest, largest), "RdBu_r"),
        Scale(Normalize(1 - change, 1 + change), "BrBG"),
    )


def _draw_plane(
    axes: Sequence[Axes], scan: TurnedPair, plane: Plane, index: int, colours: Colours, every_mm: float
) -> None:
    """Fills one row of panels, in the order of `PANELS`."""
    fixed, moving, warped, jacobian = (
        volume.take(index, plane.normal) for volume in (scan.fixed, scan.moving, scan.warped, scan.jacobian)
    )
    displacement_mm = scan.displacement_mm.take(index, plane.normal)[..., plane.axes]
    spacing_mm = scan.spacing_mm[list(plane.axes)]

    for ax, image in zip(axes[:3], (fixed, moving, warped), strict=True):
        _show(ax, image, spacing_mm, colours.grey)
    _show(axes[3], moving - fixed, spacing_mm, colours.difference)
    _show(axes[4], warped - fixed, spacing_mm, colours.difference)
    _show(axes[5], moving, spacing_mm, colours.grey, alpha=0.4)
    lines = grid_lines(displacement_mm, spacing_mm, every_mm)
    axes[5].add_collection(LineCollection(lines, colors="tab:blue", linewidths=0.5), autolim=False)
    _show(axes[6], jacobian, spacing_mm, colours.jacobian)
    folded = np.ma.masked_where(jacobian > 0, jacobian)
    _show(axes[6], folded, spacing_mm, Scale(Normalize(), ListedColormap([FOLDED_COLOUR])))

    for (x, y), (ha, va), letter in zip(SIDES, ALIGNED, plane.letters, strict=True):
        axes[0].text(
            x,
            y,
            letter,
            ha=ha,
            va=va,
            transform=axes[0].transAxes,
            color="white",
            fontsize=7,
            path_effects=OUTLINE,
        )


def _show(
    ax: Axes, image: np.ndarray, spacing_mm: np.ndarray, scale: Scale, alpha: float | None = None
) -> None:
    """An image [m, n] in mm: axis 0 runs to the left, axis 1 up, the centre of the first voxel is 0."""
    low, (right, top) = -0.5 * spacing_mm, (np.array(image.shape) - 0.5) * spacing_mm
    ax.imshow(
        image.T,
        origin="lower",
        extent=(low[0], right, low[1], top),
        cmap=scale.cmap,
        norm=scale.norm,
        alpha=alpha,
        interpolation="nearest",
        aspect="equal",
    )
    ax.set(xlim=(right, low[0]), ylim=(low[1], top), xticks=[], yticks=[])


def _panels(extent_mm: np.ndarray, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure with one row per plane and one column per panel, all at one scale in mm."""
    inches = PANEL_WIDTH / max(extent_mm[:2])
    heights = [extent_mm[plane.axes[1]] * inches for plane in PLANES]
    width = LEFT + columns * (PANEL_WIDTH + GAP)
    height = TOP + sum(heights) + (len(PLANES) - 1) * GAP + BOTTOM
    figure = Figure(figsize=(width, height), dpi=150)
    lefts = [LEFT + k * (PANEL_WIDTH + GAP) for k in range(columns)]
    rows, bottom = [], height - TOP
    for panel_height in heights:
        bottom -= panel_height
        box = [(left / width, bottom / height, PANEL_WIDTH / width, panel_height / height) for left in lefts]
        rows.append([figure.add_axes(b) for b in box])
        bottom -= GAP
    return figure, rows


def _colour_bar(figure: Figure, above: Sequence[Axes], scale: Scale, label: str) -> None:
    """A horizontal colour bar centred below the panels `above`, at most two panels wide."""
    width, height = figure.get_size_inches()
    left, right = above[0].get_position().x0, above[-1].get_position().x1
    length = min(right - left, 1.5 * PANEL_WIDTH / width)
    ax = figure.add_axes(((left + right - length) / 2, (BOTTOM - 0.2) / height, length, 0.09 / height))
    bar = figure.colorbar(ScalarMappable(*scale), cax=ax, orientation="horizontal")
    bar.ax.tick_params(labelsize=6, pad=1, length=2)
    bar.locator = MaxNLocator(4, steps=[1, 2, 5, 10])
    bar.set_label(label, fontsize=7, labelpad=1)


def _round_length(length_mm: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... mm up to `length_mm`."""
    power = 10.0 ** np.floor(np.log10(length_mm))
    return float(max(m for m in (1, 2, 5) if m * power <= length_mm) * power)
