"""What is measured on a registered pair, and the files that tell of it."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from adregnet_jax import metrics, provenance
from adregnet_jax.data.io.images import Image, write_image
from adregnet_jax.data.io.transforms import write_field, write_matrix
from adregnet_jax.data.preprocessing import rescale_percentiles, rescale_window
from adregnet_jax.errors import UserError
from adregnet_jax.losses import mutual_information_loss
from adregnet_jax.registration.field import (
    DisplacementField,
    after_field,
    field_jacobian,
    warp_image,
    warp_points,
)
from adregnet_jax.registration.options import Modality
from adregnet_jax.report import page as report
from adregnet_jax.report import tables
from adregnet_jax.report.figures import registration_figure

if TYPE_CHECKING:
    from adregnet_jax.registration.scans import RegisteredScans

# All that may lie in a folder of results.
FILES = (
    "warped.nii.gz",
    "warped_labels.nii.gz",
    "field.nii.gz",
    "field.h5",
    "inverse.nii.gz",
    "affine.txt",
    "report.html",
    "summary.json",
    "preview.png",
)
COLUMNS = (
    tables.Column("similarity", "{similarity_measure}"),
    tables.Column("before", "{similarity_before:.3f}"),
    tables.Column("after", "{similarity:.3f}"),
    tables.Column("landmarks", "{landmarks:.0f}"),
    tables.Column("TRE before, mm", "{tre_before_mm:.2f} ({tre_before_sd_mm:.2f})"),
    tables.Column("TRE, mm", "{tre_mm:.2f} ({tre_sd_mm:.2f})"),
    tables.Column("Dice before", "{dice_before:.3f}"),
    tables.Column("Dice", "{dice:.3f}"),
    tables.Column("Jacobian", "{jacobian_min:.3f} to {jacobian_max:.3f}"),
    tables.Column("folded, %", "{folded_percent:.4f}"),
    tables.Column("folded volume, %", "{folded_volume_percent:.4f}"),
)
LABEL_COLUMNS = (
    tables.Column("label", "{label}"),
    tables.Column("Dice before", "{dice_before:.3f}"),
    tables.Column("Dice", "{dice:.3f}"),
)
PROTOCOL = """\
Similarity: global NCC, or mutual information in nats with --modality multi, of intensities between the
0.5 and 99.5 percentiles, where the scans overlap. TRE: distance of the mapped fixed landmarks to the moving
ones, mean (sample SD). Dice: mean over the labels; moving labels warped as one trilinear image a label, the
largest wins. Jacobian: determinant of the whole map, affine included; folded: 0 or less by central
differences; folded volume: by tetrahedra. "Before": the scans where their headers put them."""

_warp = jax.jit(warp_image, static_argnames=("mode", "padding"))
_determinant = jax.jit(field_jacobian)


class Scans(NamedTuple):
    """A pair, and what it is judged by."""

    fixed: Image
    moving: Image
    fixed_mask: Image | None = None
    moving_mask: Image | None = None
    fixed_labels: Image | None = None
    moving_labels: Image | None = None
    fixed_landmarks: np.ndarray | None = None  # [n, 3] RAS mm
    moving_landmarks: np.ndarray | None = None  # [n, 3] RAS mm


class Drawn(NamedTuple):
    """The fixed grid, as the figure and the files need it."""

    fixed: np.ndarray  # [x, y, z] in [0, 1]
    moving: np.ndarray  # [x, y, z] in [0, 1], where its header puts it
    warped: np.ndarray  # [x, y, z] in [0, 1]
    displacement: np.ndarray  # [x, y, z, 3] voxels
    jacobian: np.ndarray  # [x, y, z]
    affine: np.ndarray  # [4, 4]
    spacing_mm: np.ndarray  # [3]
    warped_labels: np.ndarray | None  # [x, y, z]


def measure(scans: Scans, registered: RegisteredScans, modality: Modality) -> tuple[tables.Row, Drawn]:
    """All numbers of a registered pair, before and after, and what is drawn of it.

    Raises:
      UserError: a field that is not finite.
    """
    field = registered.field
    if not np.isfinite(field.displacement).all():
        raise UserError("the field is not finite: the network diverged, or a --set of this run is too large")
    still = DisplacementField(jnp.zeros_like(field.displacement), field.affine)
    low, high = np.percentile(scans.moving.values, [0.5, 99.5])
    if low == high:
        low, high = scans.moving.values.min(), scans.moving.values.max()
    fixed = rescale_percentiles(scans.fixed.values, scans.fixed.name)
    moving = rescale_window(np.asarray(_pull(still, scans.moving)), float(low), float(high))
    warped = rescale_window(registered.warped.values, float(low), float(high))

    row: tables.Row = {}
    similarity = functools.partial(_similarity, scans, fixed, modality)
    row["similarity_measure"] = "NCC" if modality == Modality.mono else "mutual information"
    row["similarity_before"], row["similarity"] = similarity(moving, still), similarity(warped, field)
    determinant = np.asarray(_determinant(field))
    row["folded_percent"] = 100 * float(np.mean(determinant <= 0))
    row["folded_volume_percent"] = metrics.folded_volume_percent(field.displacement)
    row["jacobian_min"], row["jacobian_max"] = float(determinant.min()), float(determinant.max())
    dice, warped_labels = _dice(scans, still, field)
    row |= dice | _landmark_distances(scans, field)
    drawn = Drawn(
        fixed,
        moving,
        warped,
        np.asarray(field.displacement),
        determinant,
        scans.fixed.affine,
        scans.fixed.spacing_mm,
        warped_labels,
    )
    return row, drawn


def write_results(
    folder: Path,
    scans: Scans,
    registered: RegisteredScans,
    drawn: Drawn,
    summary: dict[str, Any],
    *,
    composite: bool,
) -> None:
    """Writes everything but preview.png; summary.json last, so that it tells that the rest is there."""
    field, inverse = registered.field, registered.inverse
    affine = scans.fixed.affine
    write_image(folder / "warped.nii.gz", registered.warped)
    write_field(folder / "field.nii.gz", drawn.displacement, affine)
    write_field(folder / "inverse.nii.gz", np.asarray(inverse.displacement), np.asarray(scans.moving.affine))
    write_matrix(folder / "affine.txt", np.asarray(registered.matrix, np.float64))
    if drawn.warped_labels is not None:
        write_image(folder / "warped_labels.nii.gz", Image(drawn.warped_labels, affine))
    if composite:
        back = np.linalg.inv(np.asarray(registered.matrix, np.float64))
        before_affine = np.asarray(after_field(field, jnp.asarray(back)).displacement)
        write_field(folder / "field.h5", before_affine, affine, matrix=np.asarray(registered.matrix))
    (folder / "report.html").write_text(_page(drawn, summary), encoding="utf-8")
    summary["origin"] = provenance.origin()
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")


def write_preview(folder: Path, drawn: Drawn, row: tables.Row) -> None:
    """Writes preview.png: the scans in three planes, before and after."""
    (folder / "preview.png").write_bytes(_png(_figure(drawn, row)))


def as_text(summary: dict[str, Any]) -> str:
    """The numbers for the terminal, one line each."""
    row = summary["results"]
    told = [(column.heading, column.text(row)) for column in COLUMNS]
    return "\n".join(f"{heading:<17}{text}" for heading, text in told if text != "-")


def _pull(field: DisplacementField, image: Image, mode: str = "linear") -> jax.Array:
    return _warp(field, image.values, image.affine, mode=mode)


def _similarity(
    scans: Scans, fixed: np.ndarray, modality: Modality, other: np.ndarray, field: DisplacementField
) -> float | None:
    """Of two images [x, y, z] in [0, 1], where both are scans; None where they are not."""
    everywhere = Image(np.ones(scans.moving.shape, np.float32), scans.moving.affine)
    mask = np.asarray(_pull(field, everywhere, "nearest")) > 0
    if scans.fixed_mask is not None:
        mask &= scans.fixed_mask.values > 0
    if not mask.any():
        return None
    if modality == Modality.mono:
        return tables.finite(metrics.ncc(fixed, other, mask=mask))
    batch = [jnp.asarray(x, jnp.float32)[None, ..., None] for x in (fixed, other, mask)]
    return tables.finite(-float(mutual_information_loss(batch[0], batch[1], mask=batch[2])))


def _dice(
    scans: Scans, still: DisplacementField, field: DisplacementField
) -> tuple[tables.Row, np.ndarray | None]:
    """Dice before and after, and the warped labels [x, y, z]."""
    fixed, moving = scans.fixed_labels, scans.moving_labels
    if fixed is None or moving is None:
        return {"dice_before": None, "dice": None, "dice_by_label": None}, None
    classes = np.unique(moving.values)
    labels = [label for label in np.union1d(fixed.values, classes).tolist() if label != 0]

    def warped(by: DisplacementField) -> np.ndarray:
        return np.asarray(_warp(by, moving.values, moving.affine, mode="label", classes=classes))

    after = warped(field)
    # On one grid there is nothing to warp, which saves a minute where labels are many.
    on_one_grid = fixed.shape == moving.shape and np.allclose(fixed.affine, moving.affine, atol=1e-3)
    scores = {
        "dice_before": metrics.dice(fixed.values, moving.values if on_one_grid else warped(still), labels),
        "dice": metrics.dice(fixed.values, after, labels),
    }
    row: tables.Row = {name: tables.mean_and_sd(values)[0] for name, values in scores.items()}
    row["dice_by_label"] = [
        {"label": label} | {name: tables.finite(values[k]) for name, values in scores.items()}
        for k, label in enumerate(labels)
    ]
    return row, after


def _landmark_distances(scans: Scans, field: DisplacementField) -> tables.Row:
    fixed, moving = scans.fixed_landmarks, scans.moving_landmarks
    if fixed is None or moving is None:
        names = ("landmarks", "tre_before_mm", "tre_before_sd_mm", "tre_mm", "tre_sd_mm")
        return dict.fromkeys(names)
    row: tables.Row = {"landmarks": len(fixed)}
    for name, points in (("tre_before", fixed), ("tre", np.asarray(warp_points(field, jnp.asarray(fixed))))):
        mean, sd = tables.mean_and_sd(np.linalg.norm(points - moving, axis=1))
        row |= {f"{name}_mm": mean, f"{name}_sd_mm": sd}
    return row


def _figure(drawn: Drawn, row: tables.Row) -> Figure:
    gains = (
        tables.Column("", "{similarity_measure} {similarity_before:.3f} before, {similarity:.3f} after"),
        tables.Column("", "TRE {tre_before_mm:.2f} mm before, {tre_mm:.2f} mm after"),
        tables.Column("", "Dice {dice_before:.3f} before, {dice:.3f} after"),
        tables.Column("", "{folded_percent:.3f} % folded"),
    )
    return registration_figure(
        drawn.fixed,
        drawn.moving,
        drawn.warped,
        drawn.displacement,
        drawn.jacobian,
        spacing_mm=drawn.spacing_mm,
        affine=drawn.affine,
        title=", ".join(text for gain in gains if (text := gain.text(row)) != "-"),
    )


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _page(drawn: Drawn, summary: dict[str, Any]) -> str:
    row = summary["results"]
    sources = "\n".join(f"{name}: {source['path']}" for name, source in summary["sources"].items())
    options = summary["options"]
    how = f"method: {options['method']}, modality: {options['modality']}"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    sections = [
        report.Section("Before and after", report.picture(_png(_figure(drawn, row)), "three planes")),
        report.Section("Alignment", tables.to_html([row], COLUMNS)),
    ]
    if row["dice_by_label"]:
        table = tables.to_html(row["dice_by_label"], LABEL_COLUMNS)
        sections.append(report.Section("Dice by label", table))
    return report.page("Registration of two scans", f"{sources}\n{how}\n{seconds}\n\n{PROTOCOL}", sections)
