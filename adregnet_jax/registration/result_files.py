"""Writes the folder of a registered pair: images, fields, the affine matrix, numbers and a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from adregnet_jax import provenance
from adregnet_jax.data.io.images import Image, write_image
from adregnet_jax.data.io.transforms import write_field, write_matrix
from adregnet_jax.registration.dicom import DicomPair, write_dicom
from adregnet_jax.registration.ladder import after_field
from adregnet_jax.registration.options import Report
from adregnet_jax.registration.results import RegisteredScans
from adregnet_jax.report import page as html
from adregnet_jax.report import tables
from adregnet_jax.report.figures import figure_title, png, registration_figure
from adregnet_jax.report.viewer import ViewedPair

# Every file that such a folder can hold, and the folder of DICOM objects.
FILES = (
    "dicom",
    "warped.nii.gz",
    "warped_labels.nii.gz",
    "field.nii.gz",
    "field.h5",
    "inverse.nii.gz",
    "affine.txt",
    "report.html",
    "summary.json",
    "preview.png",
    "error.nii.gz",
)
COLUMNS = (
    tables.Column("verdict", "{verdict}, score {score:.2f}"),
    tables.Column(
        "predicted error",
        "{predicted_error_mm} mm (90 %: {predicted_error_90_mm[0]} to {predicted_error_90_mm[1]})",
    ),
    tables.Column("taken back", "{taken_back}"),
    tables.Column("similarity", "{similarity_measure}"),
    tables.Column("before", "{similarity_before:.3f}"),
    tables.Column("affine", "{similarity_affine:.3f}"),
    tables.Column("network", "{similarity_network:.3f}"),
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
Similarity: global NCC, or mutual information in nats for different contrasts, of intensities between the
0.5 and 99.5 percentiles, where the scans overlap; after the affine step and the network where more
followed. TRE: distance between the mapped fixed landmarks and the moving ones, mean (sample SD). Dice:
mean over the labels; moving labels warped as one trilinear image a label, the largest wins. Jacobian:
determinant of the whole map, affine included; folded: 0 or less by central differences; folded volume: by
tetrahedra. "Before": the scans where their headers put them."""


IDENTIFYING = ("command", "host")  # parts of the origin that can name a person or a place


def write_results(
    folder: Path,
    registered: RegisteredScans,
    *,
    composite: bool = False,
    preview: bool = False,
    error: bool = False,
    report: Report = "interactive",
    dicom: DicomPair | None = None,
) -> None:
    """Writes the files of a result into an existing folder.

    summary.json comes last, so that its presence means a complete folder.

    Args:
      folder: an empty folder.
      registered: the registered scans.
      composite: also write field.h5.
      preview: write preview.png alone.
      dicom: the series of the scans, for DICOM objects in `dicom/`; whether they, the report and the summary
        are anonymous.
      error: also write error.nii.gz, the predicted error, where there is a verdict.
      report: whether the report shows the scans slice by slice, or as pictures.
    """
    if preview:
        (folder / "preview.png").write_bytes(png(_figure(registered)))
        return
    measurement = registered.measurement
    affine = registered.scans.fixed.affine
    matrix = np.asarray(registered.matrix, np.float64)
    inverse = np.asarray(registered.inverse.displacement)
    write_image(folder / "warped.nii.gz", registered.warped)
    write_field(folder / "field.nii.gz", measurement.displacement, affine)
    write_field(folder / "inverse.nii.gz", inverse, np.asarray(registered.scans.moving.affine))
    write_matrix(folder / "affine.txt", matrix)
    if measurement.warped_labels is not None:
        write_image(folder / "warped_labels.nii.gz", Image(measurement.warped_labels, affine))
    if composite:
        before_affine = np.asarray(after_field(registered.field, np.linalg.inv(matrix)).displacement)
        write_field(folder / "field.h5", before_affine, affine, matrix=np.asarray(registered.matrix))
    assessment = registered.assessment
    if assessment is not None and assessment.error_mm is not None and error:
        write_image(folder / "error.nii.gz", Image(assessment.error_mm, affine))
    anonymous = dicom is not None and dicom.anonymize
    if dicom is not None:
        write_dicom(folder / "dicom", registered, dicom)
    page = _page(registered, anonymous, report)
    (folder / "report.html").write_text(page, encoding="utf-8")
    origin = provenance.origin()
    summary = registered.summary() | {"origin": origin}
    if anonymous:
        summary["origin"] = {name: value for name, value in origin.items() if name not in IDENTIFYING}
        for name in ("sources", "label_names"):
            summary.pop(name, None)
    if "options" in summary:
        summary["options"] = summary["options"] | {"composite": composite}
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")


