"""The commands on DICOM objects of radiotherapy: `contours` and `dose`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adregnet_jax.cli.options import (
    AnonymizeOption,
    FixedSeriesOption,
    MovingSeriesOption,
    OverwriteOption,
)
from adregnet_jax.errors import UserError

FieldArgument = Annotated[
    Path, typer.Argument(help="The field from the fixed to the moving series: .nii.gz, .nii, .npz or .h5.")
]
FixedOption = Annotated[
    Path, typer.Option("--fixed", metavar="DIR", help="The series to carry to, on which the field lies.")
]
MovingOption = Annotated[Path, typer.Option("--moving", metavar="DIR", help="The series to carry from.")]
FolderOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder.")]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="NAME", help="A structure; repeat for more. Default: all."),
]


def contours(
    rtstruct: Annotated[Path, typer.Argument(help="Structures drawn on the moving series.")],
    field: FieldArgument,
    fixed: FixedOption,
    moving: MovingOption,
    output: FolderOption,
    only: OnlyOption = None,
    fixed_series: FixedSeriesOption = None,
    moving_series: MovingSeriesOption = None,
    anonymize: AnonymizeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Carries structures from the moving series to the slices of the fixed one.

    Writes structures.dcm, and each structure's volume before and after to volumes.csv.
    """
    from adregnet_jax.registration.carried_structures import VOLUMES, write_carried_structures
    from adregnet_jax.registration.series_field import read_series_field
    from adregnet_jax.report.tables import to_text

    between = read_series_field(
        field, fixed=fixed, moving=moving, fixed_series=fixed_series, moving_series=moving_series
    )
    rows = write_carried_structures(
        rtstruct, between, output, only=only or (), anonymize=anonymize, overwrite=overwrite
    )
    print(to_text(rows, VOLUMES))
    print(f"Written to {output}")


def dose(
    rtdose: Annotated[Path, typer.Argument(help="A dose on the moving series.")],
    field: FieldArgument,
    fixed: FixedOption,
    moving: MovingOption,
    output: FolderOption,
    structures: Annotated[
        Path | None,
        typer.Option(metavar="RTSTRUCT", help="Drawn on the moving series, for dose-volume histograms."),
    ] = None,
    only: OnlyOption = None,
    fixed_series: FixedSeriesOption = None,
    moving_series: MovingSeriesOption = None,
    anonymize: AnonymizeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Carries a dose from the moving series to the anatomy of the fixed one.

    Writes dose.dcm, and the doses of structures before and after: dvh.png, dvh.csv and means.csv.
    """
    if only and structures is None:
        raise UserError("--only chooses among structures: add --structures RTSTRUCT, or drop it")
    from adregnet_jax.registration.carried_dose import MEANS, write_carried_dose
    from adregnet_jax.registration.series_field import read_series_field
    from adregnet_jax.report.tables import to_text

    between = read_series_field(
        field, fixed=fixed, moving=moving, fixed_series=fixed_series, moving_series=moving_series
    )
    means = write_carried_dose(
        rtdose,
        between,
        output,
        drawn=structures,
        only=only or (),
        anonymize=anonymize,
        overwrite=overwrite,
    )
    if means:
        print(to_text(means, MEANS))
    print(
        "note: each point has the dose of the point it corresponds to; energy and mass are not conserved "
        "where tissue is compressed or stretched",
        file=sys.stderr,
    )
    print(f"Written to {output}")