def as_text(row: tables.Row) -> str:
    """The measurements for the terminal, one a line."""
    lines = [f"{heading:<17}{text}" for heading, text in _numbers(row)]
    return "\n".join(lines + [f"- {reason}" for reason in row.get("reasons") or ()])


def _numbers(row: tables.Row) -> list[tuple[str, str]]:
    """The names and values of what was measured."""
    cells = [(column.heading, column.text(row)) for column in COLUMNS]
    return [(heading, text) for heading, text in cells if text != "-"]


def _figure(registered: RegisteredScans) -> Figure:
    measurement, fixed = registered.measurement, registered.scans.fixed
    return registration_figure(
        measurement.fixed,
        measurement.moving,
        measurement.warped,
        measurement.displacement,
        measurement.jacobian,
        spacing_mm=fixed.spacing_mm,
        affine=fixed.affine,
        title=figure_title(measurement.row),
    )


def _page(registered: RegisteredScans, anonymous: bool, report: Report) -> str:
    row, record, assessment = registered.measurement.row, registered.record, registered.assessment
    sources = {} if anonymous else record.get("sources", {})
    lines = [f"{name}: {source['path']}" for name, source in sources.items()]
    method = f"method: {record['options']['method']}, " if "options" in record else ""
    lines.append(f"{method}modality: {registered.modality}")
    lines.append(", ".join(f"{name} {value:.1f} s" for name, value in registered.seconds.items()))
    sections = []
    if report == "static":
        picture = html.picture(png(_figure(registered)), "three planes")
        sections.append(html.Section("Before and after", picture))
    if row["dice_by_label"]:
        table = tables.to_html(row["dice_by_label"], LABEL_COLUMNS)
        sections.append(html.Section("Dice by label", table))
    return html.page(
        "Registration of two scans",
        "\n".join([*lines, "", PROTOCOL]),
        sections,
        numbers=_numbers(row),
        verdict=None if assessment is None else assessment.row(),
        pairs=[viewed(registered, anonymous=anonymous)] if report == "interactive" else [],
    )


def viewed(registered: RegisteredScans, *, anonymous: bool = False) -> ViewedPair:
    """The registered scans as the interactive report shows them; labels by their numbers, if anonymous."""
    scans, measurement, assessment = registered.scans, registered.measurement, registered.assessment
    return ViewedPair(
        "",
        affine=np.asarray(scans.fixed.affine, np.float64),
        fixed=measurement.fixed,
        moving=measurement.moving,
        warped=measurement.warped,
        displacement=measurement.displacement,
        jacobian=measurement.jacobian,
        error_mm=None if assessment is None else assessment.error_mm,
        fixed_labels=None if scans.fixed_labels is None else scans.fixed_labels.values,
        moving_labels=measurement.moving_labels,
        warped_labels=measurement.warped_labels,
        label_names={} if anonymous else registered.record.get("label_names", {}),
        fixed_landmarks_mm=scans.fixed_landmarks,
        moving_landmarks_mm=scans.moving_landmarks,
        mapped_landmarks_mm=measurement.mapped_landmarks,
        fixed_window=measurement.fixed_window,
        moving_window=measurement.moving_window,
    )
